//! The rate limiter: an exact sliding window per key over a sharded map, with exact least-recently-used eviction.
//!
//! A window is the log of the last admissions, so at most N requests pass in any 60 s, in any interleaving of threads:
//! the decision for a key is one step under the lock of its map shard. Beyond `max_keys`, the limiter evicts the key
//! whose last use is the oldest over all shards. Keys that were idle for a whole window are evicted earlier, up to two
//! for each new key, because an empty window is the same as none. A key whose window is in use is not evicted. A key is
//! a 64-bit hash; the limiter knows neither clients nor credentials. The same map serves windows of requests and
//! [windows of tokens](crate::policy::token_window).

use std::collections::VecDeque;
use std::hash::BuildHasherDefault;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_utils::CachePadded;
use dashmap::DashMap;

use crate::policy::key_hasher::KeyHasher;
use crate::policy::use_order::{NONE, Node, Shard};
use crate::time::{Nanos, SECOND};

/// The length of the window.
pub const WINDOW: Nanos = 60 * SECOND;

/// Above this limit, admissions within 60 s / 65536 of each other share one log entry, which expires with its newest
/// admission: the limit still holds in every window, and an admission expires at most 0.9 ms late.
const MAX_LOG: usize = 65_536;
/// The longest time that one log entry covers.
const GRANULE: Nanos = WINDOW / MAX_LOG as u64;

const ORDER_SHARDS: usize = 64;

/// The limiter's decision on one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The request may pass.
    pub admitted: bool,
    /// The limit, in requests a minute.
    pub limit: u32,
    /// Number of requests that would still pass now.
    pub remaining: u32,
    /// Time until one more request will be admitted; 0 if `remaining` is not 0.
    pub reset: Nanos,
}

/// The stamp of an admitted request in the window of a key, by which it can be [taken back](Limiter::refund).
#[derive(Clone, Copy, Debug)]
pub(crate) struct WindowStamp {
    /// The key.
    pub key: u64,
    /// The limit under which the request was admitted.
    pub limit: u32,
    /// The stamp of the admission.
    pub stamp: Nanos,
}

/// A window that a [`Limiter`] tracks for each key.
pub trait KeyWindow: Default {
    /// Whether the window must be kept although its key was idle for a whole [`WINDOW`].
    fn is_in_use(&self) -> bool;
}

/// The log of one key's admissions in the last [`WINDOW`].
#[derive(Debug, Default)]
pub struct Window {
    /// Newest last. `count` is the sum of all `n`.
    log: VecDeque<Admissions>,
    count: u32,
}

/// A log entry: `n` admissions between the times `first` and `last`.
#[derive(Debug)]
struct Admissions {
    first: Nanos,
    last: Nanos,
    n: u32,
}

impl Window {
    /// Decides on one request at `now` under `limit` (at least 1). A refused request is not logged.
    ///
    /// `now` may be a little before that of an earlier call: threads read their clocks before they take the lock.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn check(&mut self, limit: u32, now: Nanos) -> Decision {
        self.check_late(limit, now, 0).0
    }

    /// Decides like [`look`](Self::look), and logs an admitted request at `now + leeway`, because it may reach the
    /// provider up to `leeway` after `now`. Also returns the stamp of the admission, by which it can be
    /// [moved](Self::restamp) or [taken back](Self::refund); 0 if the request was refused.
    pub(crate) fn check_late(&mut self, limit: u32, now: Nanos, leeway: Nanos) -> (Decision, Nanos) {
        self.expire(now);
        let admitted = self.count < limit;
        let stamp = if admitted { self.admit(limit, now + leeway) } else { 0 };
        (self.decision(admitted, limit, now), stamp)
    }

    /// Decides on one request at `now` under `limit` without logging an admission.
    pub(crate) fn look(&mut self, limit: u32, now: Nanos) -> Decision {
        self.expire(now);
        let admitted = self.count < limit;
        self.decision(admitted, limit, now)
    }

    fn decision(&mut self, admitted: bool, limit: u32, now: Nanos) -> Decision {
        let remaining = limit.saturating_sub(self.count);
        let reset = if remaining > 0 { 0 } else { self.opens_in(limit, now) };
        Decision { admitted, limit, remaining, reset }
    }

    /// Returns the time from `now` until one more request would be admitted; 0 if one would be admitted now.
    pub(crate) fn opens_in(&mut self, limit: u32, now: Nanos) -> Nanos {
        self.expire(now);
        // More than one entry must expire first if the limit was lowered.
        let mut over = self.count.saturating_sub(limit.saturating_sub(1));
        for entry in &self.log {
            if over == 0 {
                break;
            }
            if entry.n >= over {
                return (entry.last + WINDOW).saturating_sub(now);
            }
            over -= entry.n;
        }
        0
    }

    /// Moves the admission with the stamp `from` to the time `to`, at which its request was sent. Returns the new
    /// stamp. An admission that has expired meanwhile counts again, because the provider sees the request only now.
    pub(crate) fn restamp(&mut self, limit: u32, from: Nanos, to: Nanos) -> Nanos {
        self.remove(from);
        self.admit(limit, to)
    }

    /// Takes back the admission with this stamp.
    pub(crate) fn refund(&mut self, stamp: Nanos) {
        self.remove(stamp);
    }

    /// Removes the admission with this stamp, unless it has expired. Admissions with equal stamps are interchangeable.
    fn remove(&mut self, stamp: Nanos) {
        let Some(at) = self.log.iter().rposition(|e| e.first <= stamp && stamp <= e.last) else { return };
        let Some(entry) = self.log.get_mut(at) else { return };
        entry.n -= 1;
        self.count -= 1;
        if entry.n == 0 {
            self.log.remove(at);
        }
    }

    fn expire(&mut self, now: Nanos) {
        while let Some(entry) = self.log.front() {
            if entry.last + WINDOW > now {
                break;
            }
            self.count -= entry.n;
            self.log.pop_front();
        }
    }

    /// Logs an admission; returns its stamp.
    fn admit(&mut self, limit: u32, now: Nanos) -> Nanos {
        self.count += 1;
        let latest = self.log.back().map_or(0, |e| e.last);
        // Entries stay in order even if another caller read its clock later and was admitted first.
        let now = now.max(latest);
        match self.log.back_mut() {
            Some(entry) if limit as usize > MAX_LOG && now < entry.first + GRANULE => {
                entry.last = now;
                entry.n += 1;
            }
            _ => self.log.push_back(Admissions { first: now, last: now, n: 1 }),
        }
        now
    }
}

impl KeyWindow for Window {
    fn is_in_use(&self) -> bool {
        false
    }
}

/// The windows of all keys.
#[derive(Debug)]
pub struct Limiter<W = Window> {
    map: DashMap<u64, Tracked<W>, BuildHasherDefault<KeyHasher>>,
    order: Box<[CachePadded<Shard>]>,
    len: AtomicUsize,
    next_sequence: CachePadded<AtomicU64>,
    max_keys: AtomicUsize,
}

#[derive(Debug)]
struct Tracked<W> {
    window: W,
    /// The key's node in its order shard.
    node: u32,
}

impl<W: KeyWindow> Limiter<W> {
    /// Creates a limiter that tracks at most `max_keys` keys (at least 1).
    pub fn new(max_keys: usize) -> Self {
        Limiter {
            map: DashMap::default(),
            order: (0..ORDER_SHARDS).map(|_| CachePadded::new(Shard::new())).collect(),
            len: AtomicUsize::new(0),
            next_sequence: CachePadded::new(AtomicU64::new(0)),
            max_keys: AtomicUsize::new(max_keys.max(1)),
        }
    }

    /// Changes the largest number of tracked keys (at least 1). [`shrink`](Self::shrink) evicts the keys above it.
    pub fn set_max_keys(&self, max_keys: usize) {
        self.max_keys.store(max_keys.max(1), Ordering::Relaxed);
    }

    /// Evicts the keys above the limit, the oldest first. This may take a second for a few million keys.
    pub fn shrink(&self) {
        // An eviction fails if the oldest keys are in use: they become the newest, and the next ones are looked at.
        let mut failures = 0;
        while self.keys() > self.max_keys.load(Ordering::Relaxed) && failures <= self.keys() / ORDER_SHARDS {
            if !self.evict_oldest() {
                failures += 1;
            }
        }
    }

    /// Evicts up to two of the oldest keys if there are too many: keys in use may have been in the way of earlier
    /// evictions.
    pub(crate) fn trim(&self) {
        for _ in 0..2 {
            if self.keys() > self.max_keys.load(Ordering::Relaxed) {
                self.evict_oldest();
            }
        }
    }

    /// Changes the window of `key` at `now`, as one atomic step. Tracks the key if it is new.
    pub(crate) fn update<T>(&self, key: u64, now: Nanos, change: impl FnOnce(&mut W) -> T) -> T {
        let shard = self.shard(key);
        let mut is_new = false;
        let result = {
            let mut slot = self.map.entry(key).or_insert_with(|| {
                is_new = true;
                Tracked { window: W::default(), node: NONE }
            });
            let sequence = self.next_sequence.fetch_add(1, Ordering::Relaxed);
            slot.node = shard.touch(slot.node, key, sequence, now);
            change(&mut slot.window)
        };
        if is_new && self.len.fetch_add(1, Ordering::Relaxed) >= self.max_keys.load(Ordering::Relaxed) {
            self.evict_oldest();
        }
        if is_new {
            self.reap(shard, now);
            self.reap(shard, now);
        }
        result
    }

    /// Changes the window of `key`, as one atomic step; `None` if the key is not tracked. With a time, the change
    /// counts as a use of the key.
    pub(crate) fn update_known<T>(
        &self,
        key: u64,
        now: Option<Nanos>,
        change: impl FnOnce(&mut W) -> T,
    ) -> Option<T> {
        let mut slot = self.map.get_mut(&key)?;
        if let Some(now) = now {
            let sequence = self.next_sequence.fetch_add(1, Ordering::Relaxed);
            slot.node = self.shard(key).touch(slot.node, key, sequence, now);
        }
        Some(change(&mut slot.window))
    }

    /// Returns the number of tracked keys.
    pub fn keys(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    fn shard(&self, key: u64) -> &Shard {
        &self.order[(key >> 32) as usize % ORDER_SHARDS]
    }

    /// Evicts the key whose last use is the oldest over all shards; `false` if none could be evicted.
    fn evict_oldest(&self) -> bool {
        for _ in 0..ORDER_SHARDS {
            let Some(shard) = self.order.iter().min_by_key(|s| s.oldest_sequence()) else {
                return false;
            };
            let Some(node) = shard.oldest() else { return false };
            if self.remove(shard, node) {
                return true;
            }
        }
        false
    }

    /// Evicts the shard's oldest key if it was idle for a whole window.
    fn reap(&self, shard: &Shard, now: Nanos) {
        if let Some(node) = shard.oldest()
            && node.used + WINDOW <= now
        {
            self.remove(shard, node);
        }
    }

    /// Removes a key unless it was used since `seen` was read. A key in use becomes the most recently used instead.
    /// Takes the map's lock first, as `update` does.
    fn remove(&self, shard: &Shard, seen: Node) -> bool {
        let unlink = |_: &u64, slot: &Tracked<W>| {
            if slot.window.is_in_use() {
                shard.renew(slot.node, seen, self.next_sequence.fetch_add(1, Ordering::Relaxed));
                return false;
            }
            shard.unlink(slot.node, seen.sequence)
        };
        let removed = self.map.remove_if(&seen.key, unlink).is_some();
        if removed {
            self.len.fetch_sub(1, Ordering::Relaxed);
        }
        removed
    }
}

impl Limiter {
    /// Decides on one request of `key` at `now` under `limit` (at least 1), as one atomic step.
    pub fn check(&self, key: u64, limit: u32, now: Nanos) -> Decision {
        self.check_stamped(key, limit, now).0
    }

    /// Decides like [`check`](Self::check), and also returns the stamp of the admission, by which it can be
    /// [taken back](Self::refund).
    pub fn check_stamped(&self, key: u64, limit: u32, now: Nanos) -> (Decision, Nanos) {
        self.update(key, now, |window| window.check_late(limit, now, 0))
    }

    /// Decides like [`check`](Self::check), but admits nothing. The call counts as a use of the key.
    pub fn look(&self, key: u64, limit: u32, now: Nanos) -> Decision {
        let free = Decision { admitted: true, limit, remaining: limit, reset: 0 };
        self.update_known(key, Some(now), |window| window.look(limit, now)).unwrap_or(free)
    }

    /// Takes back the admission with this stamp, for a request of `key` that was refused later on.
    pub fn refund(&self, key: u64, stamp: Nanos) {
        self.update_known(key, None, |window| window.refund(stamp));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn admits_exactly_the_limit_in_any_window() {
        let mut w = Window::default();
        for i in 0..3 {
            let d = w.check(3, i * SECOND);
            assert_eq!((d.admitted, d.remaining), (true, 2 - i as u32));
        }
        let refused = Decision { admitted: false, limit: 3, remaining: 0, reset: 57 * SECOND };
        assert_eq!(w.check(3, 3 * SECOND), refused);
        assert!(!w.check(3, WINDOW - 1).admitted);
        assert!(w.check(3, WINDOW).admitted);
        assert!(!w.check(3, WINDOW).admitted);
        assert!(w.check(3, WINDOW + SECOND).admitted);
    }

    #[test]
    fn reset_is_correct_after_the_limit_was_lowered() {
        let mut w = Window::default();
        for i in 0..5 {
            assert!(w.check(5, i * SECOND).admitted);
        }
        let d = w.check(2, 10 * SECOND);
        assert_eq!((d.admitted, d.reset), (false, WINDOW + 3 * SECOND - 10 * SECOND));
        assert!(!w.check(2, WINDOW + 3 * SECOND - 1).admitted);
        assert!(w.check(2, WINDOW + 3 * SECOND).admitted);
    }

    #[test]
    fn an_admission_can_be_moved_to_a_later_time() {
        let mut w = Window::default();
        assert!(w.check(2, 0).admitted && w.check(2, SECOND).admitted);
        assert_eq!(w.restamp(2, 0, 3 * SECOND), 3 * SECOND);
        assert!(!w.check(2, WINDOW).admitted);
        assert_eq!(w.opens_in(2, WINDOW), SECOND);
        assert!(w.check(2, WINDOW + SECOND).admitted && !w.check(2, WINDOW + 3 * SECOND - 1).admitted);
        assert!(w.check(2, WINDOW + 3 * SECOND).admitted);
    }

    #[test]
    fn a_huge_limit_holds_with_a_bounded_log() {
        let limit = 1_000_000;
        let mut w = Window::default();
        let admitted = (0..3_000_000u64).filter(|i| w.check(limit, i * 10_000).admitted).count();
        assert_eq!(admitted, 1_000_000);
        assert!(w.log.len() <= MAX_LOG + 1, "{}", w.log.len());
    }

    #[test]
    fn a_refunded_admission_is_free_again() {
        let l = Limiter::new(10);
        let (first, at) = l.check_stamped(1, 2, 0);
        let (second, later) = l.check_stamped(1, 2, 5);
        assert_eq!((first.admitted, second.admitted, at, later), (true, true, 0, 5));
        l.refund(1, later);
        l.refund(7, later);
        let d = l.check(1, 2, 6);
        assert_eq!((d.admitted, d.remaining, d.reset), (true, 0, WINDOW - 6));
        assert!(!l.check(1, 2, 7).admitted);
    }

    #[test]
    fn a_look_admits_nothing_and_counts_as_a_use() {
        let l = Limiter::new(2);
        let free = Decision { admitted: true, limit: 1, remaining: 1, reset: 0 };
        assert_eq!((l.look(1, 1, 0), l.keys()), (free, 0));
        assert!(l.check(1, 1, 0).admitted && l.check(2, 1, 5).admitted);
        let spent = Decision { admitted: false, remaining: 0, reset: WINDOW - 6, ..free };
        assert_eq!(l.look(1, 1, 6), spent);
        assert!(l.check(3, 1, 7).admitted, "key 2 is evicted: key 1 was looked at later");
        assert_eq!((l.look(1, 1, 8).admitted, l.look(2, 1, 8)), (false, free));
        assert_eq!(l.look(1, 1, WINDOW), free);
        assert!(l.check(1, 1, WINDOW).admitted, "the look admitted nothing");
    }

    #[test]
    fn a_refund_takes_back_its_own_admission_and_no_other() {
        let l = Limiter::new(10);
        let (_, at) = l.check_stamped(1, 2, 0);
        assert!(l.check(1, 2, 5).admitted);
        l.refund(1, at);
        assert!(l.check(1, 2, 6).admitted);
        assert!(!l.check(1, 2, WINDOW + 4).admitted, "the admissions at 5 and 6 are still in the window");
        // If admissions share an entry, the refund takes back one of them.
        let (limit, mut w) = (MAX_LOG as u32 + 1, Window::default());
        let (_, at) = w.check_late(limit, 10, 0);
        (11..20).for_each(|now| assert!(w.check(limit, now).admitted));
        w.refund(at);
        assert_eq!((w.count, w.log.len()), (9, 1));
        assert_eq!((w.restamp(limit, 15, SECOND), w.count, w.log.len()), (SECOND, 9, 2));
    }

    #[test]
    fn keys_do_not_share_a_window() {
        let l = Limiter::new(10);
        assert!(l.check(1, 1, 0).admitted && l.check(2, 1, 0).admitted);
        assert!(!l.check(1, 1, 0).admitted);
    }

    #[test]
    fn evicts_the_least_recently_used_over_all_shards() {
        let l = Limiter::new(100);
        let key = |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        for i in 0..100 {
            assert!(l.check(key(i), 1, i).admitted);
        }
        // A refused request counts as a use: key 0 becomes the newest, key 1 the oldest.
        assert!(!l.check(key(0), 1, 100).admitted);
        assert!(l.check(key(100), 1, 101).admitted);
        assert_eq!(l.keys(), 100);
        assert!(!l.check(key(0), 1, 102).admitted, "key 0 was used and must still be tracked");
        assert!(l.check(key(1), 1, 103).admitted, "key 1 was the oldest and must be evicted");
    }

    #[test]
    fn shrink_evicts_the_oldest_keys_above_a_lower_limit() {
        let l = Limiter::new(1000);
        let key = |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (0..1000).for_each(|i| assert!(l.check(key(i), 1, i).admitted));
        l.set_max_keys(10);
        l.shrink();
        assert_eq!((l.keys(), l.map.len()), (10, 10));
        assert!(!l.check(key(990), 1, 1001).admitted, "the newest keys are still tracked");
        assert!(l.check(key(989), 1, 1002).admitted && l.keys() == 10);
    }

    #[test]
    fn new_keys_evict_idle_keys() {
        let l = Limiter::new(1_000_000);
        let key = |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (0..10_000).for_each(|i| assert!(l.check(key(i), 5, 0).admitted));
        (10_000..20_000).for_each(|i| assert!(l.check(key(i), 5, WINDOW).admitted));
        assert!(l.keys() < 12_000, "{} keys", l.keys());
    }

    #[test]
    fn many_threads_admit_exactly_the_limit_together() {
        let l = Limiter::new(1000);
        let passed: usize = std::thread::scope(|s| {
            let run = |t: u64| (0..2_000).filter(|i| l.check(7, 1_500, t + i).admitted).count();
            let threads: Vec<_> = (0..4).map(|t| s.spawn(move || run(t))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(passed, 1_500);
    }

    #[test]
    fn the_map_stays_in_bounds_with_many_threads_and_keys() {
        let l = Limiter::new(500);
        std::thread::scope(|s| {
            for t in 0..4u64 {
                let l = &l;
                s.spawn(move || {
                    (0..20_000u64).for_each(|i| {
                        l.check((i * 7 + t * 3).wrapping_mul(0x9E37_79B9_7F4A_7C15), 5, i);
                    })
                });
            }
        });
        assert!(l.keys() <= 504, "{}", l.keys());
        assert_eq!(l.keys(), l.map.len());
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_log(limit in 1u32..6, steps in prop::collection::vec(0u64..30, 1..200)) {
            let (mut w, mut log, mut now) = (Window::default(), Vec::<Nanos>::new(), 0);
            for step in steps {
                now += step * SECOND;
                let live = log.iter().filter(|t| **t + WINDOW > now).count() as u32;
                let d = w.check(limit, now);
                prop_assert_eq!(d.admitted, live < limit);
                if d.admitted {
                    log.push(now);
                } else {
                    let at = now + d.reset;
                    let then = |t: Nanos| log.iter().filter(|x| **x + WINDOW > t).count() as u32;
                    prop_assert!(then(at) < limit && then(at - 1) >= limit, "the reset is wrong");
                }
            }
        }
    }
}
