//! The operators, with the types that they take.
//!
//! ONNX Runtime keeps one schema for each name of the domain and takes it for every version of the domain that a model
//! imports; kernels do not learn which. So an operator that comes to mean something else needs another name: under the
//! old one, this library would run it as it is here.

mod adam_w;
mod attention;
mod connection_mask;
mod gelu_grad;
mod layer_norm_grad;
mod masked_softmax;
mod softmax_grad;
mod token_absorb;
mod token_assign;
mod token_expand;
mod token_mean;
mod token_merge;
mod token_prune;
mod token_restore;
mod token_score;
mod token_similarity;
mod token_size;

use half::{bf16, f16};
use ort::operator::OperatorDomain;
use ort::value::TensorElementType::{self, *};

use vitrim_ops::cpu::Element;

use crate::call::{OnDevice, Typed};
use crate::operator::{Device, Entry};

/// Types of tensors that operators take which look at no element.
const ANY: [TensorElementType; 13] =
    [Float32, Float16, Bfloat16, Float64, Int64, Int32, Int16, Int8, Uint64, Uint32, Uint16, Uint8, Bool];

/// The domain with all operators.
pub fn domain() -> ort::Result<OperatorDomain> {
    let mut entries: Vec<Entry> = Vec::new();
    for device in Device::ALL {
        entries.extend(of_tokens::<f32>(device));
        entries.extend(of_tokens::<f16>(device));
        entries.extend(of_tokens::<bf16>(device));
        entries.push(token_assign::entry(device));
        entries
            .extend(ANY.into_iter().flat_map(|ty| [token_size::entry(device, ty), token_restore::entry(device, ty)]));
    }
    entries.extend(of_expansion::<f32>());
    entries.extend(of_expansion::<f16>());
    entries.extend(of_expansion::<bf16>());
    entries.push(token_expand::entry());
    entries.extend(of_training());
    entries.into_iter().try_fold(OperatorDomain::new("ai.vitrim")?, OperatorDomain::add)
}

/// The operators that compute with tokens, of type `T`.
fn of_tokens<T: OnDevice + Element>(device: Device) -> impl Iterator<Item = Entry> {
    let entries = token_merge::entries::<T>(device).into_iter().chain(attention::entries::<T>(device));
    let entries = entries.chain(token_prune::entries::<T>(device)).chain(connection_mask::entries::<T>(device));
    entries.chain([token_score::entry::<T>(device), token_mean::entry::<T>(device), masked_softmax::entry::<T>(device)])
}

/// The operators of expansion that compute with tokens, of type `T`: on the CPU, as it is in training alone.
fn of_expansion<T: Typed + Element>() -> impl Iterator<Item = Entry> {
    token_similarity::entries::<T>().into_iter().chain([token_absorb::entry::<T>()])
}

/// The operators of training, which are in float32 and on the CPU.
fn of_training() -> impl Iterator<Item = Entry> {
    gelu_grad::entries().into_iter().chain([layer_norm_grad::entry(), softmax_grad::entry(), adam_w::entry()])
}
