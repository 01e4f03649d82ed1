//! Which files a model may refer to.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Why a model may not have the external file that it asks for.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementError {
    /// The location is the empty string.
    #[error("the model names an external file with an empty location")]
    Empty,
    /// The location cannot be a relative path inside a folder on every system.
    #[error("external file {location:?} is refused: its location {reason}")]
    Location {
        /// The location, as the model has it.
        location: String,
        /// What is wrong with it, as the end of a sentence.
        reason: &'static str,
    },
    /// The location leads out of the model's folder by a symbolic link.
    #[error("external file {location:?} is refused: it is {} and thus outside the model's folder", .path.display())]
    Outside {
        /// The location, as the model has it.
        location: String,
        /// The file that it leads to.
        path: PathBuf,
    },
    /// The location is that of a folder, a device or the like.
    #[error("external file {location:?} is refused: it is not a regular file")]
    NotAFile {
        /// The location, as the model has it.
        location: String,
    },
    /// The file or the model's folder cannot be examined; most likely the file is missing.
    #[error("external file {location:?} cannot be found: {source}")]
    Io {
        /// The location, as the model has it.
        location: String,
        /// The system's reason.
        source: io::Error,
    },
}

/// Finds the external file at `location`, as a model's `external_data` has it, of the model file at `model`.
///
/// A location comes with the model and is not to be trusted: reading any file that it names would copy, say, a private
/// key into the output. So the file must lie inside the folder of the model, after all symbolic links. There is one
/// exception: where the model file is itself a symbolic link, the external file may lie in the folder that it leads to,
/// since the caches of model hubs keep all files of a model in one folder and link to them from another.
///
/// Returns the file's canonical path: absolute and without symbolic links.
///
/// # Errors
///
/// See [`ConfinementError`]; each is one sentence that names the location.
pub fn resolve_external(model: &Path, location: &str) -> Result<PathBuf, ConfinementError> {
    if location.is_empty() {
        return Err(ConfinementError::Empty);
    }
    if let Some(reason) = fault(location) {
        return Err(ConfinementError::Location { location: location.to_owned(), reason });
    }

    let io = |source| ConfinementError::Io { location: location.to_owned(), source };
    // What is beside the link, and what is beside the file that it leads to.
    let folder = fs::canonicalize(crate::atomic::folder(model)).map_err(io)?;
    let real_model = fs::canonicalize(model).map_err(io)?;
    let path = fs::canonicalize(folder.join(location)).map_err(io)?;

    if !path.starts_with(&folder) && path.parent() != real_model.parent() {
        return Err(ConfinementError::Outside { location: location.to_owned(), path });
    }
    if !fs::metadata(&path).map_err(io)?.is_file() {
        return Err(ConfinementError::NotAFile { location: location.to_owned() });
    }
    Ok(path)
}

/// What keeps `location` from being a relative path inside a folder. The answer is the same on every system, so that a
/// model is accepted everywhere or nowhere.
fn fault(location: &str) -> Option<&'static str> {
    let separator = ['/', '\\'];
    let drive = matches!(location.as_bytes(), [letter, b':', ..] if letter.is_ascii_alphabetic());
    if location.contains('\0') {
        Some("contains a NUL character")
    } else if location.starts_with(separator) || drive {
        Some("is not relative to the model's folder")
    } else if location.split(separator).any(|part| part == "..") {
        Some("contains `..`")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with a model and, for each path, a file; the canonical path of the folder.
    fn folder_with(files: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        let path = dir.path().canonicalize().unwrap();
        (dir, path)
    }

    #[test]
    fn files_inside_the_folder_are_found() {
        let (_dir, root) = folder_with(&["m/model.onnx", "m/w.bin", "m/sub/w.bin", "m/..w", "m/été"]);
        let model = root.join("m/model.onnx");
        for (location, file) in [
            ("w.bin", "m/w.bin"),
            ("./w.bin", "m/w.bin"),
            ("sub/w.bin", "m/sub/w.bin"),
            ("sub//./w.bin", "m/sub/w.bin"),
            ("..w", "m/..w"),
            ("été", "m/été"),
        ] {
            assert_eq!(resolve_external(&model, location).unwrap(), root.join(file));
        }
    }

    #[test]
    fn locations_that_could_leave_the_folder_are_refused() {
        let (_dir, root) = folder_with(&["m/model.onnx", "m/sub/w", "secret"]);
        let model = root.join("m/model.onnx");
        let absolute = root.join("m/sub/w");
        for (location, reason) in [
            ("", "an empty location"),
            ("w\0", "NUL"),
            (absolute.to_str().unwrap(), "not relative"),
            ("/etc/passwd", "not relative"),
            ("\\\\host\\share\\w", "not relative"),
            ("\\w", "not relative"),
            ("C:\\w", "not relative"),
            ("c:w", "not relative"),
            ("..", "`..`"),
            ("../secret", "`..`"),
            ("sub/../../secret", "`..`"),
            // Harmless, but nothing is lost by refusing it.
            ("sub/../sub/w", "`..`"),
            ("..\\secret", "`..`"),
            ("sub\\..\\..\\secret", "`..`"),
            (".", "not a regular file"),
            ("sub", "not a regular file"),
            ("missing", "cannot be found"),
        ] {
            let message = resolve_external(&model, location).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
            assert!(message.contains(&format!("{location:?}")) || location.is_empty(), "{message}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn symbolic_links_are_followed_before_judging() {
        use std::os::unix::fs::symlink;

        let (_dir, root) = folder_with(&["m/model.onnx", "m/w", "secret", "elsewhere/w"]);
        let model = root.join("m/model.onnx");
        symlink("w", root.join("m/inside")).unwrap();
        symlink("../secret", root.join("m/outside")).unwrap();
        symlink("../elsewhere", root.join("m/folder")).unwrap();
        symlink("m", root.join("alias")).unwrap();

        assert_eq!(resolve_external(&model, "inside").unwrap(), root.join("m/w"));
        assert_eq!(resolve_external(&root.join("alias/model.onnx"), "inside").unwrap(), root.join("m/w"));
        for location in ["outside", "folder/w"] {
            let error = resolve_external(&model, location).unwrap_err();
            assert!(matches!(error, ConfinementError::Outside { .. }), "{error}");
        }
    }

    /// The layout of the Hugging Face cache.
    #[cfg(unix)]
    #[test]
    fn a_linked_model_may_have_files_from_the_folder_it_leads_to() {
        use std::os::unix::fs::symlink;

        let (_dir, root) = folder_with(&["blobs/a1", "blobs/b2", "blobs/sub/c3", "secret", "snapshots/x/README"]);
        let at = |name: &str| root.join("snapshots/x").join(name);
        symlink("../../blobs/a1", at("model.onnx")).unwrap();
        symlink("../../blobs/b2", at("model.onnx_data")).unwrap();
        symlink("../../blobs/sub/c3", at("deeper")).unwrap();
        symlink("../../secret", at("outside")).unwrap();
        fs::write(at("plain.onnx"), "").unwrap();

        assert_eq!(resolve_external(&at("model.onnx"), "model.onnx_data").unwrap(), root.join("blobs/b2"));
        assert_eq!(resolve_external(&at("model.onnx"), "README").unwrap(), at("README"));
        assert!(resolve_external(&at("model.onnx"), "deeper").is_err());
        assert!(resolve_external(&at("model.onnx"), "outside").is_err());
        assert!(resolve_external(&at("plain.onnx"), "model.onnx_data").is_err());
    }
}
