//! Identities of nodes and values.
//!
//! An id names one node or value of one [`Graph`](crate::Graph) for ever: ids are handed out in rising order and never
//! reused, so a stale id can be detected but never mistaken for another entity.

use std::fmt;
use std::num::NonZeroU32;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $sigil:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(NonZeroU32);

        impl $name {
            /// The id of the entity in slot `slot` (0-based).
            pub(crate) fn from_slot(slot: usize) -> Self {
                let number = u32::try_from(slot + 1).ok().and_then(NonZeroU32::new);
                Self(number.expect("a graph holds fewer than 2^32 entities: the decoder bounds the file's size"))
            }

            /// The slot (0-based) that this id names.
            pub fn slot(self) -> usize {
                self.0.get() as usize - 1
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($sigil, "{}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self, f)
            }
        }
    };
}

id!(
    /// A node (operator call) of a graph.
    NodeId,
    "n"
);
id!(
    /// A value (tensor) of a graph.
    ValueId,
    "v"
);
