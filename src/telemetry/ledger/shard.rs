//! What one worker has added since the last collection. Adding costs a search by a hash of the labels.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::policy::key_hasher::KeyHasher;
use crate::telemetry::ledger::table::{Amounts, Labels, Table};
use crate::time::Day;

/// Rows of one day, by the hash of their labels.
#[derive(Debug, Default)]
pub(super) struct Shard {
    day: Option<Day>,
    rows: HashMap<u64, Row, BuildHasherDefault<KeyHasher>>,
}

#[derive(Debug)]
struct Row {
    client: Box<str>,
    backend: Box<str>,
    model: Box<str>,
    amounts: Amounts,
}

impl Row {
    fn labels(&self) -> Labels<'_> {
        Labels { client: &self.client, backend: &self.backend, model: &self.model }
    }
}

impl Shard {
    /// Adds to the row of these labels, whose hash is `key`. Returns `false` if the shard must be collected before: it
    /// has rows of another day, or other labels have the same hash.
    pub(super) fn add(&mut self, day: Day, (key, labels): (u64, Labels<'_>), amounts: Amounts) -> bool {
        if self.day != Some(day) {
            if !self.rows.is_empty() {
                return false;
            }
            self.day = Some(day);
        }
        match self.rows.get_mut(&key) {
            Some(row) if row.labels() == labels => row.amounts += amounts,
            Some(_) => return false,
            None => {
                let Labels { client, backend, model } = labels;
                let row =
                    Row { client: client.into(), backend: backend.into(), model: model.into(), amounts };
                self.rows.insert(key, row);
            }
        }
        true
    }

    /// Takes all rows.
    pub(super) fn take(&mut self) -> Table {
        let mut table = Table::default();
        if let Some(day) = self.day {
            self.rows.values().for_each(|row| table.add(day, row.labels(), row.amounts));
        }
        self.rows.clear();
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_day_or_other_labels_with_the_same_hash_need_a_collection() {
        let mut shard = Shard::default();
        let (a, b) = (
            Labels { client: "a", backend: "x", model: "m" },
            Labels { client: "b", backend: "x", model: "m" },
        );
        let one = Amounts { requests: 1, ..Amounts::default() };
        let today = Day::parse("2026-11-25").unwrap();
        assert!(shard.add(today, (1, a), one) && shard.add(today, (1, a), one));
        assert!(!shard.add(today, (1, b), one), "the same hash");
        assert!(!shard.add(today.minus(1), (1, a), one), "another day");
        let rows: Vec<_> =
            shard.take().all().map(|(day, labels, n)| (day, labels.client.to_owned(), n.requests)).collect();
        assert_eq!(rows, [(today, "a".to_owned(), 2)]);
        assert!(shard.add(today.minus(1), (1, b), one), "empty again");
    }
}
