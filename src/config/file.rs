//! The configuration file: read as a whole, with a limit, as UTF-8.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::config::fault_sink::{Faults, LoadError};

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
