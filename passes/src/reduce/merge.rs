//! Merging at a cut: `TokenMerge`.

use vitrim_ir::Tensor;
use vitrim_ops::{TokenMerge, TokenMergeDynamic};

use super::grouping::{Grouping, Others};
use super::{Method, Metric, R_INPUT, Rewriter, Stream};
use crate::Refusal;
use crate::recognise::Window;

impl Rewriter<'_> {
    /// Merges the `r` most similar pairs, as the given method says.
    pub(super) fn merge(&mut self, stream: &mut Stream, method: usize, r: usize) -> Result<(), Refusal> {
        let Method::Merge(merge) = &self.options.methods[method] else { return Ok(()) };
        let (x, stage, hint) = (stream.value, stream.stage, stream.hint.clone());
        let metric = match merge.metric {
            Metric::Hidden => Window::of_all(x, stream.channels(self)?),
            chosen => {
                // Attention knows the tokens as they were before other acts of the block.
                let of_attention = self.stages.of_block(stream.block);
                let metric = self.metric(stream.block, chosen, &hint)?;
                let value = self.rows_at(metric.value, of_attention, stage, &format!("{hint}/metric"));
                Window { value, ..metric }
            }
        };
        let size = self.sizes(stage, x);
        let (protect, suffix) = (merge.protect.unwrap_or(self.vit.special.prefix()), self.stages.suffix(stage));
        let common = [
            ("protect", protect as i64),
            ("suffix", suffix as i64),
            ("heads", metric.heads),
            ("head_dim", metric.head_dim),
            ("metric_at", metric.at),
            ("dtype", stream.dtype.code().into()),
        ];
        let name = format!("{hint}/merge");
        let runtime = merge.runtime;
        let results = match self.stages.count(stage).and_then(|tokens| tokens.as_known()).filter(|_| self.counted) {
            Some(tokens) => {
                let attributes = [&[("r", r as i64), ("tokens", tokens)], &common[..]].concat();
                self.vitrim(&TokenMerge, &name, &[x, metric.value, size], &attributes, 5)
            }
            None => {
                let r = if runtime {
                    let r = self.input(R_INPUT, Tensor::i64(r as i64))?;
                    self.with_axes("Unsqueeze", r, &[0], &format!("{hint}/r"))
                } else {
                    self.ints(&format!("{hint}/r"), &[r as i64])
                };
                let results = self.vitrim(&TokenMergeDynamic, &name, &[x, metric.value, size, r], &common, 5);
                self.declare_reduced([results[0], results[1]], stream);
                results
            }
        };
        let others = Others::Merged { leaving: results[3], into: results[4] };
        stream.value = results[0];
        stream.stage += 1;
        let after = self.stages.entry_mut(stream.stage);
        after.size = Some(results[1]);
        after.grouping = Some(Grouping { anchor: results[2], others });
        Ok(())
    }
}
