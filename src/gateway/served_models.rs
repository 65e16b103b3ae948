//! The models that backends without `models` say they serve.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

/// The names of one backend.
type Names = Arc<[Box<str>]>;

/// The last list of each backend, by the id of its state. A backend that fails keeps its list.
#[derive(Debug, Default)]
pub(crate) struct ServedModels {
    lists: Mutex<HashMap<u64, Names>>,
    /// Grows with each change, so that a cache of the lists knows when it is old.
    version: AtomicU64,
}

impl ServedModels {
    /// The number of changes so far.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The names of a backend.
    pub(crate) fn of(&self, id: u64) -> Option<Names> {
        self.lists.lock().get(&id).cloned()
    }

    /// Replaces the list of a backend.
    pub(crate) fn set(&self, id: u64, names: Vec<Box<str>>) {
        let mut lists = self.lists.lock();
        if lists.get(&id).is_none_or(|known| **known != *names) {
            lists.insert(id, names.into());
            self.version.fetch_add(1, Ordering::Release);
        }
    }

    /// Drops the lists of all other backends.
    pub(crate) fn keep(&self, is_asked: impl Fn(u64) -> bool) {
        let mut lists = self.lists.lock();
        let before = lists.len();
        lists.retain(|id, _| is_asked(*id));
        if lists.len() < before {
            self.version.fetch_add(1, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_change_counts_as_a_new_version() {
        let served = ServedModels::default();
        let names = || vec!["a".into(), "b".into()];
        served.set(1, names());
        served.set(1, names());
        assert_eq!((served.version(), served.of(1).unwrap().len()), (1, 2));
        served.set(2, names());
        served.keep(|_| true);
        assert_eq!(served.version(), 2);
        served.keep(|id| id == 2);
        assert_eq!((served.version(), served.of(1), served.of(2).is_some()), (3, None, true));
    }
}
