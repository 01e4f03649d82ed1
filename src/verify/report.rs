//! What `vitrim verify` says: a table, JSON, or JUnit.

use std::fmt::Write;

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde::Serialize;

use super::table::table;
use super::{Findings, Incomparable, OutputFinding, Tolerances, VerifyArgs};
use crate::tensor::compare::Ratio;

/// The verdict, as `--json` prints it. Figures that are not finite are `null` there.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The version of this layout.
    pub schema_version: u32,
    /// The reference's path.
    pub reference: String,
    /// The candidate's path.
    pub candidate: String,
    /// What ran them.
    pub runtime: String,
    /// What they were fed.
    pub input: String,
    /// How many images that was.
    pub images: usize,
    /// Whether every check passed.
    pub passed: bool,
    /// The reference's outputs.
    pub outputs: Vec<OutputReport>,
    /// Outputs that only the candidate has; they are not judged.
    pub extra_outputs: Vec<String>,
    /// Accuracy, where labels are known.
    pub accuracy: Option<AccuracyReport>,
}

/// One output.
#[derive(Clone, Debug, Serialize)]
pub struct OutputReport {
    /// Its name.
    pub name: String,
    /// The figures, unless it cannot be compared.
    pub figures: Option<Figures>,
    /// The checks that apply to it.
    pub checks: Vec<Check>,
}

/// How far the candidate's output is off.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Elements compared.
    pub elements: usize,
    /// max |candidate − reference|.
    pub max_abs: f64,
    /// max |candidate − reference| / max |reference|.
    pub relative: f64,
    /// The smallest cosine between rows.
    pub min_cosine: f64,
    /// Elements that are not finite and not the same infinity on both sides.
    pub non_finite: usize,
    /// How often the best class is the same, for outputs with a score per class.
    pub top1_agreement: Option<Share>,
}

/// A share of images.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Share {
    /// How many.
    pub hits: usize,
    /// Of how many.
    pub of: usize,
    /// The same in percent.
    pub percent: f64,
}

impl From<Ratio> for Share {
    fn from(ratio: Ratio) -> Self {
        Share { hits: ratio.hits, of: ratio.of, percent: ratio.percent() }
    }
}

/// Accuracy of both models.
#[derive(Clone, Debug, Serialize)]
pub struct AccuracyReport {
    /// The output that holds the scores.
    pub output: String,
    /// The reference's.
    pub reference: Share,
    /// The candidate's.
    pub candidate: Share,
    /// What the candidate loses, in percentage points.
    pub drop: f64,
}

/// One check.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What is checked: `shape`, `finite`, `atol`, `rtol`, `min-cosine` or `max-top1-drop`.
    pub name: &'static str,
    /// Whether it holds.
    pub passed: bool,
    /// What was found, in words.
    pub detail: String,
}

impl Report {
    /// Judges what was found.
    pub fn new(args: &VerifyArgs, findings: &Findings, input: String) -> Result<Self> {
        let tolerances = &args.tolerances;
        let accuracy = findings.accuracy.as_ref();
        let judge = |output: &OutputFinding| {
            let drop = accuracy.filter(|accuracy| accuracy.output == output.name).map(|accuracy| accuracy.drop());
            OutputReport::new(output, tolerances, drop, accuracy.is_some())
        };
        let outputs: Vec<OutputReport> = findings.outputs.iter().map(judge).collect();
        ensure!(!outputs.is_empty(), "there are no outputs to compare");
        let comparable = outputs.iter().any(|output| output.figures.is_some());
        let judged = outputs.iter().flat_map(|output| &output.checks).any(|check| check.name == "max-top1-drop");
        ensure!(
            tolerances.max_top1_drop.is_none() || judged || !comparable,
            "--max-top1-drop needs an output with a score per class, and there is none"
        );
        Ok(Report {
            schema_version: 1,
            reference: args.reference.display().to_string(),
            candidate: args.candidate.display().to_string(),
            runtime: args
                .runtime
                .runtime
                .to_possible_value()
                .map(|value| value.get_name().to_owned())
                .unwrap_or_default(),
            input,
            images: findings.images,
            passed: outputs.iter().flat_map(|output| &output.checks).all(|check| check.passed),
            outputs,
            extra_outputs: findings.extra.clone(),
            accuracy: accuracy.map(|accuracy| AccuracyReport {
                output: accuracy.output.clone(),
                reference: accuracy.reference.into(),
                candidate: accuracy.candidate.into(),
                drop: accuracy.drop(),
            }),
        })
    }

    /// The report for people to read.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let header = [
            ("reference", &self.reference),
            ("candidate", &self.candidate),
            ("runtime", &self.runtime),
            ("input", &self.input),
        ];
        for (label, value) in header {
            let _ = writeln!(text, "{label:<9}  {value}");
        }
        let mut rows = vec![["output", "max abs", "relative", "cosine", "top-1"].map(str::to_owned).to_vec()];
        rows.extend(self.outputs.iter().map(OutputReport::row));
        let _ = write!(text, "\n{}", table(&rows));
        if let Some(accuracy) = &self.accuracy {
            let _ = writeln!(
                text,
                "\naccuracy of {} on {} images: reference {:.2} %, candidate {:.2} % ({:+.2} points)",
                accuracy.output,
                accuracy.reference.of,
                accuracy.reference.percent,
                accuracy.candidate.percent,
                accuracy.candidate.percent - accuracy.reference.percent
            );
        }
        if !self.extra_outputs.is_empty() {
            let _ = writeln!(text, "\nonly the candidate has the outputs {}", self.extra_outputs.join(", "));
        }
        text.push('\n');
        for output in &self.outputs {
            for check in output.checks.iter().filter(|check| !check.passed) {
                let _ = writeln!(text, "FAILED {} of {}: {}", check.name, output.name, check.detail);
            }
        }
        if self.passed {
            let mut names: Vec<&str> = self.outputs.iter().flat_map(|o| &o.checks).map(|check| check.name).collect();
            names.sort_unstable();
            names.dedup();
            let _ = writeln!(text, "passed: {}", names.join(", "));
        }
        text
    }

    /// The checks as a JUnit file: one case per output and check.
    pub fn junit(&self) -> String {
        let checks = self.outputs.iter().map(|output| output.checks.len()).sum::<usize>();
        let failures = self.outputs.iter().flat_map(|output| &output.checks).filter(|check| !check.passed).count();
        let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        let counts = format!("tests=\"{checks}\" failures=\"{failures}\"");
        let _ = writeln!(text, "<testsuites {counts}>\n  <testsuite name=\"vitrim verify\" {counts}>");
        for output in &self.outputs {
            for check in &output.checks {
                let (class, detail) = (escape(&output.name), escape(&check.detail));
                let _ = write!(text, "    <testcase classname=\"{class}\" name=\"{}\"", check.name);
                let _ = match check.passed {
                    true => writeln!(text, "/>"),
                    false => writeln!(text, "><failure message=\"{detail}\"/></testcase>"),
                };
            }
        }
        text.push_str("  </testsuite>\n</testsuites>\n");
        text
    }
}

impl OutputReport {
    fn new(output: &OutputFinding, tolerances: &Tolerances, accuracy_drop: Option<f64>, labelled: bool) -> Self {
        let comparison = match &output.result {
            Ok(comparison) => comparison,
            Err(reason) => {
                let detail = match reason {
                    Incomparable::Missing => "the candidate has no such output".to_owned(),
                    Incomparable::Shape(mismatch) => mismatch.to_string(),
                };
                let checks = vec![Check { name: "shape", passed: false, detail }];
                return OutputReport { name: output.name.clone(), figures: None, checks };
            }
        };
        let figures = Figures {
            elements: comparison.elements,
            max_abs: comparison.max_abs,
            relative: comparison.relative(),
            min_cosine: comparison.min_cosine,
            non_finite: comparison.non_finite,
            top1_agreement: comparison.top1.map(Share::from),
        };
        let mut checks = vec![
            Check { name: "shape", passed: true, detail: "equal".to_owned() },
            Check {
                name: "finite",
                passed: figures.non_finite == 0,
                detail: format!("{} of {} values are not finite", figures.non_finite, figures.elements),
            },
        ];
        let mut at_most = |name, limit: Option<f64>, value: f64| {
            if let Some(limit) = limit {
                let passed = value <= limit;
                let relation = if passed { "is at most" } else { "exceeds" };
                checks.push(Check { name, passed, detail: format!("{value:.3e} {relation} {limit:e}") });
            }
        };
        at_most("atol", tolerances.atol, figures.max_abs);
        at_most("rtol", tolerances.rtol, figures.relative);
        // With labels, accuracy is what may drop; agreement is judged where there are none.
        let drop = match labelled {
            true => accuracy_drop,
            false => comparison.top1.map(|agreement| 100.0 - agreement.percent()),
        };
        if let Some(drop) = drop {
            at_most("max-top1-drop", tolerances.max_top1_drop, drop);
        }
        if let Some(limit) = tolerances.min_cosine {
            let passed = figures.min_cosine >= limit;
            let relation = if passed { "is at least" } else { "is below" };
            checks.push(Check {
                name: "min-cosine",
                passed,
                detail: format!("{:.8} {relation} {limit}", figures.min_cosine),
            });
        }
        OutputReport { name: output.name.clone(), figures: Some(figures), checks }
    }

    fn row(&self) -> Vec<String> {
        let mut row = vec![self.name.clone()];
        if let Some(figures) = &self.figures {
            row.push(format!("{:.3e}", figures.max_abs));
            row.push(format!("{:.3e}", figures.relative));
            row.push(format!("{:.8}", figures.min_cosine));
            row.extend(figures.top1_agreement.map(|share| format!("{:.2} %", share.percent)));
        } else {
            row.push("cannot be compared".to_owned());
        }
        row
    }
}

/// Text as an XML attribute; characters that XML forbids are replaced.
fn escape(text: &str) -> String {
    text.chars().fold(String::new(), |mut escaped, character| {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' | '\t' | '\r' => escaped.push(' '),
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
        escaped
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;
    use crate::tensor::compare::{Comparison, ShapeMismatch};
    use crate::verify::Accuracy;

    fn args(tolerances: Tolerances) -> VerifyArgs {
        VerifyArgs {
            reference: "a.onnx".into(),
            candidate: "b.onnx".into(),
            batch: None,
            scores: None,
            json: false,
            junit: None,
            tolerances,
            feeds: Default::default(),
            runtime: Default::default(),
        }
    }

    fn findings(reference: &[f32], candidate: &[f32]) -> Findings {
        let tensor = |values: &[f32]| Tensor::from_vec(&[1, values.len()], values.to_vec()).unwrap();
        let result = Ok(Comparison::of(&tensor(reference), &tensor(candidate)).unwrap());
        Findings { outputs: vec![OutputFinding { name: "a<b".into(), result }], images: 1, ..Findings::default() }
    }

    fn report(tolerances: Tolerances, findings: &Findings) -> Report {
        Report::new(&args(tolerances), findings, "noise".into()).unwrap()
    }

    #[test]
    fn nothing_is_judged_without_a_tolerance() {
        let report = report(Tolerances::default(), &findings(&[1.0, 2.0], &[9.0, -3.0]));
        assert!(report.passed);
        assert_eq!(report.outputs[0].checks.len(), 2);
    }

    #[test]
    fn each_tolerance_is_a_check_of_its_own() {
        let found = findings(&[1.0, 2.0], &[1.5, 2.0]);
        let loose = Tolerances { atol: Some(0.5), rtol: Some(0.25), min_cosine: Some(0.9), max_top1_drop: Some(0.0) };
        let report_loose = report(loose, &found);
        assert!(report_loose.passed, "{report_loose:?}");
        assert_eq!(report_loose.outputs[0].checks.len(), 6);
        for tight in [
            Tolerances { atol: Some(0.49), ..loose },
            Tolerances { rtol: Some(0.24), ..loose },
            Tolerances { min_cosine: Some(0.99), ..loose },
            Tolerances { atol: Some(f64::NAN), ..loose },
        ] {
            let report = report(tight, &found);
            let failed = report.outputs[0].checks.iter().filter(|check| !check.passed).count();
            assert_eq!((report.passed, failed), (false, 1), "{tight:?}");
        }
    }

    #[test]
    fn values_that_are_not_finite_always_fail() {
        assert!(!report(Tolerances::default(), &findings(&[1.0, 2.0], &[1.0, f32::NAN])).passed);
    }

    #[test]
    fn shapes_and_missing_outputs_always_fail() {
        let mut found = findings(&[1.0], &[1.0]);
        found.outputs[0].result = Err(Incomparable::Shape(ShapeMismatch { reference: vec![1], candidate: vec![2] }));
        assert!(!report(Tolerances { max_top1_drop: Some(1.0), ..Tolerances::default() }, &found).passed);
        found.outputs[0].result = Err(Incomparable::Missing);
        let report = report(Tolerances::default(), &found);
        assert!(report.text().contains("FAILED shape of a<b: the candidate has no such output"));
    }

    #[test]
    fn labels_turn_the_drop_into_accuracy() {
        let mut found = findings(&[1.0, 2.0], &[2.0, 1.0]);
        let tolerances = Tolerances { max_top1_drop: Some(5.0), ..Tolerances::default() };
        assert!(!report(tolerances, &found).passed);
        let ratio = |hits| Ratio { hits, of: 100 };
        found.accuracy = Some(Accuracy { output: "a<b".into(), reference: ratio(90), candidate: ratio(86) });
        assert!(report(tolerances, &found).passed);
        found.accuracy = Some(Accuracy { output: "a<b".into(), reference: ratio(90), candidate: ratio(84) });
        assert!(!report(tolerances, &found).passed);
        let text = report(tolerances, &found).text();
        assert!(text.contains("reference 90.00 %, candidate 84.00 % (-6.00 points)"), "{text}");
    }

    #[test]
    fn a_drop_without_scores_is_refused() {
        let found = findings(&[1.0], &[1.0]);
        let tolerances = Tolerances { max_top1_drop: Some(1.0), ..Tolerances::default() };
        assert!(Report::new(&args(tolerances), &found, String::new()).is_err());
    }

    #[test]
    fn junit_is_escaped_and_counted() {
        let tolerances = Tolerances { atol: Some(0.1), ..Tolerances::default() };
        let junit = report(tolerances, &findings(&[1.0, 2.0], &[9.0, 2.0])).junit();
        assert!(junit.contains("<testsuite name=\"vitrim verify\" tests=\"3\" failures=\"1\">"), "{junit}");
        assert!(junit.contains("<testcase classname=\"a&lt;b\" name=\"shape\"/>"), "{junit}");
        assert!(junit.contains("name=\"atol\"><failure message=\"8.000e0 exceeds 1e-1\"/>"), "{junit}");
    }

    #[test]
    fn json_has_a_version() {
        let json = serde_json::to_value(report(Tolerances::default(), &findings(&[0.0, 0.0], &[1.0, 0.0]))).unwrap();
        assert_eq!(json["schema_version"], 1);
        assert_eq!(json["outputs"][0]["figures"]["relative"], serde_json::Value::Null);
        assert_eq!(json["outputs"][0]["figures"]["top1_agreement"]["of"], 1);
    }
}
