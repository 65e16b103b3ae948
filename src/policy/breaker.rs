//! Whether a backend may be asked: its health, its cooling, its key.
//!
//! Counts and state share one atomic word, so that every change of state has exactly one author. Requests and checks
//! each have a count of failures in a row: a check that succeeds says nothing about the requests that fail. Only
//! checks bring a backend back; [`crate::server::probe`] makes them. Providers count by model, so a backend cools for one model at a time.

use crate::policy::balance::SLOW_START;
use crate::policy::sync::{AtomicU64, AtomicUsize, Mutex, Ordering};
use crate::time::{Nanos, SECOND};

/// How long a refused key keeps a backend out.
pub(crate) const BAD_KEY: Nanos = 60 * SECOND;

/// What a backend is at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Asked to wait until then.
    Cooling(Nanos),
    /// Out after too many failures in a row.
    Ejected,
    /// May be asked.
    Healthy,
    /// It refuses the key that Zap sends.
    Misconfigured,
}

/// What an active check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// 2xx, 404, 405, 429: it answers.
    Alive,
    /// 401 or 403: it does not take the key.
    BadKey,
    /// 5xx, another answer, no connection or none in time.
    Failed,
}

impl Probe {
    /// Reads an answer's status code. `keyless`: the backend is asked with its clients' keys, of which a probe has
    /// none, so that a demand for one only shows that it lives.
    pub fn of_status(status: u16, keyless: bool) -> Self {
        match status {
            200..=299 | 404 | 405 | 429 => Probe::Alive,
            401 | 403 if keyless => Probe::Alive,
            401 | 403 => Probe::BadKey,
            _ => Probe::Failed,
        }
    }
}

/// Failures and successes in a row that change the state, and how fast it may change back.
#[derive(Clone, Copy, Debug)]
pub struct Thresholds {
    /// Time between two checks. A backend comes back once in two of them at most, so that one that flaps changes its
    /// state no more than once in each.
    pub interval: Nanos,
    /// Failures in a row, of requests or of checks, that take a backend out.
    pub failures: u32,
    /// Successful probes that take it back.
    pub successes: u32,
}

/// A change of state: the author of one logs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is out.
    Down,
    /// Its key is refused.
    Misconfigured,
    /// It is back.
    Up,
}

/// A backend's state, shared by all workers.
#[derive(Debug)]
pub struct Breaker {
    word: AtomicU64,
    cooling: Cooling,
    bad_key_until: AtomicU64,
    /// Last success of real traffic; 0: none yet.
    last_success: AtomicU64,
    up_since: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Up = 0,
    Ejected = 1,
    Misconfigured = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word {
    state: Health,
    /// Requests that failed in a row.
    failures: u32,
    /// Checks that failed in a row.
    failed_checks: u32,
    /// Checks that succeeded in a row while it is not up.
    successes: u32,
}

/// Most that a count of a [`Word`] holds.
const MAX_COUNT: u32 = 0xFFFF;

impl Word {
    fn unpack(word: u64) -> Self {
        let state = match word & 3 {
            1 => Health::Ejected,
            2 => Health::Misconfigured,
            _ => Health::Up,
        };
        let count = |at: u32| (word >> at) as u32 & MAX_COUNT;
        Word { state, failures: count(2), failed_checks: count(18), successes: count(34) }
    }

    fn pack(self) -> u64 {
        let Word { state, failures, failed_checks, successes } = self;
        state as u64 | u64::from(failures) << 2 | u64::from(failed_checks) << 18 | u64::from(successes) << 34
    }

    /// One more failure in a row: out where one of the counts has reached its limit.
    fn judged(self, limits: Thresholds) -> Self {
        let is_out = self.failures.max(self.failed_checks) >= limits.failures;
        let state = if self.state == Health::Up && is_out { Health::Ejected } else { self.state };
        Word { state, successes: 0, ..self }
    }

    /// Just come into `state`.
    fn entered(state: Health) -> Self {
        Word { state, failures: 0, failed_checks: 0, successes: 0 }
    }
}

impl Default for Breaker {
    fn default() -> Self {
        Breaker::new()
    }
}

impl Breaker {
    /// A backend that nobody has asked yet: it may be.
    pub fn new() -> Self {
        Breaker {
            word: AtomicU64::new(0),
            cooling: Cooling::default(),
            bad_key_until: AtomicU64::new(0),
            last_success: AtomicU64::new(0),
            up_since: AtomicU64::new(0),
        }
    }

    /// The state at `now` for requests of `model`, a hash of the name that it is sent, which is asked for only where it
    /// cools for any.
    pub fn status_for(&self, model: impl FnOnce() -> u64, now: Nanos) -> Status {
        self.status_and(now, || self.cooling.until(model, now))
    }

    /// The state at `now`, cooling where it cools for any model: until the last of them reopens.
    pub fn status(&self, now: Nanos) -> Status {
        self.status_and(now, || self.cooling.latest(now))
    }

    /// Until when it cools for requests of `model`, out or not.
    pub fn cools_until(&self, model: impl FnOnce() -> u64, now: Nanos) -> Option<Nanos> {
        self.cooling.until(model, now)
    }

    fn status_and(&self, now: Nanos, cooling: impl FnOnce() -> Option<Nanos>) -> Status {
        let state = Word::unpack(self.word.load(Ordering::Relaxed)).state;
        if state == Health::Misconfigured || self.bad_key_until.load(Ordering::Relaxed) > now {
            return Status::Misconfigured;
        }
        if state == Health::Ejected {
            return Status::Ejected;
        }
        cooling().map_or(Status::Healthy, Status::Cooling)
    }

    /// Real traffic succeeded.
    pub fn success(&self, now: Nanos) {
        self.last_success.store(now.max(1), Ordering::Relaxed);
        if self.word.load(Ordering::Relaxed) == 0 {
            return;
        }
        self.change(|w| match w.state {
            Health::Up => Word::entered(Health::Up),
            Health::Ejected | Health::Misconfigured => w,
        });
    }

    /// Real traffic failed.
    pub fn failure(&self, limits: Thresholds) -> Option<Change> {
        self.change(|w| Word { failures: (w.failures + 1).min(MAX_COUNT), ..w }.judged(limits))
    }

    /// A probe ended.
    pub fn probed(&self, probe: Probe, limits: Thresholds, now: Nanos) -> Option<Change> {
        let may_return = match self.up_since.load(Ordering::Relaxed) {
            0 => true,
            last => now >= last.saturating_add(2 * limits.interval),
        };
        let change = self.change(|w| match (probe, w.state) {
            (Probe::Alive, Health::Up) => Word { failed_checks: 0, ..w },
            (Probe::Alive, _) if may_return && w.successes + 1 >= limits.successes => {
                Word::entered(Health::Up)
            }
            (Probe::Alive, _) => Word { successes: (w.successes + 1).min(MAX_COUNT), ..w },
            (Probe::BadKey, _) => Word::entered(Health::Misconfigured),
            (Probe::Failed, Health::Misconfigured) => Word::entered(Health::Ejected),
            (Probe::Failed, _) => {
                Word { failed_checks: (w.failed_checks + 1).min(MAX_COUNT), ..w }.judged(limits)
            }
        });
        if change == Some(Change::Up) {
            self.up_since.store(now.max(1), Ordering::Relaxed);
        }
        change
    }

    /// The provider asks to be left alone with `model` until `until`; the later of two wishes counts.
    pub fn cool(&self, model: u64, until: Nanos, now: Nanos) {
        self.cooling.add(model, until, now);
    }

    /// The provider refused Zap's key: out for [`BAD_KEY`]. `true` where that is news.
    pub fn bad_key(&self, now: Nanos) -> bool {
        self.bad_key_until.swap(now + BAD_KEY, Ordering::Relaxed) <= now
    }

    /// Whether real traffic succeeded in the last `span`.
    pub fn succeeded_within(&self, span: Nanos, now: Nanos) -> bool {
        match self.last_success.load(Ordering::Relaxed) {
            0 => false,
            at => at + span > now,
        }
    }

    /// Whether it is neither out nor refused, cooling or not.
    pub fn is_up(&self, now: Nanos) -> bool {
        matches!(self.status(now), Status::Healthy | Status::Cooling(_))
    }

    /// When a key that was refused is tried again, if it is to be.
    pub fn retries_key_at(&self, now: Nanos) -> Option<Nanos> {
        Some(self.bad_key_until.load(Ordering::Relaxed)).filter(|at| *at > now)
    }

    /// How long it has been back; at least the whole slow start where it never was out.
    pub fn up_for(&self, now: Nanos) -> Nanos {
        match self.up_since.load(Ordering::Relaxed) {
            0 => SLOW_START,
            since => now.saturating_sub(since),
        }
    }

    fn change(&self, step: impl Fn(Word) -> Word) -> Option<Change> {
        let next = |word| Some(step(Word::unpack(word)).pack());
        let before = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).unwrap_or_default();
        let (before, after) = (Word::unpack(before), step(Word::unpack(before)));
        match (before.state, after.state) {
            (old, new) if old == new => None,
            (_, Health::Up) => Some(Change::Up),
            (_, Health::Ejected) => Some(Change::Down),
            (_, Health::Misconfigured) => Some(Change::Misconfigured),
        }
    }
}

/// Models that a provider wants no requests for, and until when.
#[derive(Debug, Default)]
struct Cooling {
    /// Number of entries: nearly always 0, and then the lock is not taken.
    len: AtomicUsize,
    until: Mutex<Vec<(u64, Nanos)>>,
}

/// Models that one backend may cool for at once; beyond it the one that reopens first is forgotten.
const MAX_COOLING_MODELS: usize = 1024;

impl Cooling {
    fn add(&self, model: u64, until: Nanos, now: Nanos) {
        let mut all = self.until.lock();
        all.retain(|entry| entry.1 > now);
        match all.iter_mut().find(|entry| entry.0 == model) {
            Some(entry) => entry.1 = entry.1.max(until),
            None => all.push((model, until)),
        }
        if all.len() > MAX_COOLING_MODELS
            && let Some(first) = (0..all.len()).min_by_key(|i| all[*i].1)
        {
            all.swap_remove(first);
        }
        self.len.store(all.len(), Ordering::Release);
    }

    fn until(&self, model: impl FnOnce() -> u64, now: Nanos) -> Option<Nanos> {
        if self.len.load(Ordering::Acquire) == 0 {
            return None;
        }
        let model = model();
        self.find(now, |entry| entry.0 == model)
    }

    fn latest(&self, now: Nanos) -> Option<Nanos> {
        self.find(now, |_| true)
    }

    fn find(&self, now: Nanos, wanted: impl Fn(&(u64, Nanos)) -> bool) -> Option<Nanos> {
        if self.len.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut all = self.until.lock();
        if all.iter().all(|entry| entry.1 <= now) {
            // So that the next look need not take the lock.
            all.clear();
            self.len.store(0, Ordering::Release);
        }
        all.iter().filter(|entry| entry.1 > now && wanted(entry)).map(|entry| entry.1).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Thresholds = Thresholds { interval: 0, failures: 3, successes: 2 };

    #[test]
    fn three_failures_in_a_row_take_it_out() {
        let b = Breaker::new();
        assert_eq!((b.failure(LIMITS), b.failure(LIMITS)), (None, None));
        b.success(1);
        assert_eq!((b.failure(LIMITS), b.failure(LIMITS)), (None, None));
        assert_eq!(b.status(2), Status::Healthy);
        assert_eq!(b.failure(LIMITS), Some(Change::Down));
        assert_eq!(b.failure(LIMITS), None, "one change has one author");
        assert_eq!(b.status(2), Status::Ejected);
    }

    #[test]
    fn one_that_flaps_changes_its_state_once_an_interval_at_most() {
        let limits = Thresholds { interval: 10 * SECOND, failures: 1, successes: 1 };
        let b = Breaker::new();
        let changes = (0..1000u64)
            .filter(|second| {
                let now = (second + 1) * SECOND;
                let traffic = b.failure(limits).is_some();
                // Far more probes than there would be.
                traffic | b.probed(Probe::Alive, limits, now).is_some()
            })
            .count();
        assert!((90..=101).contains(&changes), "{changes} in 100 intervals");
        let first = Breaker::new();
        first.failure(limits);
        assert_eq!(
            first.probed(Probe::Alive, limits, 1),
            Some(Change::Up),
            "one that never flapped need not wait"
        );
    }

    #[test]
    fn only_probes_bring_it_back_and_a_failure_starts_anew() {
        let b = Breaker::new();
        (0..3).for_each(|_| {
            b.failure(LIMITS);
        });
        b.success(5);
        assert_eq!(b.status(6), Status::Ejected);
        assert_eq!(b.probed(Probe::Alive, LIMITS, 7), None);
        assert_eq!(b.probed(Probe::Failed, LIMITS, 8), None);
        assert_eq!(b.probed(Probe::Alive, LIMITS, 9), None);
        assert_eq!(b.probed(Probe::Alive, LIMITS, 10), Some(Change::Up));
        assert_eq!((b.status(11), b.up_for(15)), (Status::Healthy, 5));
        assert_eq!((b.failure(LIMITS), b.failure(LIMITS)), (None, None), "the streak began anew");
    }

    #[test]
    fn checks_and_requests_are_counted_apart() {
        let b = Breaker::new();
        b.failure(LIMITS);
        b.failure(LIMITS);
        b.probed(Probe::Alive, LIMITS, 1);
        b.probed(Probe::Failed, LIMITS, 2);
        b.probed(Probe::Failed, LIMITS, 3);
        assert_eq!(
            b.failure(LIMITS),
            Some(Change::Down),
            "a good check does not clear the failures of requests"
        );
        let b = Breaker::new();
        b.failure(LIMITS);
        b.failure(LIMITS);
        b.probed(Probe::Failed, LIMITS, 1);
        b.probed(Probe::Failed, LIMITS, 2);
        b.success(3);
        assert_eq!(b.probed(Probe::Failed, LIMITS, 4), None, "a good request clears both");
        assert_eq!((b.failure(LIMITS), b.failure(LIMITS)), (None, None));
        let b = Breaker::new();
        b.probed(Probe::Failed, LIMITS, 1);
        b.probed(Probe::Failed, LIMITS, 2);
        assert_eq!(b.probed(Probe::Alive, LIMITS, 3), None);
        b.probed(Probe::Failed, LIMITS, 4);
        b.probed(Probe::Failed, LIMITS, 5);
        assert_eq!(b.probed(Probe::Failed, LIMITS, 6), Some(Change::Down));
    }

    #[test]
    fn cooling_ends_by_itself_and_the_later_wish_counts() {
        let b = Breaker::new();
        b.cool(7, 100, 1);
        b.cool(7, 50, 1);
        assert_eq!(b.status_for(|| 7, 99), Status::Cooling(100));
        assert!(b.is_up(99));
        assert_eq!(b.status_for(|| 7, 100), Status::Healthy);
    }

    #[test]
    fn a_backend_cools_for_one_model_and_serves_another() {
        let b = Breaker::new();
        b.cool(1, 100, 0);
        b.cool(2, 200, 0);
        assert_eq!((b.status_for(|| 1, 50), b.status_for(|| 3, 50)), (Status::Cooling(100), Status::Healthy));
        assert_eq!(
            (b.status(50), b.status(150), b.status(200)),
            (Status::Cooling(200), Status::Cooling(200), Status::Healthy)
        );
    }

    #[test]
    fn models_without_end_take_memory_with_an_end() {
        let b = Breaker::new();
        (0..10_000).for_each(|model| b.cool(model, 1_000_000 - model, 0));
        assert_eq!(b.cooling.until.lock().len(), MAX_COOLING_MODELS);
        b.cool(5, 2_000_000, 1_000_000);
        assert_eq!(b.cooling.until.lock().len(), 1, "what has reopened is forgotten");
    }

    #[test]
    fn a_refused_key_keeps_it_out_for_a_minute() {
        let b = Breaker::new();
        assert!(b.bad_key(1));
        assert!(!b.bad_key(2), "known already");
        assert_eq!(b.probed(Probe::Alive, LIMITS, 3), None);
        assert_eq!((b.retries_key_at(3), b.retries_key_at(BAD_KEY + 2)), (Some(BAD_KEY + 2), None));
        assert_eq!(b.status(BAD_KEY + 1), Status::Misconfigured);
        assert_eq!(b.status(BAD_KEY + 2), Status::Healthy);
    }

    #[test]
    fn a_probe_that_sees_its_key_refused_says_so_until_it_is_taken() {
        let b = Breaker::new();
        assert_eq!(b.probed(Probe::BadKey, LIMITS, 1), Some(Change::Misconfigured));
        assert_eq!(b.probed(Probe::BadKey, LIMITS, 2), None);
        assert_eq!(b.status(u64::MAX), Status::Misconfigured);
        assert_eq!(b.probed(Probe::Failed, LIMITS, 3), Some(Change::Down));
        b.probed(Probe::Alive, LIMITS, 4);
        assert_eq!(b.probed(Probe::Alive, LIMITS, 5), Some(Change::Up));
    }

    #[test]
    fn knows_whether_traffic_made_a_probe_needless() {
        let b = Breaker::new();
        assert!(!b.succeeded_within(10, 5));
        b.success(0);
        assert!(b.succeeded_within(10, 5));
        assert!(!b.succeeded_within(10, 11));
    }

    #[test]
    fn reads_a_probe_by_its_status() {
        for (status, want) in [
            (200, Probe::Alive),
            (204, Probe::Alive),
            (404, Probe::Alive),
            (405, Probe::Alive),
            (429, Probe::Alive),
            (401, Probe::BadKey),
            (403, Probe::BadKey),
            (301, Probe::Failed),
            (400, Probe::Failed),
            (500, Probe::Failed),
            (503, Probe::Failed),
        ] {
            assert_eq!(Probe::of_status(status, false), want, "{status}");
        }
        assert_eq!(Probe::of_status(401, true), Probe::Alive);
    }
}
