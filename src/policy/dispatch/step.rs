//! What one request may do, and what it does next.

use std::time::Duration;

use crate::code::Code;
use crate::policy::dispatch::survey::Busy;
use crate::policy::route::TargetId;
use crate::policy::spend::Refused;
use crate::time::Nanos;

/// The limits of one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Maximum number of tries after the first.
    pub max_retries: u32,
    /// Upper limit of the first backoff. The limit doubles with each further backoff.
    pub base_delay: Duration,
    /// Upper limit of every backoff.
    pub max_delay: Duration,
    /// When a target that cools down must have reopened, so that the request waits for it.
    pub wait_until: Nanos,
    /// When the first byte of the response must be sent.
    pub deadline: Nanos,
}

/// The next step of the gateway.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Do {
    /// Wait, then call [`Dispatch::next`](crate::policy::dispatch::Dispatch::next) again.
    Backoff {
        /// End of the wait.
        until: Nanos,
    },
    /// Deliver the response that was kept last.
    Deliver,
    /// Respond with an error: no target serves the request.
    Refuse(Refusal),
    /// Take a permit for this target and send the request. If no permit is left, call
    /// [`Dispatch::missed`](crate::policy::dispatch::Dispatch::missed).
    Try {
        /// The target, by its index in the route.
        target: TargetId,
        /// Whether this is a try in panic mode: no usable target is up, and this one has the lowest load.
        panic: bool,
    },
    /// Wait until one of these targets is available, then call
    /// [`Dispatch::next`](crate::policy::dispatch::Dispatch::next) again.
    Wait(Busy),
}

/// Why no target serves a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The usable targets are busy, and the request does not wait for them.
    Busy(Busy),
    /// The budgets of the usable targets do not pay for the request.
    Budget(Refused),
    /// The last try failed with this code, and no response is kept.
    Failed(Code),
    /// All targets refuse Zap's key.
    KeysRefused,
    /// No target accepts requests.
    NoBackend,
    /// The request is too large for every target that is left.
    TooLarge,
}
