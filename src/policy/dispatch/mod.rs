//! Whom to ask next, wait, try again or give up: the course of one request through its targets, without I/O.
//!
//! The gateway asks [`Dispatch::next`] what to do, does it, and reports what came with [`Dispatch::on`]. Time, the state of
//! the fleet and randomness are arguments, so every course can be tested in microseconds. After quinn-proto, whose
//! connection decides the same way.

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
    /// Tries beyond the first.
    pub max_retries: u32,
    /// The first backoff is at most so long; each further one twice that.
    pub base_delay: Duration,
    /// No backoff is longer.
    pub max_delay: Duration,
    /// When the first byte of the answer must be on its way.
    pub deadline: Nanos,
}

/// What the gateway is to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Do {
    /// Wait until then, then ask again.
    Backoff {
        /// When.
        until: Nanos,
    },
    /// Deliver the answer that was kept last.
    Deliver,
    /// Tell the client that nobody serves the request.
    Refuse(Refusal),
    /// Take a place at this target and send the request; where there is no place any more, report [`Dispatch::missed`].
    Try {
        /// Which of the route's targets.
        target: TargetId,
        /// How long it may take to begin its answer.
        until: Nanos,
        /// All targets are out; this one is the least bad.
        panic: bool,
    },
    /// Wait until one of these may be asked, then ask again.
    Wait(Busy),
}

/// Why nobody serves a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Those that could be asked are busy, and the request does not wait for them.
    Busy(Busy),
    /// The last try failed, of this, and no answer came.
    Failed(Code),
    /// All targets refuse the key that Zap sends.
    KeysRefused,
    /// No target takes requests.
    NoBackend,
}

/// Targets that a request may wait for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Busy {
    /// The first that reopens by itself: when, which backend, and whether its quota is what one waits for.
    pub opens: Option<(Nanos, BackendId, bool)>,
    /// Backends that are full, each once.
    pub full: Vec<BackendId>,
}

/// What came of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The connection failed, or what came is no answer.
    Broke(Code),
    /// Zap is on its way out.
    Cut,
    /// This machine had no file or port to connect with: no fault of the backend.
    Exhausted,
    /// The head of an answer is here. `own_key`: the request carried a key that Zap put in.
    Head {
        /// Its status.
        status: u16,
        /// See above.
        own_key: bool,
    },
    /// No answer came in time.
    TimedOut,
}

/// What an event means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The answer goes to the client, unless its body breaks before the first byte.
    Deliver,
    /// The try failed.
    Failed(Failure),
}

/// A try that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Why, for metrics and log.
    pub code: Code,
    /// It counts against the backend.
    pub blame: bool,
    /// What the status asks to be done with the target.
    pub mark: Option<Mark>,
    /// The answer is kept, to be delivered if nobody has a better one.
    pub keep: bool,
    /// No other target is asked.
    fatal: bool,
    /// This target is not asked again.
    once: bool,
}

/// What an answer asks to be done with its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The key is refused: close the backend for a while.
    BadKey,
    /// Leave the target alone as long as the answer says.
    Cool,
}

impl Failure {
    fn new(code: Code) -> Self {
        Failure { code, blame: false, mark: None, keep: false, fatal: false, once: false }
    }
}

/// The course of one request.
#[derive(Debug)]
pub(crate) struct Dispatch {
    rules: Rules,
    /// Targets in the order in which they were first asked: later rounds follow it.
    order: Vec<TargetId>,
    /// Targets asked in this round.
    tried: Vec<TargetId>,
    /// Targets that are not asked again.
    once: Vec<TargetId>,
    /// The target that is being asked.
    asked: Option<TargetId>,
    /// Targets that had no place left since the last look.
    missed: Vec<TargetId>,
    rounds: u32,
    tries: u32,
    /// The budget has been asked for the next try.
    is_paid: bool,
    /// An answer is kept.
    has_answer: bool,
    /// Why the last try failed.
    failed: Option<Code>,
    is_over: bool,
}

/// What a look at the fleet found.
enum Look {
    Busy {
        busy: Busy,
        panic: bool,
    },
    KeysRefused,
    Nobody,
    Target {
        target: TargetId,
        panic: bool,
    },
    /// All that could be asked were.
    Tried,
}

impl Dispatch {
    /// Nobody has been asked yet.
    pub(crate) fn new(rules: Rules) -> Self {
        Dispatch {
            rules,
            order: Vec::new(),
            tried: Vec::new(),
            once: Vec::new(),
            asked: None,
            missed: Vec::new(),
            rounds: 0,
            tries: 0,
            is_paid: false,
            has_answer: false,
            failed: None,
            is_over: false,
        }
    }

    /// Targets asked in this round.
    pub(crate) fn tried(&self) -> &[TargetId] {
        &self.tried
    }

    /// Decides what to do at `now`. `random` gives any number: the jitter of a backoff.
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
        match self.look(now, fleet) {
            Look::Target { target, panic } => {
                if !self.pay(now, budget) {
                    return self.end();
                }
                self.asked = Some(target);
                Do::Try { target, until: self.share(now, fleet), panic }
            }
            // Targets that are out are waited for only where the request waited already.
            Look::Busy { busy, panic } if panic && !fleet.stands_in_line() => Do::Refuse(Refusal::Busy(busy)),
            Look::Busy { busy, .. } => Do::Wait(busy),
            Look::KeysRefused => Do::Refuse(Refusal::KeysRefused),
            Look::Nobody => Do::Refuse(Refusal::NoBackend),
            Look::Tried => self.another_round(now, fleet, budget, random()),
        }
    }

    /// The target had no place any more: another request came first.
    pub(crate) fn missed(&mut self) {
        self.missed.extend(self.asked.take());
    }

    /// Judges what came of the try. After [`Verdict::Deliver`] a further event says that the body broke.
    pub(crate) fn on(&mut self, event: Event) -> Verdict {
        let failure = match event {
            Event::Broke(code) => Failure { blame: true, ..Failure::new(code) },
            Event::Cut => Failure { fatal: true, ..Failure::new(Code::Draining) },
            Event::Exhausted => Failure::new(Code::UpstreamUnreachable),
            Event::TimedOut => Failure { blame: true, once: true, ..Failure::new(Code::UpstreamTimeout) },
            Event::Head { status, own_key } => match judge(status, own_key) {
                Outcome::Deliver => return Verdict::Deliver,
                Outcome::Failure => Failure { blame: true, keep: true, ..Failure::new(Code::UpstreamError) },
                Outcome::Refused => Failure { keep: true, once: true, ..Failure::new(Code::UpstreamRefused) },
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
        self.is_paid = false;
        self.failed = Some(failure.code);
        self.is_over = failure.fatal;
        self.missed.clear();
        // An error that ends the request comes before any answer.
        self.has_answer = (self.has_answer || failure.keep) && !failure.fatal;
        let Some(target) = self.asked.take() else { return };
        self.tried.push(target);
        if failure.once {
            self.once.push(target);
        }
        if !self.order.contains(&target) {
            self.order.push(target);
        }
    }

    /// Nothing further is tried: the last answer as it came, or where none came an error.
    fn end(&self) -> Do {
        match self.failed {
            _ if self.has_answer => Do::Deliver,
            code => Do::Refuse(Refusal::Failed(code.unwrap_or(Code::UpstreamTimeout))),
        }
    }

    /// Asks the budget for a further try, once.
    fn pay(&mut self, now: Nanos, budget: &Budget) -> bool {
        self.is_paid = self.is_paid || self.tries == 0 || budget.try_withdraw(now);
        self.is_paid
    }

    /// Until when a try may wait for its head: its share of what is left, by the targets still untried that are up; where
    /// none is up, by all that are untried.
    fn share(&self, now: Nanos, fleet: &impl Fleet) -> Nanos {
        let is_up = |id: &TargetId| !matches!(fleet.check(*id), Err(Closed::Out(_)));
        let untried = || fleet.all().targets().filter(|id| !self.tried.contains(id));
        let sharers = match fleet.up() {
            up if up > 0 && self.tried.is_empty() => up,
            _ => match untried().filter(is_up).count() {
                0 => untried().count().max(1),
                up => up,
            },
        };
        now + self.rules.deadline.saturating_sub(now) / sharers as u64
    }

    fn look(&mut self, now: Nanos, fleet: &impl Fleet) -> Look {
        let missed = std::mem::take(&mut self.missed);
        // In a later round a target that has reopened comes before those that failed already.
        let known = if self.rounds == 0 { &self.tried } else { &self.order };
        let (is_first, passed) = (known.is_empty(), |id| known.contains(&id) || missed.contains(&id));
        if let Some(target) = choose::pick(fleet, is_first, passed) {
            self.missed = missed;
            return Look::Target { target, panic: false };
        }
        let Survey { busy, is_up, is_refused, has_ejected } = Survey::of(now, fleet, known);
        if has_ejected && !is_up {
            if let Some(target) = choose::in_panic(fleet, is_first, passed) {
                self.missed = missed;
                return Look::Target { target, panic: true };
            }
            let busy = Survey::of_ejected(now, fleet);
            return match () {
                () if !is_first => Look::Tried,
                () if busy.is_empty() => Look::Nobody,
                () => Look::Busy { busy, panic: true },
            };
        }
        let is_left = |id: &TargetId| !self.tried.contains(id) && !missed.contains(id);
        let rest = self.order.iter().copied().filter(|_| self.rounds > 0).filter(is_left);
        if let Some(target) = choose::in_order(fleet, rest) {
            self.missed = missed;
            return Look::Target { target, panic: false };
        }
        match () {
            () if !is_first => Look::Tried,
            () if !busy.is_empty() => Look::Busy { busy, panic: false },
            () if is_refused => Look::KeysRefused,
            () => Look::Nobody,
        }
    }

    /// All targets have been asked: those that may be asked again are, after a backoff.
    fn another_round(&mut self, now: Nanos, fleet: &impl Fleet, budget: &Budget, random: u64) -> Do {
        let may_come_again = |id: &TargetId| !self.once.contains(id) && fleet.check(*id).is_ok();
        let Rules { base_delay, max_delay, deadline, .. } = self.rules;
        let wait = backoff(base_delay, max_delay, self.rounds, random).as_nanos();
        let until = now.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX));
        if !self.order.iter().any(may_come_again) || until >= deadline || !self.pay(now, budget) {
            return self.end();
        }
        self.tried.clone_from(&self.once);
        self.rounds += 1;
        Do::Backoff { until }
    }
}

/// Why nobody can be asked.
#[derive(Default)]
struct Survey {
    busy: Busy,
    /// A target is up, be it busy or asked before.
    is_up: bool,
    /// The key of one is refused.
    is_refused: bool,
    /// One that was not asked before is ejected.
    has_ejected: bool,
}

impl Survey {
    fn of(now: Nanos, fleet: &impl Fleet, known: &[TargetId]) -> Self {
        let mut survey = Survey::default();
        for id in fleet.all().targets() {
            let closed = fleet.check(id);
            let is_known = known.contains(&id);
            match closed {
                Err(Closed::Out(Status::Misconfigured)) => survey.is_refused = true,
                Err(Closed::Out(_)) => survey.has_ejected |= !is_known,
                _ => survey.is_up = true,
            }
            if !is_known {
                survey.busy.note(now, fleet.backend(id), closed);
            }
        }
        survey
    }

    /// What the ejected targets wait for.
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

    /// What a look at `backend` found.
    fn note(&mut self, now: Nanos, backend: BackendId, closed: Result<(), Closed>) {
        match closed {
            Err(Closed::Cooling(at)) => self.opens(at, backend, false),
            Err(Closed::Quota(at)) => self.opens(at, backend, true),
            Err(Closed::Full) if !self.full.contains(&backend) => self.full.push(backend),
            Err(Closed::Full | Closed::Out(_)) => {}
            // It has just opened.
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
