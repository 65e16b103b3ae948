//! The last five minutes of each backend, for `/status`: since when it is in its state, its rates, its times to the
//! first token. The fleet thread looks at the counters each second, so nothing of this is on the way of a request.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::counter::{REQUEST, Total};
use crate::policy::breaker::Status;
use crate::policy::choose::Closed;
use crate::telemetry::token_metrics::tokens_of;
use crate::time::{MILLI, Nanos, SECOND};
use crate::upstream::Upstream;
use crate::upstream::token_counters::TokenCount;

/// Time between two samples.
pub(crate) const STEP: Nanos = 5 * SECOND;

/// Samples that are kept: five minutes.
const STEPS: usize = 60;

/// A sample may come so much early: the thread that takes it looks once a second.
const SLACK: Nanos = SECOND / 2;

/// The time over which requests and errors per second are counted.
const SHORT: Nanos = 10 * SECOND;

/// The time over which tokens per second are counted: they are known when an answer ends.
const LONG: Nanos = 60 * SECOND;

/// Counts of the first token by bucket: each bound, and all.
const BUCKETS: usize = REQUEST.len() + 1;

/// The counters of a backend at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// When they were read.
    pub at: Nanos,
    /// Responses that went to clients.
    pub answers: u64,
    /// Tries that failed.
    pub errors: u64,
    output: u64,
    /// Answers with a first token within each bound.
    first_token: [u32; BUCKETS],
}

impl Sample {
    fn of(upstream: &Upstream, now: Nanos) -> Self {
        let lanes = || upstream.lanes.iter();
        let times = Total::of(REQUEST, lanes().map(|lane| &lane.first_token));
        let mut first_token = [times.count as u32; BUCKETS];
        first_token.iter_mut().zip(&times.cumulative).for_each(|(bucket, (_, n))| *bucket = *n as u32);
        let [_, _, output, _] = TokenCount::sum(tokens_of(upstream).into_values()).tokens;
        Sample {
            at: now,
            answers: lanes().map(|lane| lane.responses.total()).sum(),
            errors: lanes().flat_map(|lane| &lane.errors).map(|errors| errors.get()).sum(),
            output,
            first_token,
        }
    }

    /// The time within which a part of the answers since `before` had their first token, in milliseconds; `None` if
    /// there was none. It is interpolated within a bucket, as Prometheus does.
    fn first_token_ms(&self, before: &Sample, part: f64) -> Option<f64> {
        let count = |bucket: usize| self.first_token[bucket].wrapping_sub(before.first_token[bucket]);
        let all = count(BUCKETS - 1);
        let rank = part * f64::from(all);
        let bucket = (0..REQUEST.len()).find(|bucket| f64::from(count(*bucket)) >= rank);
        let ms = |bound: Nanos| bound as f64 / MILLI as f64;
        let quantile = || {
            let Some(bucket) = bucket else { return ms(REQUEST[REQUEST.len() - 1]) };
            let (low, below) = match bucket.checked_sub(1) {
                Some(under) => (ms(REQUEST[under]), count(under)),
                None => (0.0, 0),
            };
            let share = (rank - f64::from(below)) / f64::from((count(bucket) - below).max(1));
            low + (ms(REQUEST[bucket]) - low) * share
        };
        (all > 0).then(quantile)
    }
}

/// What is told of a backend.
#[derive(Clone, Debug)]
pub(crate) struct Recent {
    /// When the state began, as far as it is known.
    pub since: SystemTime,
    /// The counters now.
    pub now: Sample,
    /// Responses to clients in a second.
    pub answers: f64,
    /// Failed tries in a second.
    pub errors: f64,
    /// Output tokens in a second.
    pub tokens: f64,
    /// The median and the 95th percentile of the time to the first token, in milliseconds.
    pub first_token_ms: Option<(f64, f64)>,
    /// Responses and failed tries of each step, the oldest first.
    pub steps: Vec<(u64, u64)>,
}

#[derive(Debug)]
struct BackendHistory {
    state: &'static str,
    since: SystemTime,
    samples: VecDeque<Sample>,
}

impl BackendHistory {
    fn observe(&mut self, state: &'static str, wall: SystemTime) {
        if self.state != state {
            (self.state, self.since) = (state, wall);
        }
    }

    /// The newest sample that is at least so old, or the oldest one.
    fn before(&self, span: Nanos, now: Nanos) -> Option<&Sample> {
        let old = self.samples.iter().rfind(|sample| sample.at + span <= now);
        old.or(self.samples.front())
    }

    fn recent(&self, now: Sample) -> Recent {
        let rate = |span: Nanos, count: fn(&Sample) -> u64| {
            let Some(before) = self.before(span, now.at) else { return 0.0 };
            let secs = now.at.saturating_sub(before.at).max(SECOND) as f64 / SECOND as f64;
            count(&now).saturating_sub(count(before)) as f64 / secs
        };
        let times = self
            .samples
            .front()
            .and_then(|before| Some((now.first_token_ms(before, 0.5)?, now.first_token_ms(before, 0.95)?)));
        let ends = self.samples.iter().skip(1).chain([&now]);
        let step = |(a, b): (&Sample, &Sample)| {
            (b.answers.saturating_sub(a.answers), b.errors.saturating_sub(a.errors))
        };
        Recent {
            since: self.since,
            answers: rate(SHORT, |sample| sample.answers),
            errors: rate(SHORT, |sample| sample.errors),
            tokens: rate(LONG, |sample| sample.output),
            first_token_ms: times,
            steps: self.samples.iter().zip(ends).map(step).collect(),
            now,
        }
    }
}

/// The last five minutes of all backends, by name.
#[derive(Debug, Default)]
pub(crate) struct History(Mutex<HashMap<Box<str>, BackendHistory>>);

impl History {
    /// Looks at the backends at `now`; `wall` is the same time of the wall clock. Called once a second.
    pub(crate) fn look(&self, backends: &[Arc<Upstream>], now: Nanos, wall: SystemTime) {
        let mut all = self.0.lock();
        if all.len() > backends.len() {
            all.retain(|name, _| backends.iter().any(|b| b.name() == &**name));
        }
        for backend in backends {
            let state = state_of(backend, now);
            let history = entry(&mut all, backend.name(), (state, wall));
            history.observe(state, wall);
            if history.samples.back().is_none_or(|last| last.at + STEP <= now + SLACK) {
                if history.samples.len() == STEPS {
                    history.samples.pop_front();
                }
                history.samples.push_back(Sample::of(backend, now));
            }
        }
    }

    /// What is known of a backend in this state at `now`.
    pub(crate) fn of(
        &self,
        backend: &Upstream,
        state: &'static str,
        (now, wall): (Nanos, SystemTime),
    ) -> Recent {
        let sample = Sample::of(backend, now);
        let mut all = self.0.lock();
        let history = entry(&mut all, backend.name(), (state, wall));
        history.observe(state, wall);
        history.recent(sample)
    }
}

fn entry<'h>(
    all: &'h mut HashMap<Box<str>, BackendHistory>,
    name: &str,
    (state, since): (&'static str, SystemTime),
) -> &'h mut BackendHistory {
    all.entry(name.into()).or_insert(BackendHistory { state, since, samples: VecDeque::new() })
}

/// The state of a backend in a word. The words match those that the log gives for candidates that were passed over.
pub(crate) fn state_of(backend: &Upstream, now: Nanos) -> &'static str {
    match (backend.conf.weight, backend.state.breaker.status(now), backend.closed(now)) {
        (0, ..) => "drained",
        (
            _,
            Status::Healthy,
            Some(closed @ (Closed::Full | Closed::Quota(_) | Closed::Reserved | Closed::Budget(_))),
        ) => closed.name(),
        (_, status, _) => status.name(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(second: u64, answers: u64, errors: u64) -> Sample {
        let mut first_token = [0; BUCKETS];
        // Half of the answers within 5 ms, the others from 50 to 100 ms.
        first_token
            .iter_mut()
            .enumerate()
            .for_each(|(i, n)| *n = if i < 4 { answers / 2 } else { answers } as u32);
        Sample { at: second * SECOND, answers, errors, output: answers * 10, first_token }
    }

    fn history(samples: impl Iterator<Item = Sample>) -> BackendHistory {
        BackendHistory { state: "healthy", since: SystemTime::UNIX_EPOCH, samples: samples.collect() }
    }

    #[test]
    fn rates_are_those_of_the_last_seconds() {
        // 2 answers a second; from second 100 on also an error each second.
        let at = |second: u64| sample(second, second * 2, second.saturating_sub(100));
        let known = history((0..25).map(|i| at(i * 5)));
        let recent = known.recent(at(121));
        assert_eq!((recent.answers, recent.errors, recent.tokens), (2.0, 1.0, 20.0));
        assert_eq!(recent.steps.len(), 25);
        assert_eq!((recent.steps[0], recent.steps[23], recent.steps[24]), ((10, 0), (10, 5), (2, 1)));
    }

    #[test]
    fn times_to_the_first_token_are_interpolated() {
        let (median, late) =
            history([sample(0, 0, 0)].into_iter()).recent(sample(9, 100, 0)).first_token_ms.unwrap();
        assert_eq!((median, late), (5.0, 95.0));
    }

    #[test]
    fn without_samples_or_answers_nothing_is_claimed() {
        let recent = history(std::iter::empty()).recent(sample(0, 5, 5));
        assert_eq!((recent.answers, recent.first_token_ms, recent.steps.len()), (0.0, None, 0));
        let idle = history([sample(0, 5, 5)].into_iter()).recent(sample(10, 5, 5));
        assert_eq!((idle.answers, idle.first_token_ms, idle.steps), (0.0, None, vec![(0, 0)]));
    }

    #[test]
    fn the_state_began_when_it_was_seen_first() {
        let mut known = history(std::iter::empty());
        let at = |second| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(second);
        for (second, state, since) in
            [(1, "healthy", 0), (2, "ejected", 2), (3, "ejected", 2), (4, "healthy", 4)]
        {
            known.observe(state, at(second));
            assert_eq!(known.since, at(since), "{second}");
        }
    }
}
