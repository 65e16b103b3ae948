//! The gate of a pair: whether requests may pass, and how it opens again after a cooldown or an ejection.
//!
//! A gate that opens again lets single requests pass on trial. The result of a trial decides how it goes on. A trial
//! that ends without a result is [undone](Gate::undone), so that another request may go in its place.

use crate::time::{Nanos, SECOND};

/// After a cooldown, the time after which one more request goes although none has succeeded.
pub(crate) const PATIENCE: Nanos = SECOND;

/// The time from an ejection to the first trial; each further time is twice as long.
pub(crate) const FIRST_TRIAL: Nanos = SECOND;

/// The longest time between two trials.
const MAX_TRIAL: Nanos = 60 * SECOND;

/// The time until the next trial, after so many that failed.
pub(crate) fn trial_wait(trials: u32) -> Nanos {
    FIRST_TRIAL.saturating_mul(1 << trials.min(16)).min(MAX_TRIAL)
}

/// How a request has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passage {
    /// As all others.
    Free,
    /// As one of the few that may try the target.
    Trial,
}

/// The state of a backend, or of a pair, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Cools down until then.
    Cooling(Nanos),
    /// Ejected after too many failures in a row.
    Ejected,
    /// May get requests.
    Healthy,
    /// Its health checks are refused for their key.
    Misconfigured,
    /// It refused the key of a request, and is left alone for a while.
    Unauthorized,
}

impl Status {
    /// The state in a word, for `/status` and the log.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Status::Cooling(_) => "cooling",
            Status::Ejected => "ejected",
            Status::Healthy => "healthy",
            Status::Misconfigured => "misconfigured",
            Status::Unauthorized => "unauthorized",
        }
    }

    /// Whether requests go elsewhere for longer than a cooldown.
    pub(crate) fn is_out(self) -> bool {
        matches!(self, Status::Ejected | Status::Misconfigured | Status::Unauthorized)
    }
}

/// Whether requests may pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Gate {
    /// All may.
    #[default]
    Open,
    /// None may before `until`; then the pair reopens step by step.
    Cooling { until: Nanos, pace: Option<Nanos> },
    /// After a cooldown: as many may as are `free`, one more at `next`. With a `pace`, one each `pace`.
    Reopening { free: u32, next: Nanos, pace: Option<Nanos> },
    /// One may at `trial`, after so many `trials`. In panic mode all may once the pair does not cool down any more.
    Ejected { since: Nanos, trial: Nanos, trials: u32, cools_until: Nanos },
}

impl Gate {
    /// The state of a pair with this gate.
    pub(crate) fn status(self, now: Nanos) -> Status {
        match self {
            Gate::Cooling { until, .. } if until > now => Status::Cooling(until),
            Gate::Reopening { free: 0, next, .. } if next > now => Status::Cooling(next),
            Gate::Ejected { trial, .. } if trial > now => Status::Ejected,
            _ => Status::Healthy,
        }
    }

    /// The state of a pair with this gate for requests in panic mode: a pair that is ejected cools down too.
    pub(crate) fn status_in_panic(self, now: Nanos) -> Status {
        match self {
            Gate::Ejected { cools_until, .. } if cools_until > now => Status::Cooling(cools_until),
            _ => self.status(now),
        }
    }

    /// The gate after a request has passed it, and how it has passed; `None` if it may not. In panic mode a request
    /// passes an ejected pair.
    pub(crate) fn passed(self, now: Nanos, panic: bool) -> Option<(Gate, Passage)> {
        match if panic { self.status_in_panic(now) } else { self.status(now) } {
            Status::Healthy => {}
            Status::Ejected if panic => return Some((self, Passage::Free)),
            _ => return None,
        }
        let next = |pace: Option<Nanos>| now + pace.unwrap_or(PATIENCE).max(1);
        let gate = match self {
            Gate::Open => Gate::Open,
            Gate::Cooling { pace, .. } => Gate::Reopening { free: 0, next: next(pace), pace },
            // Nobody has come for a whole unit, so nobody waits any more.
            Gate::Reopening { next, pace: Some(pace), .. } if next.saturating_add(pace) <= now => Gate::Open,
            Gate::Reopening { free, pace, .. } => {
                Gate::Reopening { free: free.saturating_sub(1), next: next(pace), pace }
            }
            Gate::Ejected { since, trials, cools_until, .. } => {
                let trials = trials.saturating_add(1);
                Gate::Ejected { since, trial: now + trial_wait(trials), trials, cools_until }
            }
        };
        // With a pace, the provider has counted the request whatever came of it.
        let is_trial = matches!(gate, Gate::Reopening { pace: None, .. } | Gate::Ejected { .. });
        Some((gate, if is_trial { Passage::Trial } else { Passage::Free }))
    }

    /// The gate after a [trial](Passage::Trial) without a result; `None` if nothing changes.
    pub(crate) fn undone(self, now: Nanos) -> Option<Gate> {
        match self {
            Gate::Reopening { free, next, pace: None } => {
                Some(Gate::Reopening { free: free.saturating_add(1), next, pace: None })
            }
            Gate::Ejected { since, trial, trials, cools_until } => Some(Gate::Ejected {
                since,
                trial: trial.min(now),
                trials: trials.saturating_sub(1),
                cools_until,
            }),
            Gate::Open | Gate::Cooling { .. } | Gate::Reopening { .. } => None,
        }
    }
}
