//! The last failures, for `/status`: whose request failed at which backend, why, and what became of it.
//!
//! The list is bounded. A failure like an earlier one of the list only raises the count of that one, so that an outage
//! does not push everything else out.

use std::collections::VecDeque;
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::code::Code;

/// Most failures in the list.
const MAX: usize = 50;

/// Longest text that an entry keeps of a cause or of a model, in bytes.
const MAX_TEXT: usize = 200;

/// What became of a request of which a try has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was no request, but a health check.
    HealthCheck,
    /// A backend has served it.
    Served,
    /// The client left before the end.
    ClientLeft,
    /// The response broke off.
    CutShort,
    /// Zap refused it with this status and code.
    Refused(u16, Code),
    /// The client got a backend's response with this status.
    Status(u16),
}

/// A failure as it happens.
#[derive(Debug)]
pub(crate) struct Seen<'a> {
    /// The name of the client key; empty for a health check.
    pub client: &'a str,
    /// The model that the request names; may be empty.
    pub model: &'a str,
    /// What became of the request.
    pub outcome: Outcome,
    /// The backend that responded; empty if none did.
    pub backend: &'a str,
}

/// A try that failed.
#[derive(Clone, Debug)]
pub(crate) struct FailedTry {
    /// The name of the backend.
    pub backend: Box<str>,
    /// Why it failed.
    pub cause: Box<str>,
}

/// An entry of the list.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// When it happened first and last.
    pub at: (SystemTime, SystemTime),
    /// How often it happened.
    pub count: u64,
    /// The name of the client key; empty for a health check.
    pub client: Box<str>,
    /// The model that the request names; may be empty.
    pub model: Box<str>,
    /// The failed tries.
    pub tries: Box<[FailedTry]>,
    /// What became of the request.
    pub outcome: Outcome,
    /// The backend that responded; empty if none did.
    pub backend: Box<str>,
}

/// The last failures of all workers and health checks.
#[derive(Debug, Default)]
pub(crate) struct Failures(Mutex<VecDeque<Failure>>);

impl Failures {
    /// Adds a failure at `now`. `tries`: the failed tries with their backends and causes.
    pub(crate) fn note(&self, seen: &Seen<'_>, tries: &[(&str, &str)], now: SystemTime) {
        let mut all = self.0.lock();
        let mut failure = match all.iter().position(|known| known.is_like(seen, tries)) {
            Some(0) => {
                all[0].count += 1;
                all[0].at.1 = now.max(all[0].at.1);
                return;
            }
            known => known.and_then(|at| all.remove(at)).unwrap_or_else(|| Failure {
                at: (now, now),
                count: 0,
                client: seen.client.into(),
                model: cut(seen.model).into(),
                tries: tries
                    .iter()
                    .map(|(backend, cause)| FailedTry {
                        backend: (*backend).into(),
                        cause: cut(cause).into(),
                    })
                    .collect(),
                outcome: seen.outcome,
                backend: seen.backend.into(),
            }),
        };
        failure.count += 1;
        // Two workers may come in another order than their failures.
        failure.at.1 = now.max(failure.at.1);
        all.truncate(MAX - 1);
        all.push_front(failure);
    }

    /// The failures, the last one first.
    pub(crate) fn list(&self) -> Vec<Failure> {
        self.0.lock().iter().cloned().collect()
    }
}

impl Failure {
    fn is_like(&self, seen: &Seen<'_>, tries: &[(&str, &str)]) -> bool {
        let same = |(mine, (backend, cause)): (&FailedTry, &(&str, &str))| {
            *mine.backend == **backend && *mine.cause == *cut(cause)
        };
        self.outcome == seen.outcome
            && self.tries.len() == tries.len()
            && *self.client == *seen.client
            && *self.backend == *seen.backend
            && *self.model == *cut(seen.model)
            && self.tries.iter().zip(tries).all(same)
    }

    /// What became of the request, in words.
    pub(crate) fn outcome_in_words(&self) -> String {
        let backend = &self.backend;
        match self.outcome {
            Outcome::HealthCheck => "a health check, no request".into(),
            Outcome::Served => format!("{backend} has served it"),
            Outcome::ClientLeft => "the client left".into(),
            Outcome::CutShort => format!("the response of {backend} broke off"),
            Outcome::Refused(status, code) => format!("the client got {status} {}", code.text()),
            Outcome::Status(status) => format!("the client got {status} of {backend}"),
        }
    }

    /// Whether a client has lost a request by it.
    pub(crate) fn has_hurt(&self) -> bool {
        matches!(self.outcome, Outcome::CutShort | Outcome::Refused(..) | Outcome::Status(_))
    }
}

fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MAX_TEXT)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(second)
    }

    fn seen(model: &str) -> Seen<'_> {
        Seen { client: "team", model, outcome: Outcome::Served, backend: "b" }
    }

    #[test]
    fn the_list_is_bounded_and_the_last_failure_comes_first() {
        let failures = Failures::default();
        for i in 0..200 {
            failures.note(&seen(&format!("m{i}")), &[("a", "HTTP 500")], at(i));
        }
        let list = failures.list();
        assert_eq!(list.len(), MAX);
        assert_eq!((&*list[0].model, &*list[MAX - 1].model), ("m199", "m150"));
    }

    #[test]
    fn a_failure_like_an_earlier_one_is_counted_there() {
        let failures = Failures::default();
        let long = "x".repeat(1000);
        for (second, cause) in [(1, "HTTP 500"), (2, &*long), (3, "HTTP 500"), (4, "HTTP 500"), (5, &*long)] {
            failures.note(&seen("m"), &[("a", cause)], at(second));
        }
        failures.note(&seen("m"), &[("a", "HTTP 500"), ("a", "HTTP 500")], at(6));
        let list = failures.list();
        let found: Vec<_> = list.iter().map(|f| (f.count, f.at, f.tries.len())).collect();
        assert_eq!(found, [(1, (at(6), at(6)), 2), (2, (at(2), at(5)), 1), (3, (at(1), at(4)), 1)]);
        assert_eq!(list[1].tries[0].cause.len(), MAX_TEXT);
    }
}
