//! The circuit breaker: whether a backend may get requests, by its health, its key, and its pairs.
//!
//! The backend as a whole is judged by its transport and its probes, a [pair](crate::policy::pair) by what the backend
//! answers. Counts and state share one atomic word, so that exactly one caller sees each change of state. Requests and
//! probes have separate counts of failures in a row: a probe that succeeds says nothing about requests that fail. Only
//! probes bring an ejected backend back; [`crate::server::probe`] sends them. A backend without probes is tried by one
//! real request after 1 s, 2 s, 4 s and so on, and comes back with the first answer.

use crate::policy::balance::SLOW_START;
use crate::policy::gate::{Passage, trial_wait};
use crate::policy::pair::Pairs;
pub use crate::policy::pair::Status;
use crate::policy::sync::{AtomicU32, AtomicU64, Ordering};
use crate::time::{Nanos, SECOND};

/// How long a backend that refused Zap's key gets no requests.
pub(crate) const BAD_KEY: Nanos = 60 * SECOND;

/// The result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Any status below 500 but 401 and 403: the backend answers.
    Alive,
    /// 401 or 403: the backend refuses the key.
    BadKey,
    /// Any other status, no connection, or no answer in time.
    Failed,
}

impl Probe {
    /// Judges a probe by the status code of its answer. `keyless`: the backend gets the clients' keys. A probe has
    /// none of them, so a 401 or 403 only shows that the backend is alive.
    pub fn of_status(status: u16, keyless: bool) -> Self {
        match status {
            401 | 403 if keyless => Probe::Alive,
            401 | 403 => Probe::BadKey,
            ..500 => Probe::Alive,
            _ => Probe::Failed,
        }
    }
}

/// Failures and successes in a row that change the state, and how fast the state may change back.
#[derive(Clone, Copy, Debug)]
pub struct Thresholds {
    /// Time between two probes. A backend comes back at most once in two intervals, so a flapping backend changes its
    /// state at most once per interval on average.
    pub interval: Nanos,
    /// Failures in a row, of requests or of probes, that eject a backend.
    pub failures: u32,
    /// Successful probes in a row that bring the backend back.
    pub successes: u32,
}

/// A change of state. The caller that gets it logs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The backend was ejected after as many failures in a row as the threshold.
    Down,
    /// The backend refused Zap's key before, and its last health check failed for another reason.
    StillDown,
    /// The backend refuses Zap's key.
    Misconfigured,
    /// The backend came back.
    Up,
}

/// A backend's state, shared by all workers.
#[derive(Debug)]
pub struct Breaker {
    word: AtomicU64,
    /// The backend with each model that it was sent.
    pub(crate) pairs: Pairs,
    /// Until when a key that a request found refused keeps the backend out; 0: never.
    bad_key_until: AtomicU64,
    /// Time of the last request that succeeded; 0: none yet.
    last_success: AtomicU64,
    /// When the backend came back last; 0: never.
    up_since: AtomicU64,
    /// When the backend was ejected last; 0: never.
    ejected_at: AtomicU64,
    /// When a real request may try the backend; 0: none may, since the backend is up or its probes decide.
    trial_at: AtomicU64,
    /// The number of trials since the ejection.
    trials: AtomicU32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HealthState {
    Up = 0,
    Ejected = 1,
    Misconfigured = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PackedState {
    state: HealthState,
    /// Requests that failed in a row.
    failures: u32,
    /// Probes that failed in a row.
    failed_probes: u32,
    /// Probes that succeeded in a row while the backend is not up.
    successes: u32,
}

/// The largest value of each count in a [`PackedState`].
const MAX_COUNT: u32 = 0xFFFF;

impl PackedState {
    fn unpack(word: u64) -> Self {
        let state = match word & 3 {
            1 => HealthState::Ejected,
            2 => HealthState::Misconfigured,
            _ => HealthState::Up,
        };
        let count = |at: u32| (word >> at) as u32 & MAX_COUNT;
        PackedState { state, failures: count(2), failed_probes: count(18), successes: count(34) }
    }

    fn pack(self) -> u64 {
        let PackedState { state, failures, failed_probes, successes } = self;
        state as u64 | u64::from(failures) << 2 | u64::from(failed_probes) << 18 | u64::from(successes) << 34
    }

    /// Ejects the backend if one of the failure counts has reached its limit; resets the successes.
    fn after_failure(self, limits: Thresholds) -> Self {
        let is_over = self.failures.max(self.failed_probes) >= limits.failures;
        let state = if self.state == HealthState::Up && is_over { HealthState::Ejected } else { self.state };
        PackedState { state, successes: 0, ..self }
    }

    /// `state` with all counts at 0.
    fn reset_to(state: HealthState) -> Self {
        PackedState { state, failures: 0, failed_probes: 0, successes: 0 }
    }
}

impl Default for Breaker {
    fn default() -> Self {
        Breaker::new()
    }
}

impl Breaker {
    /// Creates the breaker of a backend that has had no requests yet; it is healthy.
    pub fn new() -> Self {
        Breaker {
            word: AtomicU64::new(0),
            pairs: Pairs::default(),
            bad_key_until: AtomicU64::new(0),
            last_success: AtomicU64::new(0),
            up_since: AtomicU64::new(0),
            ejected_at: AtomicU64::new(0),
            trial_at: AtomicU64::new(0),
            trials: AtomicU32::new(0),
        }
    }

    /// Returns the state at `now` for requests of `model`, a hash of the model name that the backend gets. `model` is
    /// called only if a pair of the backend is closed.
    pub fn status_for(&self, model: impl FnOnce() -> u64, now: Nanos) -> Status {
        match self.status_of_backend(now) {
            Status::Healthy => self.pairs.status(model, now),
            out => out,
        }
    }

    /// Returns the state at `now` over all models, as far as it is proven: [`Status::Cooling`] until the last cooldown
    /// of any model ends, and [`Status::Ejected`] also if every model in use is out.
    pub fn status(&self, now: Nanos) -> Status {
        match self.known_status(now) {
            Status::Healthy if self.pairs.are_out(now) => Status::Ejected,
            Status::Healthy => self.pairs.cools_until(now).map_or(Status::Healthy, Status::Cooling),
            out => out,
        }
    }

    /// Returns the state at `now` for requests, whatever its pairs are. A backend that one request may try is
    /// [`Status::Healthy`].
    pub(crate) fn status_of_backend(&self, now: Nanos) -> Status {
        match self.known_status(now) {
            Status::Ejected | Status::Misconfigured if self.is_trial_due(now) => Status::Healthy,
            known => known,
        }
    }

    fn is_trial_due(&self, now: Nanos) -> bool {
        let at = self.trial_at.load(Ordering::Relaxed);
        at != 0 && at <= now
    }

    fn known_status(&self, now: Nanos) -> Status {
        if self.bad_key_until.load(Ordering::Relaxed) > now {
            return Status::Unauthorized;
        }
        match PackedState::unpack(self.word.load(Ordering::Relaxed)).state {
            HealthState::Up => Status::Healthy,
            HealthState::Ejected => Status::Ejected,
            HealthState::Misconfigured => Status::Misconfigured,
        }
    }

    /// Whether the backend, or its pair with `model`, was ejected after `since`. `model` is called only if a pair of
    /// the backend is closed.
    pub(crate) fn was_ejected_since(&self, model: impl FnOnce() -> u64, since: Nanos) -> bool {
        let is_out = PackedState::unpack(self.word.load(Ordering::Relaxed)).state == HealthState::Ejected;
        is_out && self.ejected_at.load(Ordering::Relaxed) > since
            || self.pairs.ejected_since(model).is_some_and(|at| at > since)
    }

    /// Reports a request that succeeded.
    pub fn success(&self, now: Nanos) {
        self.last_success.store(now.max(1), Ordering::Relaxed);
        if self.word.load(Ordering::Relaxed) == 0 {
            return;
        }
        self.change(|w| match w.state {
            // The checks have a count of their own.
            HealthState::Up => PackedState { failures: 0, ..w },
            HealthState::Ejected | HealthState::Misconfigured => w,
        });
    }

    /// Reports a request that failed by the backend's transport.
    pub fn failure(&self, limits: Thresholds, now: Nanos) -> Option<Change> {
        let count = |w: PackedState| PackedState { failures: (w.failures + 1).min(MAX_COUNT), ..w };
        let change = self.change(|w| count(w).after_failure(limits));
        self.note_ejection(change, now);
        change
    }

    fn note_ejection(&self, change: Option<Change>, now: Nanos) {
        if matches!(change, Some(Change::Down | Change::StillDown)) {
            self.ejected_at.store(now, Ordering::Relaxed);
        }
    }

    /// Starts the trials of a backend that has no probes, unless it is up or has them already.
    pub(crate) fn begin_trials(&self, now: Nanos) {
        let is_up = PackedState::unpack(self.word.load(Ordering::Relaxed)).state == HealthState::Up;
        if !is_up && self.trial_at.load(Ordering::Relaxed) == 0 {
            self.trials.store(0, Ordering::Relaxed);
            self.trial_at.store(now + trial_wait(0), Ordering::Relaxed);
        }
    }

    /// Sets whether real requests or probes decide when the backend comes back.
    pub(crate) fn set_trials(&self, are_on: bool, now: Nanos) {
        if are_on { self.begin_trials(now) } else { self.end_trials() }
    }

    fn end_trials(&self) {
        self.trial_at.store(0, Ordering::Relaxed);
    }

    /// Lets a request pass. Returns `None` if the backend is on trial and another request has come first. `panic`: the
    /// request comes in panic mode.
    pub(crate) fn enter(&self, now: Nanos, panic: bool) -> Option<Passage> {
        let at = self.trial_at.load(Ordering::Relaxed);
        if at == 0 {
            return Some(Passage::Free);
        }
        let trials = self.trials.load(Ordering::Relaxed).saturating_add(1);
        let next = now + trial_wait(trials);
        if at <= now && self.trial_at.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.trials.store(trials, Ordering::Relaxed);
            return Some(Passage::Trial);
        }
        panic.then_some(Passage::Free)
    }

    /// Reports a trial that ended without a result. Returns whether another request may go in its place.
    pub(crate) fn undo_trial(&self, now: Nanos) -> bool {
        let at = self.trial_at.load(Ordering::Relaxed);
        let is_undone =
            at > now && self.trial_at.compare_exchange(at, now, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if is_undone {
            let trials = self.trials.load(Ordering::Relaxed);
            self.trials.store(trials.saturating_sub(1), Ordering::Relaxed);
        }
        is_undone
    }

    /// Reports the head of a response to a request that came to the backend at `entered`. It brings a backend on trial
    /// back, unless the request had been sent before the ejection.
    pub(crate) fn answered(&self, entered: Nanos, now: Nanos) -> Option<Change> {
        if self.trial_at.load(Ordering::Relaxed) == 0 || entered < self.ejected_at.load(Ordering::Relaxed) {
            return None;
        }
        self.end_trials();
        let change = self.change(|_| PackedState::reset_to(HealthState::Up));
        if change == Some(Change::Up) {
            self.up_since.store(now.max(1), Ordering::Relaxed);
        }
        change
    }

    /// Reports the result of a probe.
    pub fn probed(&self, probe: Probe, limits: Thresholds, now: Nanos) -> Option<Change> {
        let may_return = match self.up_since.load(Ordering::Relaxed) {
            0 => true,
            last => now >= last.saturating_add(2 * limits.interval),
        };
        let change = self.change(|w| match (probe, w.state) {
            (Probe::Alive, HealthState::Up) => PackedState { failed_probes: 0, ..w },
            (Probe::Alive, _) if may_return && w.successes + 1 >= limits.successes => {
                PackedState::reset_to(HealthState::Up)
            }
            (Probe::Alive, _) => PackedState { successes: (w.successes + 1).min(MAX_COUNT), ..w },
            (Probe::BadKey, _) => PackedState::reset_to(HealthState::Misconfigured),
            (Probe::Failed, HealthState::Misconfigured) => PackedState::reset_to(HealthState::Ejected),
            (Probe::Failed, _) => {
                PackedState { failed_probes: (w.failed_probes + 1).min(MAX_COUNT), ..w }.after_failure(limits)
            }
        });
        self.note_ejection(change, now);
        if change == Some(Change::Up) {
            self.up_since.store(now.max(1), Ordering::Relaxed);
        }
        change
    }

    /// Reports that the provider refused Zap's key: the backend gets no requests for [`BAD_KEY`]. Returns `true` if
    /// it was not out for that reason already.
    pub fn bad_key(&self, now: Nanos) -> bool {
        self.bad_key_until.swap(now + BAD_KEY, Ordering::Relaxed) <= now
    }

    /// Whether a request succeeded in the last `span`.
    pub fn succeeded_within(&self, span: Nanos, now: Nanos) -> bool {
        match self.last_success.load(Ordering::Relaxed) {
            0 => false,
            at => at + span > now,
        }
    }

    /// Whether the backend is neither ejected nor refuses Zap's key, whatever its pairs are.
    pub fn is_up(&self, now: Nanos) -> bool {
        self.status_of_backend(now) == Status::Healthy
    }

    /// Returns when a refused key is tried again; `None` if no key was refused in the last [`BAD_KEY`].
    pub fn retries_key_at(&self, now: Nanos) -> Option<Nanos> {
        Some(self.bad_key_until.load(Ordering::Relaxed)).filter(|at| *at > now)
    }

    /// Returns when the backend may take requests again without a report: a refused key is tried again, or one request
    /// may try the backend.
    pub(crate) fn reopens_at(&self, now: Nanos) -> Option<Nanos> {
        let trial = Some(self.trial_at.load(Ordering::Relaxed)).filter(|at| *at > now);
        self.retries_key_at(now).into_iter().chain(trial).min()
    }

    /// Returns when a backend that [`status`](Self::status) calls out may take a request again without a report, also
    /// if it is out for each model in use; `None` if nothing says when.
    pub(crate) fn retries_at(&self, now: Nanos) -> Option<Nanos> {
        match self.known_status(now) {
            Status::Healthy if self.pairs.are_out(now) => self.pairs.next_trial(now),
            _ => self.reopens_at(now),
        }
    }

    /// Returns how long ago the backend came back; [`SLOW_START`] if it was never ejected.
    pub fn up_for(&self, now: Nanos) -> Nanos {
        match self.up_since.load(Ordering::Relaxed) {
            0 => SLOW_START,
            since => now.saturating_sub(since),
        }
    }

    fn change(&self, step: impl Fn(PackedState) -> PackedState) -> Option<Change> {
        let next = |word| Some(step(PackedState::unpack(word)).pack());
        let before = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).unwrap_or_default();
        let (before, after) = (PackedState::unpack(before), step(PackedState::unpack(before)));
        match (before.state, after.state) {
            (old, new) if old == new => None,
            (_, HealthState::Up) => Some(Change::Up),
            (HealthState::Misconfigured, HealthState::Ejected) => Some(Change::StillDown),
            (_, HealthState::Ejected) => Some(Change::Down),
            (_, HealthState::Misconfigured) => Some(Change::Misconfigured),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Thresholds = Thresholds { interval: 0, failures: 3, successes: 2 };

    #[test]
    fn three_failures_in_a_row_eject_a_backend() {
        let b = Breaker::new();
        assert_eq!((b.failure(LIMITS, 1), b.failure(LIMITS, 1)), (None, None));
        b.success(1);
        assert_eq!((b.failure(LIMITS, 1), b.failure(LIMITS, 1)), (None, None));
        assert_eq!(b.status(2), Status::Healthy);
        assert_eq!(b.failure(LIMITS, 1), Some(Change::Down));
        assert_eq!(b.failure(LIMITS, 1), None, "only one caller sees the change");
        assert_eq!(b.status(2), Status::Ejected);
    }

    #[test]
    fn a_flapping_backend_changes_its_state_at_most_once_per_interval() {
        let limits = Thresholds { interval: 10 * SECOND, failures: 1, successes: 1 };
        let b = Breaker::new();
        let changes = (0..1000u64)
            .filter(|second| {
                let now = (second + 1) * SECOND;
                let traffic = b.failure(limits, now).is_some();
                // More probes than Zap would send: one a second.
                traffic | b.probed(Probe::Alive, limits, now).is_some()
            })
            .count();
        assert!((90..=101).contains(&changes), "{changes} in 100 intervals");
        let first = Breaker::new();
        first.failure(limits, 1);
        assert_eq!(
            first.probed(Probe::Alive, limits, 1),
            Some(Change::Up),
            "a backend that never flapped comes back at once"
        );
    }

    #[test]
    fn only_probes_bring_a_backend_back_and_a_failed_probe_resets_the_count() {
        let b = Breaker::new();
        (0..3).for_each(|_| {
            b.failure(LIMITS, 1);
        });
        b.success(5);
        assert_eq!(b.status(6), Status::Ejected);
        assert_eq!(b.probed(Probe::Alive, LIMITS, 7), None);
        assert_eq!(b.probed(Probe::Failed, LIMITS, 8), None);
        assert_eq!(b.probed(Probe::Alive, LIMITS, 9), None);
        assert_eq!(b.probed(Probe::Alive, LIMITS, 10), Some(Change::Up));
        assert_eq!((b.status(11), b.up_for(15)), (Status::Healthy, 5));
        assert_eq!(
            (b.failure(LIMITS, 1), b.failure(LIMITS, 1)),
            (None, None),
            "the count of failures was reset"
        );
    }

    #[test]
    fn probes_and_requests_are_counted_separately() {
        let b = Breaker::new();
        b.failure(LIMITS, 1);
        b.failure(LIMITS, 1);
        b.probed(Probe::Alive, LIMITS, 1);
        b.probed(Probe::Failed, LIMITS, 2);
        b.probed(Probe::Failed, LIMITS, 3);
        assert_eq!(
            b.failure(LIMITS, 1),
            Some(Change::Down),
            "a good probe does not reset the failures of requests"
        );
        let b = Breaker::new();
        b.failure(LIMITS, 1);
        b.failure(LIMITS, 1);
        b.probed(Probe::Failed, LIMITS, 1);
        b.probed(Probe::Failed, LIMITS, 2);
        b.success(3);
        assert_eq!(
            b.probed(Probe::Failed, LIMITS, 4),
            Some(Change::Down),
            "a good request resets its own count"
        );
        let b = Breaker::new();
        b.failure(LIMITS, 1);
        b.failure(LIMITS, 1);
        b.success(3);
        assert_eq!((b.failure(LIMITS, 1), b.failure(LIMITS, 1)), (None, None));
        let b = Breaker::new();
        b.probed(Probe::Failed, LIMITS, 1);
        b.probed(Probe::Failed, LIMITS, 2);
        assert_eq!(b.probed(Probe::Alive, LIMITS, 3), None);
        b.probed(Probe::Failed, LIMITS, 4);
        b.probed(Probe::Failed, LIMITS, 5);
        assert_eq!(b.probed(Probe::Failed, LIMITS, 6), Some(Change::Down));
    }

    #[test]
    fn a_backend_cools_down_for_one_model_and_serves_another() {
        let b = Breaker::new();
        b.pairs.cool(1, 100, 0);
        b.pairs.cool(2, 200, 0);
        assert_eq!((b.status_for(|| 1, 50), b.status_for(|| 3, 50)), (Status::Cooling(100), Status::Healthy));
        assert_eq!(
            (b.status(50), b.status(150), b.is_up(50)),
            (Status::Cooling(200), Status::Cooling(200), true)
        );
    }

    #[test]
    fn a_backend_is_out_if_every_model_in_use_is() {
        let b = Breaker::new();
        b.pairs.strike(1, 1, 1);
        assert_eq!(
            (b.status(2), b.status_for(|| 2, 2), b.is_up(2)),
            (Status::Ejected, Status::Healthy, true)
        );
        b.pairs.success(2, 3);
        assert_eq!((b.status(4), b.status_for(|| 1, 4)), (Status::Healthy, Status::Ejected));
    }

    #[test]
    fn a_refused_key_keeps_a_backend_out_for_a_minute() {
        let b = Breaker::new();
        assert!(b.bad_key(1));
        assert!(!b.bad_key(2), "reported before");
        assert_eq!(b.probed(Probe::Alive, LIMITS, 3), None);
        assert_eq!((b.retries_key_at(3), b.retries_key_at(BAD_KEY + 2)), (Some(BAD_KEY + 2), None));
        assert_eq!(b.status(BAD_KEY + 1), Status::Unauthorized);
        assert_eq!(b.status(BAD_KEY + 2), Status::Healthy);
    }

    #[test]
    fn a_probe_with_a_refused_key_makes_a_backend_misconfigured_until_another_result() {
        let b = Breaker::new();
        assert_eq!(b.probed(Probe::BadKey, LIMITS, 1), Some(Change::Misconfigured));
        assert_eq!(b.probed(Probe::BadKey, LIMITS, 2), None);
        assert_eq!(b.status(u64::MAX), Status::Misconfigured);
        assert_eq!(b.probed(Probe::Failed, LIMITS, 3), Some(Change::StillDown));
        b.probed(Probe::Alive, LIMITS, 4);
        assert_eq!(b.probed(Probe::Alive, LIMITS, 5), Some(Change::Up));
    }

    #[test]
    fn a_backend_without_probes_is_tried_by_one_request_after_growing_times() {
        let b = Breaker::new();
        b.begin_trials(1);
        assert!(b.enter(1, false) == Some(Passage::Free) && b.reopens_at(1).is_none(), "it is up");
        let ejected = 5 * SECOND;
        (0..3).for_each(|_| {
            b.failure(LIMITS, ejected);
        });
        b.begin_trials(ejected);
        let mut now = ejected;
        for secs in [1, 2, 4, 8, 16, 32, 60, 60] {
            let due = now + secs * SECOND;
            assert_eq!(b.reopens_at(now), Some(due));
            assert_eq!((b.status_of_backend(due - 1), b.enter(due - 1, false)), (Status::Ejected, None));
            assert_eq!((b.status_of_backend(due), b.status(due)), (Status::Healthy, Status::Ejected));
            assert_eq!((b.enter(due, false), b.enter(due, false)), (Some(Passage::Trial), None));
            assert_eq!(b.enter(due, true), Some(Passage::Free), "in panic mode all may");
            assert!(b.undo_trial(due), "it ended without a result");
            assert_eq!((b.enter(due, false), b.enter(due, false)), (Some(Passage::Trial), None));
            assert_eq!(b.failure(LIMITS, due), None);
            b.begin_trials(due);
            now = due;
        }
        assert_eq!(b.answered(ejected - 1, now), None, "it was sent before the ejection");
        assert_eq!(b.answered(now, now + 1), Some(Change::Up));
        assert_eq!((b.answered(now, now + 1), b.reopens_at(now + 1)), (None, None));
        assert_eq!((b.status(now + 1), b.up_for(now + 3)), (Status::Healthy, 2));
        assert_eq!((b.failure(LIMITS, now + 2), b.failure(LIMITS, now + 2)), (None, None));
        assert_eq!(b.failure(LIMITS, now + 2), Some(Change::Down));
        b.begin_trials(now + 2);
        assert_eq!(b.reopens_at(now + 2), Some(now + 2 + SECOND), "the first time is short again");
        b.end_trials();
        assert_eq!((b.status_of_backend(u64::MAX), b.answered(now + 3, now + 4)), (Status::Ejected, None));
        assert!(!b.undo_trial(now + 5), "its probes decide");
    }

    #[test]
    fn a_recent_success_makes_a_probe_unnecessary() {
        let b = Breaker::new();
        assert!(!b.succeeded_within(10, 5));
        b.success(0);
        assert!(b.succeeded_within(10, 5));
        assert!(!b.succeeded_within(10, 11));
    }

    #[test]
    fn judges_a_probe_by_its_status() {
        for (status, want) in [
            (200, Probe::Alive),
            (204, Probe::Alive),
            (404, Probe::Alive),
            (405, Probe::Alive),
            (429, Probe::Alive),
            (401, Probe::BadKey),
            (403, Probe::BadKey),
            (301, Probe::Alive),
            (400, Probe::Alive),
            (500, Probe::Failed),
            (503, Probe::Failed),
        ] {
            assert_eq!(Probe::of_status(status, false), want, "{status}");
        }
        assert_eq!(Probe::of_status(401, true), Probe::Alive);
    }
}
