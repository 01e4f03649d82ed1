//! Sizes on the CPU.

use crate::cpu::{Error, check_len};

/// Writes one for every token: `size` is `[batch, tokens]`.
///
/// # Errors
/// Where it is not.
pub fn token_size(batch: usize, tokens: usize, size: &mut [f32]) -> Result<(), Error> {
    check_len("size", size.len(), &[batch, tokens])?;
    size.fill(1.0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_one() {
        let mut size = [0.0; 6];
        token_size(2, 3, &mut size).unwrap();
        assert_eq!(size, [1.0; 6]);
        assert!(token_size(2, 4, &mut size).is_err());
        assert!(token_size(usize::MAX, usize::MAX, &mut size).is_err());
        token_size(0, 3, &mut []).unwrap();
    }
}
