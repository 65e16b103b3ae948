//! The file of a ledger, read as an operator reads it.

use std::path::PathBuf;

/// A file for a ledger; removed when dropped.
pub(crate) struct Ledger(pub PathBuf);

impl Ledger {
    pub(crate) fn new() -> Self {
        let name = format!("zap-ledger-{}-{:x}.db", std::process::id(), fastrand::u64(..));
        Ledger(std::env::temp_dir().join(name))
    }

    /// The `[ledger]` of a configuration.
    pub(crate) fn settings(&self) -> String {
        format!("[ledger]\npath = \"{}\"\n", self.0.display())
    }

    pub(crate) fn open(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(&self.0).unwrap()
    }

    /// The sum of a column over the rows of the client `team`.
    pub(crate) fn sum(&self, column: &str) -> i64 {
        let query = format!("SELECT coalesce(sum({column}), 0) FROM usage WHERE client = 'team'");
        self.open().query_row(&query, [], |row| row.get(0)).unwrap()
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        for end in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(format!("{}{end}", self.0.display()));
        }
    }
}
