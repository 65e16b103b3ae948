//! Files: the configuration file, read as a whole, with a limit, as UTF-8; and the files that it names.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::config::common::Context;
use crate::config::fault_sink::{Faults, LoadError};
use crate::config::toml_reader::Section;

/// Largest configuration file, in bytes.
pub(super) const MAX_FILE_BYTES: u64 = 1 << 20;

/// Reads the text of the file at `path`; messages call it `label`.
///
/// # Errors
/// Returns [`LoadError::Missing`] if there is no file, and [`LoadError::Invalid`] if it cannot be read as text.
pub(super) fn read_text(path: &Path, label: &str) -> Result<String, LoadError> {
    let invalid = |line: usize, what: &str| LoadError::Invalid(Faults::of_file(label, line, what));
    let bytes = match read_bounded(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(LoadError::Missing(path.to_owned()));
        }
        Err(error) => {
            let what = format!("cannot be read ({}); must be a readable text file", error.kind());
            return Err(invalid(1, &what));
        }
    };
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(invalid(1, &format!("is too large; must be at most {MAX_FILE_BYTES} bytes")));
    }
    if bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]) {
        let what = "is UTF-16, as PowerShell writes it; must be UTF-8: save it again with that encoding";
        return Err(invalid(1, what));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let before = error.as_bytes().get(..valid).unwrap_or_default();
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        invalid(line, "is not UTF-8 at this line; must be UTF-8 text: save it again with that encoding")
    })
}

/// Reads at most one byte more than [`MAX_FILE_BYTES`], so that the caller can detect a larger file.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether every user of the machine may read the file.
#[cfg(unix)]
pub(super) fn world_readable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o004 != 0)
}

#[cfg(not(unix))]
pub(super) fn world_readable(_: &Path) -> bool {
    false
}

/// Reads `ca_file`: a file that can be opened.
pub(super) fn ca_file(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> Option<PathBuf> {
    let text = t.text("ca_file")?;
    let path = ctx.file(&text);
    match open_regular(&path) {
        Ok(_) => Some(path),
        Err(error) => {
            t.fault_of(&text, &unreadable(&error));
            None
        }
    }
}

/// Reads `path` of `[ledger]`: a file that may not exist yet. Returns `None` if it is not set, or if it is not valid:
/// then a fault is recorded.
pub(super) fn ledger_path(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> Option<PathBuf> {
    let text = t.text("path")?;
    let path = ctx.base.join(&text.value);
    let found = match path.metadata() {
        _ if text.value.is_empty() => "is empty".to_owned(),
        _ if text.value.ends_with('/') => "is a directory".to_owned(),
        Ok(found) if found.is_file() => return Some(path),
        Ok(found) if found.is_dir() => "is a directory".to_owned(),
        Ok(_) => "is not a regular file".to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Some(path),
        // Only the kind is shown: the path could be a misplaced key.
        Err(error) => format!("cannot be used ({})", error.kind()),
    };
    let allowed = "must be the path of a file, relative to the directory of the configuration";
    t.fault_of(&text, &format!("{found}; {allowed}"));
    None
}

/// Opens a regular file. Anything else is refused, since opening or reading it could block forever.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    if !path.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    File::open(path)
}

/// Describes `error` by its kind only: the path could be a misplaced key.
pub(super) fn unreadable(error: &io::Error) -> String {
    let kind = match error.kind() {
        io::ErrorKind::InvalidData => "not text".to_owned(),
        io::ErrorKind::InvalidInput => "not a regular file".to_owned(),
        io::ErrorKind::NotFound => "no such file".to_owned(),
        kind => kind.to_string(),
    };
    format!(
        "cannot be read ({kind}); must be a readable file, \
         relative to the directory of the configuration"
    )
}
