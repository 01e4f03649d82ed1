//! Fused operators that passes must understand: which operand and result is what.
//!
//! Attention:
//!
//! | operator | queries, keys, values | their bias | added to scores | masks keys |
//! |---|---|---|---|---|
//! | `Attention` (versions 23, 24) | 0, 1, 2: `[B, N, H·d]` or `[B, H, N, d]` | | 3 | 3 |
//! | `com.microsoft.MultiHeadAttention` | 0: `[B, N, H·d]`; 1, 2: the same or `[B, H, N, d]` | 3 | 5 | 4 |
//! | `com.microsoft.Attention` | 0: `[B, N, D]`, projected by 1: `[D, …]` | 2 | 5 | 3 |
//! | `com.microsoft.QAttention` | the same in 8 bits | 2 | | 5 |

use crate::graph::{Graph, Node};

/// A fused attention operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FusedAttention {
    /// How it is given queries, keys and values.
    pub operands: Operands,
    /// Heads of the queries; `None` where an axis shows them.
    pub heads: Option<usize>,
    /// Heads of keys and values, likewise.
    pub kv_heads: Option<usize>,
    /// Slot of the row that is added to queries, keys and values, in this order.
    pub bias: Option<usize>,
    /// Slot of what is added to the scores: `[B, H, N, M]`.
    pub attention_bias: Option<usize>,
    /// Slot of what masks keys.
    pub mask: Option<usize>,
    /// Why its tokens cannot be regrouped, whatever they are.
    pub obstacle: Option<&'static str>,
}

/// How a fused attention operator is given queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operands {
    /// As operands 0, 1 and 2.
    Apart,
    /// As operand 0, which the operator projects by the matrix in operand 1: columns for queries, keys and values.
    Projected,
    /// As [`Operands::Projected`] in 8 bits: operands 3 and 6 are scale and zero of the tokens, 4 and 7 of the matrix.
    Quantized,
}

/// Where an operator has what.
struct Signature {
    operands: Operands,
    bias: Option<usize>,
    attention_bias: Option<usize>,
    mask: Option<usize>,
    /// Operands and results that only attention with a cache has.
    cache: (&'static [usize], &'static [usize]),
    /// Attributes with the heads of queries, and of keys and values.
    heads: [&'static str; 2],
}

impl Signature {
    const STANDARD: Self = Self {
        operands: Operands::Apart,
        bias: None,
        attention_bias: Some(3),
        mask: None,
        cache: (&[4, 5, 6], &[1, 2]),
        heads: ["q_num_heads", "kv_num_heads"],
    };
    const MULTI_HEAD: Self = Self {
        operands: Operands::Apart,
        bias: Some(3),
        attention_bias: Some(5),
        mask: Some(4),
        cache: (&[6, 7, 8, 9], &[1, 2]),
        heads: ["num_heads"; 2],
    };
    const PROJECTED: Self = Self {
        operands: Operands::Projected,
        bias: Some(2),
        attention_bias: Some(5),
        mask: Some(3),
        cache: (&[4, 6], &[1]),
        heads: ["num_heads"; 2],
    };
    const QUANTIZED: Self = Self {
        operands: Operands::Quantized,
        bias: Some(2),
        attention_bias: None,
        mask: Some(5),
        cache: (&[8], &[1]),
        heads: ["num_heads"; 2],
    };

    /// Why tokens cannot be regrouped in a node with this signature.
    fn obstacle(&self, graph: &Graph, node: &Node) -> Option<&'static str> {
        let flag = |name: &str| node.int(name).unwrap_or(0) != 0;
        let read = |value| !graph.value(value).uses().is_empty() || graph.output_slots(value).next().is_some();
        let wanted = |slot: usize| node.output(slot).is_some_and(read);
        let apart = node.input(1).is_some() && node.input(2).is_some();
        let (past, present) = self.cache;
        if flag("is_causal") || flag("unidirectional") {
            Some("its attention is causal")
        } else if ["left_window_size", "right_window_size"].iter().any(|name| node.int(name).unwrap_or(-1) >= 0) {
            // From version 25 on: which keys a query sees depends on how far they are.
            Some("its attention sees neighbouring tokens only")
        } else if past.iter().any(|&slot| node.input(slot).is_some()) || present.iter().any(|&slot| wanted(slot)) {
            Some("its attention has a cache")
        } else if flag("do_rotary") {
            Some("it rotates queries and keys by the positions of their tokens")
        } else if self.operands == Operands::Apart && !apart {
            Some("its queries, keys and values are interleaved in one operand")
        } else if wanted(3) {
            Some("its scores are read elsewhere")
        } else {
            None
        }
    }
}

impl FusedAttention {
    /// What a node is as a fused attention; `None` if it is none.
    pub fn of(graph: &Graph, node: &Node) -> Option<Self> {
        let (signature, refused) = match (node.op.domain.as_str(), node.op.name.as_str()) {
            ("", "Attention") => (Signature::STANDARD, None),
            ("com.microsoft", "MultiHeadAttention") => (Signature::MULTI_HEAD, None),
            ("com.microsoft", "Attention") => (Signature::PROJECTED, None),
            ("com.microsoft", "QAttention") => (Signature::QUANTIZED, None),
            ("com.microsoft", name) => (Signature::MULTI_HEAD, Some(refused(name)?)),
            _ => return None,
        };
        let count = |name: &str| node.int(name).and_then(|count| usize::try_from(count).ok());
        let [heads, kv_heads] = signature.heads.map(|name| count(name).filter(|&count| count > 0));
        let Signature { operands, bias, attention_bias, mask, .. } = signature;
        let obstacle = refused.or_else(|| signature.obstacle(graph, node));
        Some(Self { operands, heads, kv_heads, bias, attention_bias, mask, obstacle })
    }

    /// The slots of queries, keys and values.
    pub fn slots(&self) -> [usize; 3] {
        if self.operands == Operands::Apart { [0, 1, 2] } else { [0; 3] }
    }
}

/// Attention operators of ONNX Runtime through which tokens are not followed, and why.
fn refused(name: &str) -> Option<&'static str> {
    match name {
        "GroupQueryAttention" | "SparseAttention" => Some("its attention is causal"),
        "PackedAttention" | "PackedMultiHeadAttention" => Some("it has the tokens of all images on one axis"),
        "QOrderedAttention" | "LongformerAttention" => Some("it is a form of attention that vitrim does not know"),
        _ => None,
    }
}

/// An operator of ONNX Runtime that adds operands 0 and 1 and gives the sum and its norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SkipNorm {
    /// The operator that normalises alone. ONNX Runtime has both of them in the standard domain, whatever its version.
    pub norm: &'static str,
    /// Slots of the operands that it shares with that: gain, and shift where there is one.
    pub parameters: &'static [usize],
    /// Slot of a row that is added to the sum.
    pub bias: usize,
}

impl SkipNorm {
    /// The result that is the norm.
    pub const NORM: usize = 0;
    /// The result that is the sum.
    pub const SUM: usize = 3;
    /// `epsilon` where the attribute is left out; the norms alone have another.
    pub const EPSILON: f32 = 1e-12;

    /// What a node is as such an operator; `None` if it is none.
    pub fn of(node: &Node) -> Option<Self> {
        match (node.op.domain.as_str(), node.op.name.as_str()) {
            ("com.microsoft", "SkipLayerNormalization") => {
                Some(Self { norm: "LayerNormalization", parameters: &[2, 3], bias: 4 })
            }
            ("com.microsoft", "SkipSimplifiedLayerNormalization") => {
                Some(Self { norm: "SimplifiedLayerNormalization", parameters: &[2], bias: 3 })
            }
            _ => None,
        }
    }
}
