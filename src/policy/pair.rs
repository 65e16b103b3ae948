//! What is known of each pair: a backend together with the model that it is sent.
//!
//! What depends on the request is judged by the pair: a provider limits requests by model, and a model can be broken
//! while its neighbours serve. A pair cools down for as long as its provider says, is busy for a moment, or is ejected
//! after as many strikes in a row as the threshold. One real request then tries an ejected pair after 1 s, 2 s, 4 s and
//! so on.
//!
//! Nearly always no pair is closed, and then a check reads one atomic. The table is bounded.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

pub use crate::policy::gate::Status;
use crate::policy::gate::{FIRST_TRIAL, Gate, Passage};
use crate::policy::key_hasher::KeyHasher;
use crate::policy::sync::{AtomicUsize, Mutex, Ordering};
use crate::time::{MILLI, Nanos, SECOND};

/// Most pairs of one backend. Beyond it, the pair that was used least recently is dropped.
const MAX_PAIRS: usize = 1024;

/// A pair with a success in this time is busy if it refuses a request, not broken.
const RECENT: Nanos = SECOND;

/// The first cooldown of a busy pair; each further one is twice as long.
const FIRST_BUSY: Nanos = 100 * MILLI;

/// Longest cooldown of a busy pair.
const MAX_BUSY: Nanos = 5 * SECOND;

/// A pair is in use if it has had a result in this time.
const IN_USE: Nanos = 300 * SECOND;

/// So many clients that give up in a row, without an answer between them, are one strike.
const GIVE_UPS: u32 = 5;

/// A reopened pair is open to all once so many requests may go at once.
const ALL: u32 = 32;

/// A change of a pair's state. The caller that gets it logs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PairChange {
    /// The pair was ejected.
    Down,
    /// An ejected pair serves again.
    Up,
}

/// A request that comes to a pair.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry {
    /// The key of the model that the backend is sent.
    pub key: u64,
    /// The time.
    pub now: Nanos,
    /// Whether the request comes in panic mode.
    pub panic: bool,
}

/// The pairs of one backend, shared by all workers.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    /// Number of pairs that may refuse a request. Nearly always 0: then the lock is not taken.
    closed: AtomicUsize,
    /// Number of pairs that are silent, in one way or the other.
    doubted: AtomicUsize,
    all: Mutex<HashMap<u64, Pair, BuildHasherDefault<KeyHasher>>>,
}

#[derive(Debug, Default)]
struct Pair {
    /// The last success; 0: none.
    succeeded: Nanos,
    /// The last result of any kind.
    used: Nanos,
    /// The last time that bytes of an answer came, as far as it is known.
    heard: Nanos,
    /// Failures in a row.
    strikes: u32,
    /// Cooldowns in a row because the pair was busy.
    busy: u32,
    /// Clients in a row that gave up, without an answer to anybody between them.
    gave_up: u32,
    /// Whether a request has waited for long without any answer from the backend.
    is_suspect: bool,
    gate: Gate,
}

impl Pairs {
    /// Returns the state of the pair with this key. `key` is called only if a pair of the backend is closed.
    pub(crate) fn status(&self, key: impl FnOnce() -> u64, now: Nanos) -> Status {
        self.gate(key).status(now)
    }

    /// Returns when the ejected pair with this key may be tried; `None` if it is not ejected.
    pub(crate) fn trial_at(&self, key: impl FnOnce() -> u64) -> Option<Nanos> {
        match self.gate(key) {
            Gate::Ejected { trial, .. } => Some(trial),
            _ => None,
        }
    }

    /// Returns the state of the pair with this key for requests in panic mode: an ejected pair that cools down is
    /// [`Status::Cooling`].
    pub(crate) fn status_in_panic(&self, key: impl FnOnce() -> u64, now: Nanos) -> Status {
        self.gate(key).status_in_panic(now)
    }

    /// The gate of the pair with this key. `key` is called only if a pair of the backend is closed.
    fn gate(&self, key: impl FnOnce() -> u64) -> Gate {
        if self.closed.load(Ordering::Acquire) == 0 {
            return Gate::Open;
        }
        self.all.lock().get(&key()).map_or(Gate::Open, |pair| pair.gate)
    }

    /// Returns when the last cooldown of any pair ends; `None` if none cools down.
    pub(crate) fn cools_until(&self, now: Nanos) -> Option<Nanos> {
        if self.closed.load(Ordering::Acquire) == 0 {
            return None;
        }
        let all = self.all.lock();
        let until = |pair: &Pair| match pair.gate {
            Gate::Cooling { until, .. } if until > now => Some(until),
            _ => None,
        };
        all.values().filter_map(until).max()
    }

    /// Lets a request pass. Returns `None` if it may not, since others have come first.
    pub(crate) fn enter(&self, entry: Entry) -> Option<Passage> {
        let Entry { key, now, panic } = entry;
        if self.closed.load(Ordering::Acquire) == 0 {
            return Some(Passage::Free);
        }
        let mut all = self.all.lock();
        let Some(pair) = all.get_mut(&key) else { return Some(Passage::Free) };
        let (gate, passage) = pair.gate.passed(now, panic)?;
        recount(&self.closed, pair.gate != Gate::Open, gate != Gate::Open);
        pair.gate = gate;
        Some(passage)
    }

    /// Reports a trial that ended without a result. Returns whether another request may go in its place.
    pub(crate) fn undo_trial(&self, key: u64, now: Nanos) -> bool {
        let mut all = self.all.lock();
        let gate = all.get_mut(&key).map(|pair| &mut pair.gate);
        match gate.and_then(|gate| gate.undone(now).map(|undone| (gate, undone))) {
            Some((gate, undone)) => {
                *gate = undone;
                true
            }
            None => false,
        }
    }

    /// Reports a request that succeeded. Returns the change, and whether more requests may go than before.
    pub(crate) fn success(&self, key: u64, now: Nanos) -> (Option<PairChange>, bool) {
        self.update(key, now, |pair| {
            (pair.succeeded, pair.heard, pair.strikes, pair.busy) = (now.max(1), now, 0, 0);
            let before = pair.gate;
            pair.gate = match before {
                Gate::Reopening { free, next, pace: None } if free + 2 < ALL => {
                    Gate::Reopening { free: free + 2, next, pace: None }
                }
                // With a pace that the provider has told, the wait is over when nobody has to wait any more.
                Gate::Reopening { next, pace: Some(pace), .. } if next.saturating_add(pace) > now => before,
                Gate::Cooling { until, .. } if until > now => before,
                Gate::Ejected { cools_until, .. } if cools_until > now => {
                    Gate::Cooling { until: cools_until, pace: None }
                }
                _ => Gate::Open,
            };
            let change = matches!(before, Gate::Ejected { .. }).then_some(PairChange::Up);
            (change, before != Gate::Open)
        })
    }

    /// Reports a request that failed. Returns [`PairChange::Down`] if this was the strike that ejects the pair.
    pub(crate) fn strike(&self, key: u64, threshold: u32, now: Nanos) -> Option<PairChange> {
        self.update(key, now, |pair| {
            pair.strikes = pair.strikes.saturating_add(1);
            if pair.strikes < threshold || matches!(pair.gate, Gate::Ejected { .. }) {
                return None;
            }
            let cools_until = match pair.gate {
                Gate::Cooling { until, .. } => until,
                _ => 0,
            };
            let trial = cools_until.max(now + FIRST_TRIAL);
            pair.gate = Gate::Ejected { since: now, trial, trials: 0, cools_until };
            Some(PairChange::Down)
        })
    }

    /// Whether the pair has been silent for long, so that others are preferred. `key` is called only if a pair of the
    /// backend is in doubt.
    pub(crate) fn is_suspect(&self, key: impl FnOnce() -> u64) -> bool {
        self.doubted.load(Ordering::Relaxed) > 0
            && self.all.lock().get(&key()).is_some_and(|pair| pair.is_suspect)
    }

    /// Reports that a request has waited for long, and that the backend has sent nothing to anybody in that time.
    pub(crate) fn suspect(&self, key: u64, now: Nanos) {
        self.update(key, now, |pair| pair.is_suspect = true);
    }

    /// Reports that bytes of an answer flow.
    pub(crate) fn hear(&self, key: u64, now: Nanos) {
        self.update(key, now, |pair| pair.heard = now);
    }

    /// Whether bytes of an answer have come since then.
    pub(crate) fn was_heard_since(&self, key: u64, since: Nanos) -> bool {
        self.all.lock().get(&key).is_some_and(|pair| pair.heard >= since)
    }

    /// Reports a client that gave up after a while without the head of a response. Returns whether so many have done so
    /// in a row that it is a strike.
    pub(crate) fn gave_up(&self, key: u64, now: Nanos) -> bool {
        self.update(key, now, |pair| {
            pair.gave_up += 1;
            pair.gave_up.is_multiple_of(GIVE_UPS)
        })
    }

    /// Reports the head of a response: the pair is not silent.
    pub(crate) fn answered(&self, key: u64, now: Nanos) {
        if self.doubted.load(Ordering::Relaxed) > 0 {
            self.update(key, now, |pair| {
                (pair.heard, pair.gave_up, pair.is_suspect) = (now, 0, false);
            });
        }
    }

    /// Starts a cooldown until `until`, because a response asks for it. The later of two ends counts.
    pub(crate) fn cool(&self, key: u64, until: Nanos, now: Nanos) {
        self.update(key, now, |pair| {
            pair.heard = now;
            pair.cool(until, None);
        });
    }

    /// Starts a cooldown of `span` after a 429 that states it. `pace`: the time for each request after it, if the
    /// provider has told it. A pair that names next to no time, again and again, cools down for longer each time until
    /// it serves a request.
    pub(crate) fn limited(&self, key: u64, (span, pace): (Nanos, Option<Nanos>), now: Nanos) {
        self.update(key, now, |pair| {
            pair.heard = now;
            let floor = pair.next_busy_span(now);
            pair.cool(now + if span < SECOND { span.max(floor) } else { span }, pace);
        });
    }

    /// Reports that the pair had no room for a request. If it has served one a moment ago, it is busy: it cools down
    /// for a moment. Returns `false` otherwise.
    pub(crate) fn busy(&self, key: u64, now: Nanos) -> bool {
        self.update(key, now, |pair| {
            let is_busy = pair.succeeded > 0 && pair.succeeded + RECENT > now;
            pair.heard = now;
            if is_busy {
                let span = pair.next_busy_span(now);
                pair.cool(now + span, None);
            }
            is_busy
        })
    }

    /// Whether a request to the pair has succeeded a moment ago.
    pub(crate) fn has_just_succeeded(&self, key: u64, now: Nanos) -> bool {
        self.all.lock().get(&key).is_some_and(|pair| pair.succeeded > 0 && pair.succeeded + RECENT > now)
    }

    /// Since when the pair is ejected; `None` if it is not. `key` is called only if a pair of the backend is closed.
    pub(crate) fn ejected_since(&self, key: impl FnOnce() -> u64) -> Option<Nanos> {
        match self.gate(key) {
            Gate::Ejected { since, .. } => Some(since),
            _ => None,
        }
    }

    /// Whether every pair in use is ejected, and there is one.
    pub(crate) fn are_out(&self, now: Nanos) -> bool {
        if self.closed.load(Ordering::Acquire) == 0 {
            return false;
        }
        let all = self.all.lock();
        let mut used = all.values().filter(|pair| pair.used + IN_USE > now).peekable();
        used.peek().is_some() && used.all(|pair| matches!(pair.gate, Gate::Ejected { .. }))
    }

    /// The time at which the first ejected pair in use lets a trial go; `None` if there is none after `now`.
    pub(crate) fn next_trial(&self, now: Nanos) -> Option<Nanos> {
        if self.closed.load(Ordering::Acquire) == 0 {
            return None;
        }
        let trial = |pair: &Pair| match pair.gate {
            Gate::Ejected { trial, .. } if pair.used + IN_USE > now => Some(trial),
            _ => None,
        };
        self.all.lock().values().filter_map(trial).filter(|trial| *trial > now).min()
    }

    fn update<T>(&self, key: u64, now: Nanos, change: impl FnOnce(&mut Pair) -> T) -> T {
        let mut all = self.all.lock();
        if all.len() >= MAX_PAIRS
            && !all.contains_key(&key)
            && let Some(oldest) = all.iter().min_by_key(|(_, pair)| pair.used).map(|(key, _)| *key)
            && let Some(dropped) = all.remove(&oldest)
        {
            recount(&self.closed, dropped.gate != Gate::Open, false);
            recount(&self.doubted, dropped.is_in_doubt(), false);
        }
        let pair = all.entry(key).or_default();
        pair.used = now;
        let (was_closed, was_in_doubt) = (pair.gate != Gate::Open, pair.is_in_doubt());
        let result = change(pair);
        recount(&self.closed, was_closed, pair.gate != Gate::Open);
        recount(&self.doubted, was_in_doubt, pair.is_in_doubt());
        result
    }
}

/// Changes the number of pairs that count when one of them changes. The lock of the table is held.
fn recount(counter: &AtomicUsize, was_counted: bool, is_counted: bool) {
    match (was_counted, is_counted) {
        (false, true) => counter.fetch_add(1, Ordering::Release),
        (true, false) => counter.fetch_sub(1, Ordering::Release),
        _ => return,
    };
}

impl Pair {
    /// The cooldown for a request that found no room. Many may be refused at once: they count once, so it is 0 while
    /// the pair cools down already.
    fn next_busy_span(&mut self, now: Nanos) -> Nanos {
        if matches!(self.gate, Gate::Cooling { until, .. } if until > now) {
            return 0;
        }
        let span = FIRST_BUSY.saturating_mul(1 << self.busy.min(16)).min(MAX_BUSY);
        self.busy = self.busy.saturating_add(1);
        span
    }

    fn is_in_doubt(&self) -> bool {
        self.is_suspect || self.gave_up > 0
    }

    fn cool(&mut self, until: Nanos, pace: Option<Nanos>) {
        self.gate = match self.gate {
            // The strikes weigh more: the trial comes after the cooldown.
            Gate::Ejected { since, trial, trials, cools_until } => {
                Gate::Ejected { since, trial: trial.max(until), trials, cools_until: cools_until.max(until) }
            }
            Gate::Cooling { until: other, pace: other_pace } if other >= until => {
                Gate::Cooling { until: other, pace: other_pace }
            }
            _ => Gate::Cooling { until, pace },
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::gate::PATIENCE;

    const A: u64 = 7;

    fn ejected() -> Pairs {
        let pairs = Pairs::default();
        assert_eq!((pairs.strike(A, 2, 1), pairs.strike(A, 2, 2)), (None, Some(PairChange::Down)));
        pairs
    }

    fn enter(pairs: &Pairs, now: Nanos) -> bool {
        pairs.enter(Entry { key: A, now, panic: false }).is_some()
    }

    fn status(pairs: &Pairs, now: Nanos) -> Status {
        pairs.status(|| A, now)
    }

    #[test]
    fn strikes_in_a_row_eject_one_pair_and_leave_the_others() {
        let pairs = Pairs::default();
        pairs.strike(A, 2, 1);
        pairs.success(A, 2);
        assert_eq!(pairs.strike(A, 2, 3), None, "a success resets the count");
        assert_eq!(pairs.strike(A, 2, 4), Some(PairChange::Down));
        assert_eq!(pairs.strike(A, 2, 5), None, "only one caller sees the change");
        assert_eq!((status(&pairs, 6), pairs.status(|| 8, 6)), (Status::Ejected, Status::Healthy));
        assert!(pairs.are_out(6));
        pairs.success(8, 6);
        assert!(!pairs.are_out(6), "another model serves");
        pairs.strike(A, 2, 6 + IN_USE);
        assert!(pairs.are_out(6 + IN_USE), "the other model is not in use any more");
    }

    #[test]
    fn one_request_at_a_time_tries_an_ejected_pair_with_doubling_waits() {
        let pairs = ejected();
        let mut now = 2;
        for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
            now += wait * SECOND;
            assert!(!enter(&pairs, now - 1), "before {wait} s");
            assert!(
                pairs.enter(Entry { key: A, now: now - 1, panic: true }).is_some(),
                "any number in panic mode"
            );
            assert!(enter(&pairs, now) && !enter(&pairs, now), "one after {wait} s");
            pairs.strike(A, 2, now);
        }
        assert_eq!(pairs.success(A, now), (Some(PairChange::Up), true));
        assert_eq!((status(&pairs, now), pairs.ejected_since(|| A)), (Status::Healthy, None));
        assert_eq!(pairs.closed.load(Ordering::Acquire), 0);
    }

    #[test]
    fn the_next_trial_is_that_of_the_first_ejected_pair_in_use() {
        let pairs = Pairs::default();
        assert_eq!(pairs.next_trial(0), None);
        pairs.strike(A, 1, SECOND);
        pairs.strike(8, 1, 2 * SECOND);
        assert_eq!(pairs.next_trial(2 * SECOND - 1), Some(2 * SECOND));
        assert_eq!(pairs.next_trial(2 * SECOND), Some(3 * SECOND), "the first one is due");
        assert_eq!(pairs.next_trial(3 * SECOND), None);
        pairs.success(A, 3 * SECOND);
        pairs.success(8, 3 * SECOND);
        assert_eq!(pairs.next_trial(0), None);
    }

    #[test]
    fn a_pair_that_is_ejected_cools_down_too_even_in_panic_mode() {
        for cools_first in [true, false] {
            let pairs = Pairs::default();
            let cool = || pairs.cool(A, 5 * SECOND, 1);
            let eject = || assert_eq!(pairs.strike(A, 1, 1), Some(PairChange::Down));
            if cools_first {
                cool();
                eject();
            } else {
                eject();
                cool();
            }
            let in_panic = |now| pairs.enter(Entry { key: A, now, panic: true }).is_some();
            let status = |now| (status(&pairs, now), pairs.status_in_panic(|| A, now));
            let cooling = (Status::Ejected, Status::Cooling(5 * SECOND));
            assert_eq!((status(2 * SECOND), in_panic(2 * SECOND)), (cooling, false));
            assert_eq!((status(5 * SECOND - 1), enter(&pairs, 5 * SECOND - 1)), (cooling, false));
            assert!(enter(&pairs, 5 * SECOND) && !enter(&pairs, 5 * SECOND), "one trial");
            assert_eq!((status(5 * SECOND).1, in_panic(5 * SECOND)), (Status::Ejected, true));
        }
    }

    #[test]
    fn a_pair_that_served_a_moment_ago_is_busy_and_not_broken() {
        let pairs = Pairs::default();
        assert!(!pairs.busy(A, 1), "it has never served");
        pairs.success(A, SECOND);
        let mut now = SECOND;
        for (i, ms) in [100, 200, 400].into_iter().enumerate() {
            assert!(pairs.busy(A, now), "{i}");
            assert_eq!(status(&pairs, now), Status::Cooling(now + ms * MILLI));
            now += ms * MILLI;
        }
        assert!(!pairs.busy(A, 2 * SECOND), "the success was too long ago");
        pairs.success(A, 3 * SECOND);
        assert!(pairs.busy(A, 3 * SECOND));
        assert_eq!(
            status(&pairs, 3 * SECOND),
            Status::Cooling(3 * SECOND + 100 * MILLI),
            "a success resets the wait"
        );
    }

    #[test]
    fn after_a_cooldown_each_success_lets_twice_as_many_go() {
        let pairs = Pairs::default();
        pairs.cool(A, 100, 1);
        pairs.cool(A, 50, 1);
        assert_eq!((status(&pairs, 99), status(&pairs, 100)), (Status::Cooling(100), Status::Healthy));
        let admitted = |now| (0..100).take_while(|_| enter(&pairs, now)).count();
        let mut waves = Vec::new();
        for now in 100..106 {
            let n = admitted(now);
            (0..n).for_each(|_| {
                pairs.success(A, now);
            });
            waves.push(n);
        }
        assert_eq!(waves[..5], [1, 2, 4, 8, 16]);
        assert_eq!(waves[5], 100, "then all may go");
        pairs.cool(A, 200, 110);
        assert_eq!((admitted(200), admitted(201)), (1, 0));
        assert_eq!(admitted(200 + PATIENCE), 1, "one more goes if the first does not end");
        assert!(pairs.undo_trial(A, 210 + PATIENCE));
        assert_eq!(admitted(210 + PATIENCE), 1, "one more goes if the first ended without a result");
    }

    #[test]
    fn a_trial_without_a_result_leaves_the_gate_as_it_was() {
        let mut gate = Gate::Ejected { since: 0, trial: 4, trials: 2, cools_until: 0 };
        let (passed, passage) = gate.passed(10, false).unwrap();
        assert_eq!((passage, passed.status(10)), (Passage::Trial, Status::Ejected));
        gate = passed.undone(20).unwrap();
        assert_eq!(gate, Gate::Ejected { since: 0, trial: 20, trials: 2, cools_until: 0 });
        assert_eq!(Gate::Open.passed(0, false), Some((Gate::Open, Passage::Free)));
        assert_eq!(Gate::Open.undone(0), None);
        let paced = Gate::Cooling { until: 5, pace: Some(7) };
        let (passed, passage) = paced.passed(5, false).unwrap();
        assert_eq!(
            (passage, passed.undone(6)),
            (Passage::Free, None),
            "the provider has counted the request"
        );
    }

    #[test]
    fn a_pace_that_the_provider_tells_is_kept() {
        let pairs = Pairs::default();
        pairs.limited(A, (SECOND, Some(10)), 0);
        let mut admitted = 0;
        for now in SECOND..SECOND + 50 {
            if enter(&pairs, now) {
                admitted += 1;
                pairs.success(A, now);
            }
        }
        assert_eq!(admitted, 5);
        pairs.success(A, SECOND + 100);
        assert_eq!(pairs.closed.load(Ordering::Acquire), 0, "nobody waits any more");
    }

    #[test]
    fn silence_makes_a_pair_suspect_until_it_answers() {
        let pairs = Pairs::default();
        pairs.suspect(A, 1);
        assert!(pairs.is_suspect(|| A) && !pairs.is_suspect(|| 8));
        assert_eq!(status(&pairs, 2), Status::Healthy, "others are preferred, nothing is closed");
        pairs.answered(A, 3);
        assert!(!pairs.is_suspect(|| A));
        assert_eq!(pairs.doubted.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn five_clients_in_a_row_that_give_up_are_one_strike() {
        let pairs = Pairs::default();
        let strikes = |n: usize| (0..n).filter(|_| pairs.gave_up(A, 1)).count();
        assert_eq!((strikes(4), strikes(1), strikes(9)), (0, 1, 1));
        pairs.answered(A, 2);
        assert_eq!(strikes(4), 0, "an answer between them");
    }

    #[test]
    fn a_pace_ends_when_no_request_has_come_for_a_whole_unit() {
        for pace in [10, PATIENCE] {
            let pairs = Pairs::default();
            pairs.limited(A, (SECOND, Some(pace)), 0);
            let serves = |now| {
                let enters = enter(&pairs, now);
                if enters {
                    // The response comes at once.
                    pairs.success(A, now);
                }
                enters
            };
            assert!(serves(SECOND) && !serves(SECOND + pace - 1) && serves(SECOND + pace), "one each unit");
            assert!(!serves(SECOND + pace), "{pace}");
            let late = SECOND + 3 * pace;
            assert!((0..50).all(|_| serves(late)), "nobody waits any more");
            assert_eq!((pairs.closed.load(Ordering::Acquire), pairs.cools_until(late)), (0, None));
        }
    }

    #[test]
    fn requests_that_are_refused_at_once_count_once() {
        let pairs = Pairs::default();
        pairs.success(A, SECOND);
        (0..50).for_each(|_| assert!(pairs.busy(A, SECOND)));
        assert_eq!(status(&pairs, SECOND), Status::Cooling(SECOND + 100 * MILLI));
        let pairs = Pairs::default();
        (0..50).for_each(|_| pairs.limited(A, (0, None), SECOND));
        assert_eq!(status(&pairs, SECOND), Status::Cooling(SECOND + 100 * MILLI));
    }

    #[test]
    fn a_client_that_gives_up_or_a_strike_is_no_sign_of_life() {
        let pairs = Pairs::default();
        pairs.gave_up(A, 5);
        pairs.suspect(A, 5);
        pairs.strike(A, 3, 5);
        assert!(!pairs.was_heard_since(A, 1));
        for (now, hear) in [
            (6, (|p, now| p.hear(A, now)) as fn(&Pairs, Nanos)),
            (7, |p, now| p.answered(A, now)),
            (8, |p, now| {
                p.success(A, now);
            }),
            (9, |p, now| p.cool(A, 20, now)),
        ] {
            assert!(!pairs.was_heard_since(A, now));
            hear(&pairs, now);
            assert!(pairs.was_heard_since(A, now));
        }
    }

    #[test]
    fn a_429_that_names_no_time_cools_for_longer_each_time() {
        let pairs = Pairs::default();
        let mut now = 1;
        for ms in [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000] {
            pairs.limited(A, (0, None), now);
            assert_eq!(status(&pairs, now), Status::Cooling(now + ms * MILLI));
            now += ms * MILLI;
        }
        pairs.limited(A, (2 * SECOND, None), now);
        assert_eq!(status(&pairs, now), Status::Cooling(now + 2 * SECOND), "a stated time decides");
        pairs.success(A, now + 2 * SECOND);
        pairs.limited(A, (0, None), now + 3 * SECOND);
        assert_eq!(status(&pairs, now + 3 * SECOND), Status::Cooling(now + 3 * SECOND + 100 * MILLI));
    }

    #[test]
    fn the_number_of_pairs_is_bounded() {
        let pairs = Pairs::default();
        (0..10_000).for_each(|key| pairs.cool(key, 1_000_000, key));
        assert_eq!(pairs.all.lock().len(), MAX_PAIRS);
        assert_eq!(pairs.closed.load(Ordering::Acquire), MAX_PAIRS);
        assert_eq!(pairs.cools_until(5), Some(1_000_000));
    }
}
