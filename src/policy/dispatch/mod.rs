//! Decides the next step of one request: try a target, wait, back off, deliver or refuse. Does no I/O.
//!
//! The gateway gets the next step from [`Dispatch::next`], carries it out, and reports the result to [`Dispatch::on`].
//! Time, the state of the fleet and randomness are arguments, so that tests need no sockets and no clock. The design
//! follows quinn-proto, whose connection is a pure state machine too.

use std::time::Duration;

use crate::code::Code;
use crate::policy::balance::BackendId;
use crate::policy::breaker::Status;
use crate::policy::choose;
use crate::policy::choose::{Closed, Fleet};
use crate::policy::retry::{Budget, Outcome, backoff, judge};
use crate::policy::route::TargetId;
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
    /// When the first byte of the response must be sent.
    pub deadline: Nanos,
}

/// The next step of the gateway.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Do {
    /// Wait, then call [`Dispatch::next`] again.
    Backoff {
        /// End of the wait.
        until: Nanos,
    },
    /// Deliver the response that was kept last.
    Deliver,
    /// Respond with an error: no target serves the request.
    Refuse(Refusal),
    /// Take a permit for this target and send the request. If no permit is left, call [`Dispatch::missed`].
    Try {
        /// The target, by its index in the route.
        target: TargetId,
        /// When the head of the response must have arrived.
        until: Nanos,
        /// Whether this is a try in panic mode: no usable target is up, and this one has the lowest load.
        panic: bool,
    },
    /// Wait until one of these targets is available, then call [`Dispatch::next`] again.
    Wait(Busy),
}

/// Why no target serves a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The usable targets are busy, and the request does not wait for them.
    Busy(Busy),
    /// The last try failed with this code, and no response is kept.
    Failed(Code),
    /// All targets refuse Zap's key.
    KeysRefused,
    /// No target accepts requests.
    NoBackend,
}

/// Busy targets that a request may wait for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Busy {
    /// The target that reopens first: the time, its backend, and whether a quota is the reason.
    pub opens: Option<(Nanos, BackendId, bool)>,
    /// Full backends, each listed once.
    pub full: Vec<BackendId>,
}

/// The result of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The connection failed, or the response is invalid.
    Broke(Code),
    /// Zap is shutting down and cut the try.
    Cut,
    /// This machine has no free file or port for a connection. The backend is not to blame.
    Exhausted,
    /// The head of a response has arrived.
    Head {
        /// The status.
        status: u16,
        /// Whether the request carried a key from Zap's configuration.
        own_key: bool,
    },
    /// No response arrived in time.
    TimedOut,
}

/// What an event means for the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The response goes to the client, unless its body fails before the first byte.
    Deliver,
    /// The try failed.
    Failed(Failure),
}

/// A try that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The error code for metrics and log.
    pub code: Code,
    /// Whether the failure counts against the backend.
    pub blame: bool,
    /// What the status means for further requests to the target.
    pub mark: Option<Mark>,
    /// Whether to keep the response. It is delivered if no further try succeeds.
    pub keep: bool,
    /// Whether the request ends here, without a further try.
    fatal: bool,
    /// Whether this target is excluded from further rounds.
    no_retry: bool,
}

/// What a response means for further requests to its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The backend refused the key: take it out for a while.
    BadKey,
    /// Let the target cool down for as long as the response says.
    Cool,
}

impl Failure {
    fn new(code: Code) -> Self {
        Failure { code, blame: false, mark: None, keep: false, fatal: false, no_retry: false }
    }
}

/// The state of one request.
#[derive(Debug)]
pub(crate) struct Dispatch {
    rules: Rules,
    /// Targets in the order of their first try. Later rounds keep this order.
    order: Vec<TargetId>,
    /// Targets tried in this round.
    tried: Vec<TargetId>,
    /// Targets that are excluded from further rounds.
    excluded: Vec<TargetId>,
    /// The target of the present try.
    current: Option<TargetId>,
    /// Targets that had no permit left for this try.
    missed: Vec<TargetId>,
    rounds: u32,
    tries: u32,
    /// Whether the next try has been charged to the retry budget.
    is_charged: bool,
    /// Whether a response is kept.
    has_response: bool,
    /// The error code of the last failed try.
    failed: Option<Code>,
    is_over: bool,
}

/// The result of a search for the next target.
enum Selection {
    Busy {
        busy: Busy,
        panic: bool,
    },
    KeysRefused,
    NoTarget,
    Target {
        target: TargetId,
        panic: bool,
    },
    /// All usable targets have been tried in this round.
    Tried,
}

impl Dispatch {
    /// Creates the state of a request that has not been tried.
    pub(crate) fn new(rules: Rules) -> Self {
        Dispatch {
            rules,
            order: Vec::new(),
            tried: Vec::new(),
            excluded: Vec::new(),
            current: None,
            missed: Vec::new(),
            rounds: 0,
            tries: 0,
            is_charged: false,
            has_response: false,
            failed: None,
            is_over: false,
        }
    }

    /// Targets tried in this round.
    pub(crate) fn tried(&self) -> &[TargetId] {
        &self.tried
    }

    /// Returns the next step at `now`. `random` returns a random number for the jitter of a backoff.
    pub(crate) fn next(
        &mut self,
        now: Nanos,
        fleet: &impl Fleet,
        budget: &Budget,
        random: impl FnOnce() -> u64,
    ) -> Do {
        let Rules { max_retries, deadline, .. } = self.rules;
        if self.is_over || self.tries > max_retries || self.tries > 0 && now >= deadline {
            return self.end();
        }
        match self.select(now, fleet) {
            Selection::Target { target, panic } => {
                if !self.charge(now, budget) {
                    return self.end();
                }
                self.current = Some(target);
                Do::Try { target, until: self.try_deadline(now, fleet), panic }
            }
            // In panic mode, a new request is refused; only a request that already waits goes on waiting.
            Selection::Busy { busy, panic } if panic && !fleet.is_waiting() => {
                Do::Refuse(Refusal::Busy(busy))
            }
            Selection::Busy { busy, .. } => Do::Wait(busy),
            Selection::KeysRefused => Do::Refuse(Refusal::KeysRefused),
            Selection::NoTarget => Do::Refuse(Refusal::NoBackend),
            Selection::Tried => self.next_round(now, fleet, budget, random()),
        }
    }

    /// Reports that another request took the target's last permit.
    pub(crate) fn missed(&mut self) {
        self.missed.extend(self.current.take());
    }

    /// Judges the result of the try. After [`Verdict::Deliver`], a second event reports that the body failed.
    pub(crate) fn on(&mut self, event: Event) -> Verdict {
        let failure = match event {
            Event::Broke(code) => Failure { blame: true, ..Failure::new(code) },
            Event::Cut => Failure { fatal: true, ..Failure::new(Code::Draining) },
            Event::Exhausted => Failure::new(Code::UpstreamUnreachable),
            Event::TimedOut => Failure { blame: true, no_retry: true, ..Failure::new(Code::UpstreamTimeout) },
            Event::Head { status, own_key } => match judge(status, own_key) {
                Outcome::Deliver => return Verdict::Deliver,
                Outcome::Failure => Failure { blame: true, keep: true, ..Failure::new(Code::UpstreamError) },
                Outcome::Refused => {
                    Failure { keep: true, no_retry: true, ..Failure::new(Code::UpstreamRefused) }
                }
                Outcome::Busy => {
                    Failure { keep: true, mark: Some(Mark::Cool), ..Failure::new(Code::UpstreamRateLimited) }
                }
                Outcome::BadKey => {
                    Failure { mark: Some(Mark::BadKey), ..Failure::new(Code::UpstreamAuthError) }
                }
                Outcome::Redirect => Failure { fatal: true, ..Failure::new(Code::UpstreamRedirect) },
            },
        };
        self.fail(failure);
        Verdict::Failed(failure)
    }

    fn fail(&mut self, failure: Failure) {
        self.tries += 1;
        self.is_charged = false;
        self.failed = Some(failure.code);
        self.is_over = failure.fatal;
        self.missed.clear();
        // A fatal error takes precedence over a kept response.
        self.has_response = (self.has_response || failure.keep) && !failure.fatal;
        let Some(target) = self.current.take() else { return };
        self.tried.push(target);
        if failure.no_retry {
            self.excluded.push(target);
        }
        if !self.order.contains(&target) {
            self.order.push(target);
        }
    }

    /// The final step: deliver the last kept response, or refuse if there is none.
    fn end(&self) -> Do {
        match self.failed {
            _ if self.has_response => Do::Deliver,
            code => Do::Refuse(Refusal::Failed(code.unwrap_or(Code::UpstreamTimeout))),
        }
    }

    /// Charges the next try to the retry budget, once. The first try is free. Returns whether the try may be made.
    fn charge(&mut self, now: Nanos, budget: &Budget) -> bool {
        self.is_charged = self.is_charged || self.tries == 0 || budget.try_withdraw(now);
        self.is_charged
    }

    /// When the head of the response must have arrived. The time left is divided equally among the untried targets that
    /// are up, or among all untried targets if none is up.
    fn try_deadline(&self, now: Nanos, fleet: &impl Fleet) -> Nanos {
        let is_up = |id: &TargetId| !matches!(fleet.check(*id), Err(Closed::Out(_)));
        let untried = || fleet.all().targets().filter(|id| !self.tried.contains(id));
        let shares = match fleet.up() {
            up if up > 0 && self.tried.is_empty() => up,
            _ => match untried().filter(is_up).count() {
                0 => untried().count().max(1),
                up => up,
            },
        };
        now + self.rules.deadline.saturating_sub(now) / shares as u64
    }

    fn select(&mut self, now: Nanos, fleet: &impl Fleet) -> Selection {
        let missed = std::mem::take(&mut self.missed);
        // In a later round, a reopened target that was never tried comes before targets that failed.
        let known = if self.rounds == 0 { &self.tried } else { &self.order };
        let (is_first, skip) = (known.is_empty(), |id| known.contains(&id) || missed.contains(&id));
        if let Some(target) = choose::pick(fleet, is_first, skip) {
            self.missed = missed;
            return Selection::Target { target, panic: false };
        }
        let Survey { busy, is_up, has_refused_key, has_ejected } = Survey::of(now, fleet, known);
        if has_ejected && !is_up {
            if let Some(target) = choose::in_panic(fleet, is_first, skip) {
                self.missed = missed;
                return Selection::Target { target, panic: true };
            }
            let busy = Survey::of_ejected(now, fleet);
            return match () {
                () if !is_first => Selection::Tried,
                () if busy.is_empty() => Selection::NoTarget,
                () => Selection::Busy { busy, panic: true },
            };
        }
        let is_left = |id: &TargetId| !self.tried.contains(id) && !missed.contains(id);
        let rest = self.order.iter().copied().filter(|_| self.rounds > 0).filter(is_left);
        if let Some(target) = choose::in_order(fleet, rest) {
            self.missed = missed;
            return Selection::Target { target, panic: false };
        }
        match () {
            () if !is_first => Selection::Tried,
            () if !busy.is_empty() => Selection::Busy { busy, panic: false },
            () if has_refused_key => Selection::KeysRefused,
            () => Selection::NoTarget,
        }
    }

    /// All targets have been tried: starts another round after a backoff, if a target may be retried.
    fn next_round(&mut self, now: Nanos, fleet: &impl Fleet, budget: &Budget, random: u64) -> Do {
        let may_retry = |id: &TargetId| !self.excluded.contains(id) && fleet.check(*id).is_ok();
        let Rules { base_delay, max_delay, deadline, .. } = self.rules;
        let wait = backoff(base_delay, max_delay, self.rounds, random).as_nanos();
        let until = now.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX));
        if !self.order.iter().any(may_retry) || until >= deadline || !self.charge(now, budget) {
            return self.end();
        }
        self.tried.clone_from(&self.excluded);
        self.rounds += 1;
        Do::Backoff { until }
    }
}

/// Why no target is available.
#[derive(Default)]
struct Survey {
    busy: Busy,
    /// Whether a target is up. It may be busy or already tried.
    is_up: bool,
    /// Whether a target refuses Zap's key.
    has_refused_key: bool,
    /// Whether an untried target is ejected.
    has_ejected: bool,
}

impl Survey {
    fn of(now: Nanos, fleet: &impl Fleet, known: &[TargetId]) -> Self {
        let mut survey = Survey::default();
        for id in fleet.all().targets() {
            let closed = fleet.check(id);
            let is_known = known.contains(&id);
            match closed {
                Err(Closed::Out(Status::Misconfigured)) => survey.has_refused_key = true,
                Err(Closed::Out(_)) => survey.has_ejected |= !is_known,
                _ => survey.is_up = true,
            }
            if !is_known {
                survey.busy.note(now, fleet.backend(id), closed);
            }
        }
        survey
    }

    /// The permits, cooldowns and quotas that a request for the ejected targets must wait for.
    fn of_ejected(now: Nanos, fleet: &impl Fleet) -> Busy {
        let mut busy = Busy::default();
        fleet.all().targets().for_each(|id| busy.note(now, fleet.backend(id), fleet.check_ejected(id)));
        busy
    }
}

impl Busy {
    fn is_empty(&self) -> bool {
        self.opens.is_none() && self.full.is_empty()
    }

    /// Adds the `result` of a check of `backend`.
    fn note(&mut self, now: Nanos, backend: BackendId, result: Result<(), Closed>) {
        match result {
            Err(Closed::Cooling(at)) => self.opens(at, backend, false),
            Err(Closed::Quota(at)) => self.opens(at, backend, true),
            Err(Closed::Full) if !self.full.contains(&backend) => self.full.push(backend),
            Err(Closed::Full | Closed::Out(_)) => {}
            // The backend has reopened since it was passed over.
            Ok(()) => self.opens(now, backend, false),
        }
    }

    fn opens(&mut self, at: Nanos, backend: BackendId, by_quota: bool) {
        if self.opens.is_none_or(|(first, ..)| at < first) {
            self.opens = Some((at, backend, by_quota));
        }
    }
}

#[cfg(test)]
mod tests;
