//! The gate of a pair: whether requests may pass, and how it opens again after a cooldown or an ejection.

use crate::time::{Nanos, SECOND};

/// After a cooldown, the time after which one more request goes although none has succeeded.
pub(crate) const PATIENCE: Nanos = SECOND;

/// Longest time until it is tried again.
pub(crate) const MAX_TRIAL: Nanos = 60 * SECOND;

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
    /// One may at `trial`. In panic mode all may once the pair does not cool down any more.
    Ejected { since: Nanos, trial: Nanos, interval: Nanos, cools_until: Nanos },
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

    /// The gate after a request has passed it; `None` if it may not. In panic mode a request passes an ejected pair.
    pub(crate) fn passed(self, now: Nanos, panic: bool) -> Option<Gate> {
        match if panic { self.status_in_panic(now) } else { self.status(now) } {
            Status::Healthy => {}
            Status::Ejected if panic => return Some(self),
            _ => return None,
        }
        let next = |pace: Option<Nanos>| now + pace.unwrap_or(PATIENCE).max(1);
        Some(match self {
            Gate::Open => Gate::Open,
            Gate::Cooling { pace, .. } => Gate::Reopening { free: 0, next: next(pace), pace },
            // Nobody has come for a whole unit, so nobody waits any more.
            Gate::Reopening { next, pace: Some(pace), .. } if next.saturating_add(pace) <= now => Gate::Open,
            Gate::Reopening { free, pace, .. } => {
                Gate::Reopening { free: free.saturating_sub(1), next: next(pace), pace }
            }
            Gate::Ejected { since, interval, cools_until, .. } => {
                let interval = (2 * interval).min(MAX_TRIAL);
                Gate::Ejected { since, trial: now + interval, interval, cools_until }
            }
        })
    }
}
