//! The faults of a configuration file, each with its line.

use std::cell::RefCell;
use std::fmt;
use std::path::PathBuf;

/// All faults of a configuration, in line order; never empty.
///
/// `Display` writes one fault per line: `FILE:LINE: what is wrong; what is allowed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(pub(super) Vec<String>);

/// Why a configuration could not be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// The file exists but cannot be read or has faults.
    Invalid(Faults),
    /// There is no file at this path.
    Missing(PathBuf),
}

/// Collects faults, each with its line.
pub(super) struct Sink<'t> {
    pub(super) text: &'t str,
    label: &'t str,
    /// Offset of each line's first byte; `line_starts[0] == 0`, ascending.
    line_starts: Vec<usize>,
    faults: RefCell<Vec<(usize, String)>>,
}

impl<'t> Sink<'t> {
    /// Creates an empty sink for `text`; messages call it `label`.
    pub(super) fn new(text: &'t str, label: &'t str) -> Self {
        let breaks = text.match_indices('\n').map(|(offset, _)| offset + 1);
        Self {
            text,
            label,
            line_starts: std::iter::once(0).chain(breaks).collect(),
            faults: RefCell::default(),
        }
    }

    /// Records a fault.
    pub(super) fn fault(&self, line: usize, what: impl Into<String>) {
        self.faults.borrow_mut().push((line, what.into()));
    }

    /// Number of faults so far.
    pub(super) fn count(&self) -> usize {
        self.faults.borrow().len()
    }

    /// All faults in line order, as `FILE:LINE: what`.
    pub(super) fn into_messages(self) -> Vec<String> {
        let mut faults = self.faults.into_inner();
        faults.sort_by_key(|(line, _)| *line);
        faults.dedup();
        let label = self.label;
        faults.into_iter().map(|(line, what)| format!("{label}:{line}: {what}")).collect()
    }

    /// Line and column of a byte offset, both counted from 1; columns count characters.
    pub(super) fn position(&self, offset: usize) -> (usize, usize) {
        let line = self.line_starts.partition_point(|start| *start <= offset);
        let start = line.checked_sub(1).and_then(|i| self.line_starts.get(i));
        let before = start.and_then(|start| self.text.get(*start..offset.min(self.text.len())));
        (line.max(1), before.map_or(0, |b| b.chars().count()) + 1)
    }
}

impl Faults {
    /// The faults, one line each: `FILE:LINE: ...`.
    pub fn lines(&self) -> &[String] {
        &self.0
    }

    /// The fault of a file that is no text; `what` follows "the file".
    pub(super) fn of_file(label: &str, line: usize, what: &str) -> Self {
        Self(vec![format!("{label}:{line}: the file {what}")])
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Faults {}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(faults) => faults.fmt(f),
            Self::Missing(path) => write!(f, "no configuration file at {}", path.display()),
        }
    }
}

impl std::error::Error for LoadError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_from_one() {
        let sink = Sink::new("a\nüb\n\nc", "f");
        for (offset, expected) in [
            (0, (1, 1)),
            (1, (1, 2)),
            (2, (2, 1)),
            (3, (2, 1)),
            (4, (2, 2)),
            (6, (3, 1)),
            (7, (4, 1)),
            (8, (4, 2)),
            (99, (4, 2)),
        ] {
            assert_eq!(sink.position(offset), expected, "{offset}");
        }
    }
}
