//! Reading FlatBuffers that nobody vouches for: every offset is checked where it is followed.
//!
//! The format is that of <https://flatbuffers.dev/internals>. A table begins with the distance back to its vtable, which
//! has its own size, that of the table and then, for each field, where it is in the table (0 where it is absent). Strings,
//! vectors and tables are referred to by their distance from the reference.

use std::ops::Range;

/// The bytes are no FlatBuffer, or are cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

type Read<T> = Result<T, Malformed>;

fn array<const N: usize>(bytes: &[u8], at: usize) -> Read<[u8; N]> {
    let part = at.checked_add(N).and_then(|end| bytes.get(at..end));
    part.and_then(|part| part.try_into().ok()).ok_or(Malformed)
}

fn u32_at(bytes: &[u8], at: usize) -> Read<usize> {
    array(bytes, at).map(|four| u32::from_le_bytes(four) as usize)
}

/// What the reference at `at` refers to.
fn follow(bytes: &[u8], at: usize) -> Read<usize> {
    at.checked_add(u32_at(bytes, at)?).ok_or(Malformed)
}

/// A table of a buffer.
#[derive(Clone, Copy)]
pub struct Table<'b> {
    bytes: &'b [u8],
    at: usize,
    vtable: usize,
    /// Size of the vtable.
    size: usize,
}

impl<'b> Table<'b> {
    /// The root of a buffer with that file identifier.
    pub fn root(bytes: &'b [u8], identifier: &[u8; 4]) -> Read<Self> {
        match array::<4>(bytes, 4)? == *identifier {
            true => Self::at(bytes, follow(bytes, 0)?),
            false => Err(Malformed),
        }
    }

    fn at(bytes: &'b [u8], at: usize) -> Read<Self> {
        let back = i32::from_le_bytes(array(bytes, at)?);
        let vtable = i64::try_from(at).ok().and_then(|at| usize::try_from(at - i64::from(back)).ok());
        let vtable = vtable.ok_or(Malformed)?;
        let size = u16::from_le_bytes(array(bytes, vtable)?).into();
        Ok(Self { bytes, at, vtable, size })
    }

    /// Where field `field` is, if it is there.
    fn field(&self, field: usize) -> Read<Option<usize>> {
        let entry = 4 + 2 * field;
        if entry + 2 > self.size {
            return Ok(None);
        }
        let offset = usize::from(u16::from_le_bytes(array(self.bytes, self.vtable + entry)?));
        Ok((offset != 0).then_some(self.at + offset))
    }

    /// The bytes of a number.
    pub fn scalar<const N: usize>(&self, field: usize) -> Read<Option<[u8; N]>> {
        self.field(field)?.map(|at| array(self.bytes, at)).transpose()
    }

    /// A truth value, which is false where it is absent.
    pub fn flag(&self, field: usize) -> Read<bool> {
        Ok(self.scalar::<1>(field)?.is_some_and(|[byte]| byte != 0))
    }

    /// A table in a field.
    pub fn table(&self, field: usize) -> Read<Option<Self>> {
        let Some(at) = self.field(field)? else { return Ok(None) };
        Self::at(self.bytes, follow(self.bytes, at)?).map(Some)
    }

    /// Where the elements of a vector or string are, of `size` bytes each; none where it is absent.
    pub fn vector(&self, field: usize, size: usize) -> Read<Option<Range<usize>>> {
        let Some(at) = self.field(field)? else { return Ok(None) };
        let at = follow(self.bytes, at)?;
        let length = u32_at(self.bytes, at)?.checked_mul(size).ok_or(Malformed)?;
        let end = (at + 4).checked_add(length).filter(|&end| end <= self.bytes.len()).ok_or(Malformed)?;
        Ok(Some(at + 4..end))
    }

    /// The tables of a vector; none where it is absent.
    pub fn tables(&self, field: usize) -> Read<impl Iterator<Item = Read<Self>>> {
        let all = self.vector(field, 4)?.unwrap_or(0..0);
        let bytes = self.bytes;
        Ok(all.step_by(4).map(move |at| Self::at(bytes, follow(bytes, at)?)))
    }
}
