//! Taking a file along unchanged.

use std::{
    fs::{self, Metadata},
    io,
    path::Path,
};

use bytes::BufMut;

use crate::{
    AtomicFile, MappedFile, at,
    atomic::{TemporaryName, folder},
    not_a_regular_file,
};

/// Makes `target` a file with the contents of `source`, without moving them through memory: a hard link, or where that
/// is impossible, as between file systems, a copy by the kernel.
///
/// It replaces the file at `target` at once, and creates missing folders of `target`. Nothing happens if both are the
/// same file already. A hard link shares later changes made in place, in both directions; replacing either file, as this
/// function and [`AtomicFile`] do, leaves the other alone.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidInput`] if `source`, or what is at `target`, is not a regular file, and what reading the one
/// or creating the other returns. The message names the path.
pub fn place_beside(source: &Path, target: &Path) -> io::Result<()> {
    // A hard link to a symbolic link would be one to the link.
    let source = &fs::canonicalize(source).map_err(at(source))?;
    let from = fs::metadata(source).map_err(at(source))?;
    if !from.is_file() {
        return Err(not_a_regular_file(source, from.file_type()));
    }
    match fs::metadata(target) {
        Ok(old) if !old.is_file() => return Err(not_a_regular_file(target, old.file_type())),
        Ok(old) if same_file((source, &from), (target, &old)) => return Ok(()),
        _ => fs::create_dir_all(folder(target)).map_err(at(target))?,
    }

    match TemporaryName::claim(target, |path| fs::hard_link(source, path)) {
        Ok((name, ())) => name.rename(target).map_err(at(target)),
        Err(_) => copy(source, target),
    }
}

fn copy(source: &Path, target: &Path) -> io::Result<()> {
    let map = MappedFile::open(source)?;
    let mut file = AtomicFile::create(target)?;
    file.copy_from(&map);
    file.put(map.bytes());
    file.commit()
}

#[cfg(unix)]
fn same_file((_, a): (&Path, &Metadata), (_, b): (&Path, &Metadata)) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file((a, _): (&Path, &Metadata), (b, _): (&Path, &Metadata)) -> bool {
    fs::canonicalize(b).is_ok_and(|b| b == a)
}

#[cfg(test)]
mod tests {
    use tempfile::tempdir;

    use super::*;

    #[test]
    fn the_target_has_the_contents_and_nothing_else_is_there() {
        type Place = fn(&Path, &Path) -> io::Result<()>;
        for place in [place_beside as Place, copy as Place] {
            let dir = tempdir().unwrap();
            let [source, target] = ["w.bin", "out.bin"].map(|name| dir.path().join(name));
            fs::write(&source, "weights").unwrap();
            fs::write(&target, "old").unwrap();

            place(&source, &target).unwrap();

            assert_eq!(fs::read(&target).unwrap(), b"weights");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        }
    }

    #[test]
    fn missing_folders_are_created() {
        let dir = tempdir().unwrap();
        let source = dir.path().join("w.bin");
        fs::write(&source, "weights").unwrap();
        place_beside(&source, &dir.path().join("a/b/w.bin")).unwrap();
        assert_eq!(fs::read(dir.path().join("a/b/w.bin")).unwrap(), b"weights");
    }

    #[cfg(unix)]
    #[test]
    fn it_links_files_and_not_links() {
        use std::os::unix::fs::{MetadataExt, symlink};

        let dir = tempdir().unwrap();
        let [blob, link, target] = ["blob", "link", "target"].map(|name| dir.path().join(name));
        fs::write(&blob, "weights").unwrap();
        symlink(&blob, &link).unwrap();

        place_beside(&link, &target).unwrap();
        assert_eq!(fs::symlink_metadata(&target).unwrap().ino(), fs::metadata(&blob).unwrap().ino());

        // The same file already, by either name.
        place_beside(&blob, &target).unwrap();
        place_beside(&blob, &link).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::metadata(&blob).unwrap().nlink(), 2);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn only_files_are_taken_and_replaced() {
        let dir = tempdir().unwrap();
        let source = dir.path().join("w.bin");
        fs::write(&source, "weights").unwrap();
        let kind = |source: &Path, target: &Path| place_beside(source, target).unwrap_err().kind();
        assert_eq!(kind(dir.path(), &dir.path().join("out")), io::ErrorKind::InvalidInput);
        assert_eq!(kind(&source, dir.path()), io::ErrorKind::InvalidInput);
        assert_eq!(kind(&dir.path().join("missing"), &dir.path().join("out")), io::ErrorKind::NotFound);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
