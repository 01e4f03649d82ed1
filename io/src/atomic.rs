//! Writing: streamed, and visible only when complete.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use bytes::{Buf, BufMut, buf::UninitSlice};

use crate::{MappedFile, at, not_a_regular_file};

/// Slices of this many bytes go to the kernel as they are; smaller ones are collected until there are as many.
const BLOCK: usize = 1 << 20;

/// A file that is written as a stream and appears under its name when it is committed, complete or not at all.
///
/// Dropped without [`commit`](Self::commit), it leaves nothing behind. On Linux the bytes have no name before that, so
/// that not even a killed process leaves anything; where the file system cannot do this, a hidden file beside the target
/// holds them.
///
/// The target is always a new file: one that exists is replaced, not written into, so that whoever has it open or
/// mapped, or reaches it by another hard link, keeps the old contents. A symbolic link is replaced itself.
///
/// As a [`BufMut`] it takes a message straight from its encoder. `BufMut` cannot fail, so the first error is kept,
/// everything after it is dropped, and `commit` returns it.
///
/// ```
/// use bytes::{Buf, BufMut};
/// use vitrim_io::{AtomicFile, MappedFile};
///
/// # let folder = tempfile::tempdir()?;
/// # let (input, output) = (folder.path().join("in.onnx"), folder.path().join("out.onnx"));
/// # std::fs::write(&input, "graph and weights")?;
/// let source = MappedFile::open(&input)?;
/// let mut file = AtomicFile::create(&output)?;
/// file.copy_from(&source);
/// file.put_slice(b"another graph");
/// file.put(source.bytes().slice(5..));
/// file.commit()?;
/// # assert_eq!(std::fs::read(&output)?, b"another graph and weights");
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct AtomicFile {
    target: PathBuf,
    file: File,
    /// The file's name until it is committed; `None` if it has none.
    temporary: Option<TemporaryName>,
    /// The last bytes, not yet written to `file`: at most [`BLOCK`].
    buffer: Vec<u8>,
    /// Bytes written to `file`, or dropped since an error.
    flushed: u64,
    error: Option<io::Error>,
    sources: Vec<MappedFile>,
    /// Room for copying from sources.
    window: Vec<u8>,
}

impl AtomicFile {
    /// Starts a file that will be called `target`, in a folder that exists.
    ///
    /// It gets the permissions of the file that it replaces, or else those of any new file (0666 less the umask).
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if `target` is something other than a regular file, and what creating a file in
    /// its folder returns. The message names the path.
    pub fn create(target: &Path) -> io::Result<AtomicFile> {
        Self::create_in(target, Self::unnamed)
    }

    /// [`create`](Self::create), with the way to get a file without a name in a folder.
    fn create_in(target: &Path, unnamed: impl Fn(&Path) -> io::Result<File>) -> io::Result<AtomicFile> {
        if target.file_name().is_none() {
            let message = format!("{:?} does not name a file", target);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let permissions = match fs::metadata(target) {
            Ok(old) if old.is_file() => Some(old.permissions()),
            Ok(old) => return Err(not_a_regular_file(target, old.file_type())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(at(target)(error)),
        };

        // If the reason for a failure is not that the file system has no unnamed files, the second attempt fails for
        // the same reason.
        let (temporary, file) = match unnamed(folder(target)) {
            Ok(file) => (None, file),
            Err(_) => {
                let (name, file) = TemporaryName::claim(target, |path| File::create_new(path)).map_err(at(target))?;
                (Some(name), file)
            }
        };
        if let Some(permissions) = permissions {
            file.set_permissions(permissions).map_err(at(target))?;
        }
        Ok(AtomicFile {
            target: target.to_owned(),
            file,
            temporary,
            buffer: Vec::with_capacity(BLOCK),
            flushed: 0,
            error: None,
            sources: Vec::new(),
            window: Vec::new(),
        })
    }

    #[cfg(target_os = "linux")]
    fn unnamed(folder: &Path) -> io::Result<File> {
        use rustix::fs::{Mode, OFlags, open};

        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        Ok(open(folder, flags, Mode::from_raw_mode(0o666))?.into())
    }

    #[cfg(not(target_os = "linux"))]
    fn unnamed(_: &Path) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Copies what comes from `source` by reading that file: from now on, a slice of at least 1 MiB of its
    /// [`bytes`](MappedFile::bytes) is not looked at in memory. What is written is the same with and without.
    pub fn copy_from(&mut self, source: &MappedFile) {
        self.sources.push(source.clone());
    }

    /// Number of bytes put so far, which is the offset of the next one.
    pub fn position(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    /// Gives the file its name, replacing the file that has it.
    ///
    /// The bytes are with the system then, not necessarily on the disk: after a power failure the file may be
    /// incomplete.
    ///
    /// # Errors
    ///
    /// The first error of any write, or that of naming the file; nothing has changed at the target then. The message
    /// names the path.
    pub fn commit(mut self) -> io::Result<()> {
        self.flush();
        let AtomicFile { target, file, temporary, error, .. } = self;
        match (error, temporary) {
            (Some(error), _) => Err(error),
            (None, Some(name)) => name.rename(&target),
            (None, None) => name_file(&file, &target),
        }
        .map_err(at(&target))
    }

    fn append(&mut self, bytes: &[u8]) {
        if self.buffer.len() + bytes.len() > BLOCK {
            self.flush();
        }
        if bytes.len() < BLOCK {
            self.buffer.extend_from_slice(bytes);
        } else {
            self.write(bytes);
        }
    }

    fn flush(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.write(&buffer);
        buffer.clear();
        self.buffer = buffer;
    }

    /// Writes `bytes`, unless there has been an error.
    fn write(&mut self, bytes: &[u8]) {
        if self.error.is_none() {
            self.error = self.try_write(bytes).err();
        }
        self.flushed += bytes.len() as u64;
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() >= BLOCK {
            let source = self.sources.iter().find_map(|map| Some((map, map.offset_of(bytes)?)));
            if let Some((map, offset)) = source {
                return map.append_to(&self.file, offset, bytes.len(), &mut self.window);
            }
        }
        self.file.write_all(bytes)
    }
}

// SAFETY: `chunk_mut` is never empty and is the spare room of `buffer`, which is where `advance_mut` counts bytes as
// written; both are those of `Vec`.
unsafe impl BufMut for AtomicFile {
    fn remaining_mut(&self) -> usize {
        usize::MAX.saturating_sub(self.position() as usize)
    }

    unsafe fn advance_mut(&mut self, count: usize) {
        // SAFETY: the caller has written `count` bytes to `chunk_mut`, which is that of the buffer.
        unsafe { self.buffer.advance_mut(count) }
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        if self.buffer.len() >= BLOCK {
            self.flush();
        }
        self.buffer.chunk_mut()
    }

    fn put<T: Buf>(&mut self, mut source: T) {
        while source.has_remaining() {
            let chunk = source.chunk();
            self.append(chunk);
            let length = chunk.len();
            source.advance(length);
        }
    }

    fn put_slice(&mut self, bytes: &[u8]) {
        self.append(bytes);
    }

    fn put_bytes(&mut self, value: u8, mut count: usize) {
        while count > 0 {
            if self.buffer.len() >= BLOCK {
                self.flush();
            }
            let now = count.min(BLOCK - self.buffer.len());
            self.buffer.resize(self.buffer.len() + now, value);
            count -= now;
        }
    }
}

impl fmt::Debug for AtomicFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtomicFile")
            .field("target", &self.target)
            .field("position", &self.position())
            .field("error", &self.error)
            .finish_non_exhaustive()
    }
}

/// The folder that `target` is in.
pub(crate) fn folder(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Gives a file that has no name the name `target`.
#[cfg(target_os = "linux")]
fn name_file(file: &File, target: &Path) -> io::Result<()> {
    use std::os::fd::AsRawFd;

    use rustix::fs::{AtFlags, CWD, linkat};

    let number = format!("/proc/self/fd/{}", file.as_raw_fd());
    let link = |path: &Path| match linkat(CWD, &number, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        // Without /proc there is this way, for which older kernels ask for a privilege.
        Err(rustix::io::Errno::NOENT) => linkat(file, "", CWD, path, AtFlags::EMPTY_PATH),
        result => result,
    };
    match link(target) {
        // Linking does not replace; renaming does.
        Err(rustix::io::Errno::EXIST) => {
            let (name, ()) = TemporaryName::claim(target, |path| Ok(link(path)?))?;
            name.rename(target)
        }
        result => Ok(result?),
    }
}

#[cfg(not(target_os = "linux"))]
fn name_file(_: &File, _: &Path) -> io::Result<()> {
    unreachable!("only Linux has files without a name")
}

/// A hidden name in the folder of a target. What has the name is removed when this is dropped.
pub(crate) struct TemporaryName(PathBuf);

impl TemporaryName {
    /// Calls `make` with names beside `target` until it succeeds with one, that is, does not find it taken.
    pub(crate) fn claim<T>(
        target: &Path,
        mut make: impl FnMut(&Path) -> io::Result<T>,
    ) -> io::Result<(TemporaryName, T)> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            // Without the target's own name, which may be as long as a name can be.
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = target.with_file_name(format!(".vitrim-{}-{number}.tmp", process::id()));
            match make(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => return result.map(|made| (TemporaryName(path), made)),
            }
        }
    }

    /// Gives the file the name `target`, replacing the file that has it.
    pub(crate) fn rename(self, target: &Path) -> io::Result<()> {
        fs::rename(&self.0, target)
    }
}

impl Drop for TemporaryName {
    fn drop(&mut self) {
        // After a renaming the name is gone, unless it and the target were links to one file: then renaming does
        // nothing, and the name has to go.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::{env, process::Command};

    use tempfile::tempdir;

    use super::*;

    /// Names of what is in a folder.
    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// `length` bytes in which every part differs from every other.
    fn pattern(length: usize) -> Vec<u8> {
        (0..length.div_ceil(4) as u32).flat_map(u32::to_le_bytes).take(length).collect()
    }

    /// The two ways to hold the bytes before the commit: without a name, and under a hidden one.
    fn both_ways(test: impl Fn(&dyn Fn(&Path) -> io::Result<AtomicFile>)) {
        test(&AtomicFile::create);
        test(&|target| AtomicFile::create_in(target, |_| Err(io::ErrorKind::Unsupported.into())));
    }

    #[test]
    fn nothing_is_there_before_the_commit_and_everything_after() {
        both_ways(|create| {
            let dir = tempdir().unwrap();
            let target = dir.path().join("out.onnx");

            let mut file = create(&target).unwrap();
            file.put_slice(&pattern(3 * BLOCK));
            assert!(!target.exists());
            assert_eq!(file.position(), 3 * BLOCK as u64);
            file.commit().unwrap();

            assert_eq!(fs::read(&target).unwrap(), pattern(3 * BLOCK));
            assert_eq!(names(dir.path()), ["out.onnx"]);
        });
    }

    #[test]
    fn a_dropped_file_leaves_nothing_and_keeps_the_old_one() {
        both_ways(|create| {
            let dir = tempdir().unwrap();
            let target = dir.path().join("out.onnx");
            fs::write(&target, "old").unwrap();

            let mut file = create(&target).unwrap();
            file.put_slice(&pattern(3 * BLOCK));
            drop(file);

            assert_eq!(fs::read(&target).unwrap(), b"old");
            assert_eq!(names(dir.path()), ["out.onnx"]);
        });
    }

    #[test]
    fn every_way_to_put_keeps_the_order() {
        let dir = tempdir().unwrap();
        let target = dir.path().join("out");
        let mut file = AtomicFile::create(&target).unwrap();
        let mut expected = Vec::new();

        for length in [0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3, BLOCK - 4, 7] {
            let bytes = pattern(length);
            for buffer in [&mut expected as &mut dyn Put, &mut file] {
                buffer.everything(&bytes);
            }
            assert_eq!(file.position(), expected.len() as u64);
            assert_eq!(file.remaining_mut(), usize::MAX - expected.len());
        }
        file.commit().unwrap();

        assert!(fs::read(&target).unwrap() == expected);
    }

    /// Puts the same bytes through all methods of [`BufMut`], which is not dyn-compatible.
    trait Put {
        fn everything(&mut self, bytes: &[u8]);
    }

    impl<T: BufMut> Put for T {
        fn everything(&mut self, bytes: &[u8]) {
            self.put_u8(9);
            self.put_slice(bytes);
            self.put_bytes(3, bytes.len());
            let (left, right) = bytes.split_at(bytes.len() / 3);
            self.put(left.chain(right));
            let mut rest = bytes;
            while !rest.is_empty() {
                let chunk = self.chunk_mut();
                let (now, later) = rest.split_at(rest.len().min(chunk.len()));
                chunk[..now.len()].copy_from_slice(now);
                // SAFETY: as many bytes have just been written.
                unsafe { self.advance_mut(now.len()) };
                rest = later;
            }
        }
    }

    #[test]
    fn slices_of_a_source_are_copied_from_the_right_place() {
        let dir = tempdir().unwrap();
        let input = dir.path().join("in");
        let bytes = pattern(5 * BLOCK);
        fs::write(&input, &bytes).unwrap();
        let source = MappedFile::open(&input).unwrap();

        let mut file = AtomicFile::create(&dir.path().join("out")).unwrap();
        file.copy_from(&source);
        file.put_slice(b"head");
        file.put(source.bytes().slice(3 * BLOCK + 1..));
        file.put_slice(b"middle");
        file.put(source.bytes().slice(7..2 * BLOCK));
        file.commit().unwrap();

        let expected = [b"head", &bytes[3 * BLOCK + 1..], b"middle", &bytes[7..2 * BLOCK]].concat();
        assert!(fs::read(dir.path().join("out")).unwrap() == expected);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_source_that_shrinks_is_an_error_and_no_signal() {
        let dir = tempdir().unwrap();
        let input = dir.path().join("in");
        fs::write(&input, pattern(3 * BLOCK)).unwrap();
        let source = MappedFile::open(&input).unwrap();

        let mut file = AtomicFile::create(&dir.path().join("out")).unwrap();
        file.copy_from(&source);
        File::options().write(true).open(&input).unwrap().set_len(BLOCK as u64).unwrap();
        file.put(source.bytes());

        assert_eq!(file.commit().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(names(dir.path()), ["in"]);
    }

    #[test]
    fn the_mapped_input_itself_can_be_replaced() {
        both_ways(|create| {
            let dir = tempdir().unwrap();
            let path = dir.path().join("model.onnx");
            let bytes = pattern(2 * BLOCK);
            fs::write(&path, &bytes).unwrap();
            let source = MappedFile::open(&path).unwrap();

            let mut file = create(&path).unwrap();
            file.copy_from(&source);
            file.put_slice(b"new");
            file.put(source.bytes());
            file.commit().unwrap();

            assert!(source.bytes() == bytes);
            assert!(fs::read(&path).unwrap() == [b"new", &bytes[..]].concat());
            assert_eq!(names(dir.path()), ["model.onnx"]);
        });
    }

    #[cfg(unix)]
    #[test]
    fn permissions_are_those_of_the_old_file_or_of_any_new_one() {
        use std::os::unix::fs::PermissionsExt;

        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        both_ways(|create| {
            let dir = tempdir().unwrap();
            let [plain, target] = ["plain", "target"].map(|name| dir.path().join(name));
            File::create(&plain).unwrap();
            create(&target).unwrap().commit().unwrap();
            assert_eq!(mode(&target), mode(&plain));

            fs::set_permissions(&target, PermissionsExt::from_mode(0o640)).unwrap();
            create(&target).unwrap().commit().unwrap();
            assert_eq!(mode(&target) & 0o777, 0o640);
        });
    }

    #[cfg(unix)]
    #[test]
    fn links_to_the_old_file_keep_it() {
        both_ways(|create| {
            let dir = tempdir().unwrap();
            let [blob, hard, soft] = ["blob", "hard", "soft"].map(|name| dir.path().join(name));
            fs::write(&blob, "old").unwrap();
            fs::hard_link(&blob, &hard).unwrap();
            std::os::unix::fs::symlink(&blob, &soft).unwrap();

            for target in [&hard, &soft] {
                let mut file = create(target).unwrap();
                file.put_slice(b"new");
                file.commit().unwrap();
                assert_eq!(fs::read(target).unwrap(), b"new");
            }
            assert_eq!(fs::read(&blob).unwrap(), b"old");
        });
    }

    #[test]
    fn only_files_are_replaced_and_folders_must_exist() {
        let dir = tempdir().unwrap();
        let kind = |path: &Path| AtomicFile::create(path).unwrap_err().kind();
        assert_eq!(kind(dir.path()), io::ErrorKind::InvalidInput);
        assert_eq!(kind(Path::new("")), io::ErrorKind::InvalidInput);
        assert_eq!(kind(&dir.path().join("missing/out.onnx")), io::ErrorKind::NotFound);
        #[cfg(unix)]
        assert_eq!(kind(Path::new("/dev/null")), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn the_first_error_is_returned_by_commit() {
        let dir = tempdir().unwrap();
        let target = dir.path().join("out.onnx");
        let readable = tempfile::NamedTempFile::new().unwrap();
        // A file opened for reading fails at the first write.
        let mut file = AtomicFile::create_in(&target, |_| File::open(readable.path())).unwrap();
        file.put_slice(&pattern(2 * BLOCK));
        file.put_bytes(0, 3 * BLOCK);
        assert_eq!(file.position(), 5 * BLOCK as u64);

        let error = file.commit().unwrap_err();
        assert!(error.to_string().starts_with(&format!("{}: ", target.display())));
        assert!(names(dir.path()).is_empty());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_killed_writer_leaves_nothing() {
        const FOLDER: &str = "VITRIM_TEST_KILLED_WRITER";
        if let Some(folder) = env::var_os(FOLDER) {
            let mut file = AtomicFile::create(&Path::new(&folder).join("out.onnx")).unwrap();
            file.put_slice(&pattern(3 * BLOCK));
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            unreachable!();
        }

        let dir = tempdir().unwrap();
        let status = Command::new(env::current_exe().unwrap())
            .args(["--exact", "atomic::tests::a_killed_writer_leaves_nothing"])
            .env(FOLDER, dir.path())
            .status()
            .unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
        assert!(names(dir.path()).is_empty());
    }
}
