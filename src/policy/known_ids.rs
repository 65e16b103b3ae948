//! Which backend made a response, an item or a conversation, and for which client: later requests refer to it by its
//! id, and no other backend has it.
//!
//! The table is bounded: the id that was used longest ago is dropped first, and each after [`KEPT`]. Ids are kept as
//! hashes; a hash with a secret key keeps clients from looking for two ids with the same one.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasherDefault;

use crate::policy::key_hasher::KeyHasher;
use crate::policy::sync::{AtomicUsize, Mutex, Ordering};
use crate::time::{Nanos, SECOND};

/// How long an id is kept after its last use.
pub(crate) const KEPT: Nanos = 3600 * SECOND;

/// What made an id, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Maker {
    /// The id of the backend's state, which survives a reload.
    pub backend: u64,
    /// A hash of the client that it belongs to; 0: to nobody.
    pub client: u64,
}

/// The backend that made what a request refers to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum MadeBy {
    /// The request refers to nothing: any backend can serve it.
    #[default]
    Anybody,
    /// The backend whose state has this id.
    Backend(u64),
    /// Nobody knows: all that can serve the request are asked in turn.
    Unknown,
}

/// The makers of ids, by the hash of the id.
#[derive(Debug)]
pub(crate) struct KnownIds {
    table: Mutex<Table>,
    max: AtomicUsize,
}

type ByHash = HashMap<u64, Known, BuildHasherDefault<KeyHasher>>;

#[derive(Debug, Default)]
struct Table {
    known: ByHash,
    /// The uses of ids, the oldest first. Only the last use of an id counts, so an earlier one is skipped.
    uses: VecDeque<(u64, Nanos)>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    maker: Maker,
    used: Nanos,
}

impl KnownIds {
    /// Creates a table for at most `max` ids.
    pub(crate) fn new(max: usize) -> Self {
        KnownIds { table: Mutex::default(), max: AtomicUsize::new(max) }
    }

    /// Changes the largest number of ids.
    pub(crate) fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Records at `now` that `maker` made the id with this hash. An id that another client has is left to it: ids are
    /// the provider's, and no client takes the id of another one.
    pub(crate) fn learn(&self, id: u64, maker: Maker, now: Nanos) {
        let max = self.max.load(Ordering::Relaxed);
        let mut table = self.table.lock();
        table.drop_old(now);
        let owner = table.known.get(&id).map_or(0, |known| known.maker.client);
        if owner != 0 && owner != maker.client {
            return;
        }
        table.touch(id, maker, now);
        while table.known.len() > max && table.drop_oldest() {}
    }

    /// The maker of the id with this hash, which counts as used at `now`.
    pub(crate) fn find(&self, id: u64, now: Nanos) -> Option<Maker> {
        let mut table = self.table.lock();
        table.drop_old(now);
        let maker = table.known.get(&id)?.maker;
        table.touch(id, maker, now);
        Some(maker)
    }

    /// The number of ids.
    pub(crate) fn len(&self) -> usize {
        self.table.lock().known.len()
    }
}

impl Table {
    fn touch(&mut self, id: u64, maker: Maker, now: Nanos) {
        self.known.insert(id, Known { maker, used: now });
        self.uses.push_back((id, now));
        // An id that is used again and again must not fill the queue.
        if self.uses.len() > 2 * self.known.len() + 16 {
            let known = &self.known;
            self.uses.retain(|(id, used)| known.get(id).is_some_and(|known| known.used == *used));
        }
    }

    /// Drops the ids that were not used for long.
    fn drop_old(&mut self, now: Nanos) {
        while self.uses.front().is_some_and(|(_, used)| used.saturating_add(KEPT) <= now) {
            self.drop_oldest();
        }
    }

    /// Drops the oldest use, and its id if that was not used later. Returns whether there was one.
    fn drop_oldest(&mut self) -> bool {
        let Some((id, used)) = self.uses.pop_front() else { return false };
        if self.known.get(&id).is_some_and(|known| known.used == used) {
            self.known.remove(&id);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maker(backend: u64) -> Maker {
        Maker { backend, client: 1 }
    }

    /// Ids of one table.
    fn all(known: &KnownIds, ids: std::ops::Range<u64>, now: Nanos) -> Vec<u64> {
        ids.filter(|id| known.find(*id, now).is_some()).collect()
    }

    #[test]
    fn the_id_that_was_used_longest_ago_is_dropped_first() {
        let ids = KnownIds::new(3);
        (0..3).for_each(|id| ids.learn(id, maker(id), id));
        assert_eq!(ids.find(0, 10), Some(maker(0)));
        ids.learn(3, maker(3), 11);
        assert_eq!((all(&ids, 0..9, 12), ids.len()), (vec![0, 2, 3], 3));
        ids.set_max(1);
        ids.learn(4, maker(4), 13);
        assert_eq!(all(&ids, 0..9, 14), [4]);
    }

    #[test]
    fn an_id_is_kept_for_an_hour_after_its_last_use() {
        let ids = KnownIds::new(1000);
        (0..2).for_each(|id| ids.learn(id, maker(id), 5));
        assert_eq!(ids.find(1, KEPT + 4), Some(maker(1)));
        assert_eq!((all(&ids, 0..2, KEPT + 5), ids.len()), (vec![1], 1));
        assert_eq!(all(&ids, 0..2, 2 * KEPT + 5), Vec::<u64>::new());
    }

    #[test]
    fn no_client_takes_the_id_of_another_one_and_the_same_client_may_move_its_own() {
        let ids = KnownIds::new(1000);
        ids.learn(7, maker(1), 0);
        ids.learn(7, Maker { backend: 2, client: 2 }, 1);
        assert_eq!(ids.find(7, 2), Some(maker(1)));
        ids.learn(7, maker(3), 3);
        assert_eq!(ids.find(7, 4), Some(maker(3)));
    }

    #[test]
    fn uses_of_few_ids_take_little_memory() {
        let ids = KnownIds::new(1000);
        (0..10_000u64).for_each(|n| ids.learn(n % 3, maker(0), n));
        assert!(ids.table.lock().uses.len() < 50);
        assert_eq!(ids.len(), 3);
    }
}
