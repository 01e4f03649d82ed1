//! Reading by memory mapping.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use memmap2::Mmap;

use crate::{at, not_a_regular_file};

/// A file mapped read-only.
///
/// Opening reads nothing; pages come in when they are looked at, and the system may drop them again. Clones share the
/// mapping.
///
/// # While the file is mapped
///
/// Nobody may change the file in place. If another process truncates it, touching a page beyond the new end ends this
/// process with SIGBUS; if one overwrites it, the bytes change under their reader. Replacing the file by renaming another
/// one over it, as [`AtomicFile`](crate::AtomicFile) does, is harmless: the mapping keeps the old file.
#[derive(Clone)]
pub struct MappedFile {
    path: PathBuf,
    file: Arc<File>,
    bytes: Bytes,
}

impl MappedFile {
    /// Maps the file at `path`, following symbolic links. An empty file is empty bytes.
    ///
    /// # Errors
    ///
    /// What opening, examining or mapping the file returns, and [`io::ErrorKind::InvalidInput`] if it is not a regular
    /// file; never waits for the other end of a pipe. The message names the path.
    pub fn open(path: &Path) -> io::Result<MappedFile> {
        let mut options = OpenOptions::new();
        options.read(true);
        // Opening a pipe would wait for its writer. Regular files ignore the flag.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, rustix::fs::OFlags::NONBLOCK.bits() as i32);
        let file = options.open(path).map_err(at(path))?;
        let metadata = file.metadata().map_err(at(path))?;
        if !metadata.is_file() {
            return Err(not_a_regular_file(path, metadata.file_type()));
        }

        let bytes = if metadata.len() == 0 {
            Bytes::new()
        } else {
            // SAFETY: the mapping is private to `Bytes`, which hands out shared slices only and unmaps it after the last
            // one is gone. What is left is that another process changes the file meanwhile; no program can rule that
            // out, and the documentation of the type says what happens then.
            let map = unsafe { Mmap::map(&file) }.map_err(at(path))?;
            Bytes::from_owner(map)
        };
        Ok(MappedFile { path: path.to_owned(), file: Arc::new(file), bytes })
    }

    /// The contents. They stay mapped as long as these bytes or any slice of them live, whether or not `self` does.
    pub fn bytes(&self) -> Bytes {
        self.bytes.clone()
    }

    /// The path that the file was opened under.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where in the file `slice` lies, in bytes from its start, if it is part of this very mapping.
    pub(crate) fn offset_of(&self, slice: &[u8]) -> Option<usize> {
        let (map, slice) = (self.bytes.as_ptr_range(), slice.as_ptr_range());
        let inside = map.start <= slice.start && slice.end <= map.end;
        inside.then(|| slice.start.addr() - map.start.addr())
    }

    /// Appends `length` bytes from `offset` on to `target`, by way of `window`, without mapping them in.
    ///
    /// Reading into a small buffer that stays in the cache and writing from there takes two thirds of the time of
    /// `copy_file_range` on ext4, which goes page by page, and half of that of writing from the mapping, which faults
    /// every page in.
    ///
    /// # Errors
    ///
    /// A failure to read or write, or [`io::ErrorKind::UnexpectedEof`] if the file has become shorter: looking at the
    /// missing bytes would end the process.
    pub(crate) fn append_to(
        &self,
        mut target: &File,
        offset: usize,
        length: usize,
        window: &mut Vec<u8>,
    ) -> io::Result<()> {
        window.resize(WINDOW, 0);
        let end = offset + length;
        let mut from = offset;
        while from < end {
            let part = &mut window[..WINDOW.min(end - from)];
            let count = match read_at(&self.file, part, from as u64) {
                Ok(0) => {
                    let message = format!("{}: became shorter while it was read", self.path.display());
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(at(&self.path)(error)),
            };
            target.write_all(&part[..count])?;
            from += count;
        }
        Ok(())
    }
}

/// Bytes that are copied at a time: few enough to stay in the processor's cache.
const WINDOW: usize = 2 << 20;

#[cfg(unix)]
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, offset)
}

/// Without the contents.
impl fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedFile")
            .field("path", &self.path)
            .field("length", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn bytes_outlive_the_file_and_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.onnx");
        fs::write(&path, b"weights").unwrap();

        let map = MappedFile::open(&path).unwrap();
        assert_eq!(map.path(), path);
        let tail = map.bytes().slice(3..);
        drop(map);
        fs::remove_file(&path).unwrap();

        assert_eq!(&tail[..], b"ghts");
    }

    #[test]
    fn an_empty_file_is_empty_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(MappedFile::open(file.path()).unwrap().bytes().is_empty());
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = MappedFile::open(Path::new("/nowhere/model.onnx")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().starts_with("/nowhere/model.onnx: "));
    }

    #[test]
    fn a_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = MappedFile::open(dir.path()).unwrap_err();
        assert_eq!(error.to_string(), format!("{}: is a folder", dir.path().display()));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_pipe_is_refused_without_waiting() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let error = MappedFile::open(&path).unwrap_err();
        assert_eq!(error.to_string(), format!("{}: is not a regular file", path.display()));
    }

    #[test]
    fn offsets_are_those_of_this_mapping() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), [1; 100]).unwrap();
        let map = MappedFile::open(file.path()).unwrap();
        let bytes = map.bytes();

        assert_eq!(map.offset_of(&bytes[40..]), Some(40));
        assert_eq!(map.offset_of(&[1; 100]), None);
        assert_eq!(MappedFile::open(file.path()).unwrap().offset_of(&bytes), None);
    }
}
