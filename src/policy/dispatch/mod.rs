//! Decides the next step of one request: try a target, wait, back off, deliver or refuse. Does no I/O.
//!
//! The gateway gets the next step from [`Dispatch::next`], carries it out, and reports the result to [`Dispatch::on`].
//! Time, the state of the fleet and randomness are arguments, so that tests need no sockets and no clock. The design
//! follows quinn-proto, whose connection is a pure state machine too.

mod blame;

mod judge;

mod keys;

mod step;

mod survey;

use std::cell::Cell;

use crate::code::Code;
use crate::policy::balance::BackendId;
use crate::policy::choose;
use crate::policy::choose::{Closed, Fleet};
use crate::policy::dispatch::blame::{Answer, Answers};
pub(crate) use crate::policy::dispatch::judge::{Event, Failure, Mark, Unfit, Verdict};
use crate::policy::dispatch::keys::has_failed;
pub(crate) use crate::policy::dispatch::step::{Do, Refusal, Rules};
pub(crate) use crate::policy::dispatch::survey::Busy;
use crate::policy::dispatch::survey::Survey;
use crate::policy::retry::{Budget, backoff};
use crate::policy::route::TargetId;
use crate::time::Nanos;

/// How often one request comes back to targets that made it wait.
const MAX_RETURNS: u32 = 10;

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
    /// Targets that made the request wait. It may come back to them once they have reopened: that costs neither a try
    /// nor budget.
    waited: Vec<TargetId>,
    /// Number of times that the request has come back.
    returns: u32,
    rounds: u32,
    /// Tries that count towards `max_retries`.
    tries: u32,
    /// Whether each target gets one try only.
    is_single_round: bool,
    /// Whether the present try is one in panic mode.
    is_panic: bool,
    /// Targets that failed in this round in a way that another key of their backend does not change.
    backend_failed: Vec<TargetId>,
    /// The target whose key has failed the last try, if that counted as a try.
    key_failed: Option<TargetId>,
    /// How many tries have taken the place of one that failed for its key.
    other_keys: u32,
    /// Whether a target did not have what the request refers to.
    is_search: bool,
    /// What the targets answered.
    answers: Answers,
    /// Whether the next try has been charged to the retry budget.
    is_charged: bool,
    /// Whether the try after the present one has been charged already.
    is_next_charged: Cell<bool>,
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
    /// No target can take the request, whether it waits or not.
    Refuse(Refusal),
    Target {
        target: TargetId,
        panic: bool,
    },
    /// All usable targets have been tried in this round; others are busy.
    Tried(Busy),
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
            waited: Vec::new(),
            returns: 0,
            rounds: 0,
            tries: 0,
            is_single_round: false,
            is_panic: false,
            backend_failed: Vec::new(),
            key_failed: None,
            other_keys: 0,
            is_search: false,
            answers: Answers::default(),
            is_charged: false,
            is_next_charged: Cell::new(false),
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
        if self.is_over || self.tries > 0 && now >= self.rules.deadline {
            return self.end(fleet);
        }
        if let Some(target) = self.other_key(fleet) {
            (self.current, self.is_panic) = (Some(target), false);
            return Do::Try { target, panic: false };
        }
        // All tries have been made.
        if self.tries > self.rules.max_retries {
            return self.come_back(now, fleet);
        }
        match self.select(now, fleet) {
            Selection::Target { target, panic } => {
                if self.waited.contains(&target) {
                    self.returns += 1;
                } else if !self.charge(now, budget) {
                    return self.come_back(now, fleet);
                }
                (self.current, self.is_panic) = (Some(target), panic);
                Do::Try { target, panic }
            }
            // In panic mode, a new request is refused; only a request that already waits, or has met a cooldown, waits.
            Selection::Busy { busy, panic } if panic && !fleet.is_waiting() && self.failed.is_none() => {
                Do::Refuse(Refusal::Busy(busy))
            }
            // The last answer says more than an error of Zap's own.
            Selection::Busy { busy, .. } if self.failed.is_some() && !self.opens_in_time(&busy) => {
                self.end(fleet)
            }
            Selection::Busy { busy, .. } => Do::Wait(busy),
            Selection::Refuse(_) if self.failed.is_some() => self.end(fleet),
            Selection::Refuse(why) => Do::Refuse(why),
            Selection::Tried(busy) => self.next_round(now, fleet, budget, (busy, random())),
        }
    }

    /// Without the right to ask another target, the request can still come back to those that made it wait.
    fn come_back(&mut self, now: Nanos, fleet: &impl Fleet) -> Do {
        if self.returns < MAX_RETURNS {
            if let Some(target) = choose::in_order(fleet, self.waited.iter().copied()) {
                self.returns += 1;
                (self.current, self.is_panic) = (Some(target), false);
                return Do::Try { target, panic: false };
            }
            let mut busy = Busy::default();
            self.waited.iter().for_each(|id| busy.note(now, fleet.backend(*id), fleet.check(*id)));
            if self.opens_in_time(&busy) {
                return Do::Wait(busy);
            }
        }
        self.end(fleet)
    }

    /// Whether the request waits for one of these busy targets after a failed try.
    fn opens_in_time(&self, busy: &Busy) -> bool {
        busy.is_open_ended() || busy.opens.is_some_and(|(at, ..)| at <= self.rules.wait_until)
    }

    /// Whether another target is left at `now` if the present try fails: the client then need not get its response.
    pub(crate) fn has_next(&self, now: Nanos, fleet: &impl Fleet, budget: &Budget) -> bool {
        self.has_next_target(fleet) && budget.has_room(now)
    }

    /// Takes the right to another try at `now`, because the present one is about to be given up. Many requests may do
    /// so at once, so the try is charged here. Returns `false` if none is left.
    pub(crate) fn claim_next(&self, now: Nanos, fleet: &impl Fleet, budget: &Budget) -> bool {
        let is_claimed =
            self.has_next_target(fleet) && (self.is_next_charged.get() || budget.try_withdraw(now));
        self.is_next_charged.set(self.is_next_charged.get() || is_claimed);
        is_claimed
    }

    fn has_next_target(&self, fleet: &impl Fleet) -> bool {
        let is_left = |id: TargetId| Some(id) != self.current && !self.is_known(id, fleet);
        let may_take = |id: TargetId| match self.is_panic {
            true => fleet.check_ejected(id).is_ok(),
            false => fleet.check(id).is_ok(),
        };
        self.tries < self.rules.max_retries && fleet.all().targets().any(|id| is_left(id) && may_take(id))
    }

    /// The targets to blame now that the request has ended. `was_served`: a target has served it. `pool`: as
    /// [`Fleet::pool`].
    pub(crate) fn blamed(
        &self,
        was_served: bool,
        pool: impl Fn(TargetId) -> BackendId,
    ) -> impl Iterator<Item = TargetId> {
        self.answers.blamed(was_served, pool)
    }

    /// The targets to blame if the client has left, so that nobody knows what the others would have answered.
    pub(crate) fn silent(&self) -> impl Iterator<Item = TargetId> {
        self.answers.silent()
    }

    /// Allows one try only for each target: the client retries by itself.
    pub(crate) fn forbid_rounds(&mut self) {
        self.is_single_round = true;
        self.tried.append(&mut self.waited);
    }

    /// Reports that another request took the target's last permit.
    pub(crate) fn missed(&mut self) {
        self.missed.extend(self.current.take());
    }

    /// Judges the result of the try. After [`Verdict::Deliver`], a second event reports that the body is unfit.
    pub(crate) fn on(&mut self, event: Event) -> Verdict {
        let verdict = match (judge::verdict(event), event) {
            // The target serves others, and still has no room for this request after a wait: the request is to blame.
            (Verdict::Failed(failure), Event::Head { status: 429, is_alive: true, .. })
                if self.has_returned() =>
            {
                Verdict::Failed(Failure { mark: Some(Mark::NoResult), no_retry: true, ..failure })
            }
            (verdict, _) => verdict,
        };
        match (verdict, event) {
            (Verdict::Failed(failure), _) => self.fail(failure),
            (Verdict::Deliver, Event::Head { status, .. }) if (400..500).contains(&status) => {
                self.note(Answer::Refused(status));
            }
            // The target has served the request after all, or the request asks for what it cannot do.
            (Verdict::Deliver, _) => {
                if let Some(target) = self.current {
                    self.answers.forget(target);
                }
            }
        }
        verdict
    }

    /// Whether the present target has made the request wait before.
    fn has_returned(&self) -> bool {
        self.current.is_some_and(|target| self.waited.contains(&target))
    }

    fn note(&mut self, answer: Answer) {
        if let Some(target) = self.current {
            self.answers.note(target, answer);
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.note(failure.answer);
        self.failed = Some(failure.code);
        self.is_over = failure.is_fatal;
        self.missed.clear();
        // A fatal error takes precedence over a kept response.
        self.has_response = (self.has_response || failure.keep) && !failure.is_fatal;
        let Some(target) = self.current.take() else { return };
        let has_waited = self.waited.contains(&target);
        if failure.is_a_wait() && self.rules.max_retries > 0 && !self.is_single_round {
            // The target is closed until it has cooled down; then the request may come back.
            if !has_waited {
                self.waited.push(target);
                self.key_failed = Some(target);
                self.tries += 1;
                self.is_charged = self.is_next_charged.take();
            }
            return;
        }
        self.waited.retain(|id| *id != target);
        if !failure.is_search {
            self.tries += 1;
            self.is_charged = self.is_next_charged.take();
        }
        self.tried.push(target);
        match failure {
            // Another key may be that of another organization.
            Failure { is_search: true, .. } => self.is_search = true,
            _ if failure.is_of_key() => self.key_failed = Some(target),
            _ => self.backend_failed.push(target),
        }
        if failure.no_retry {
            self.excluded.push(target);
        }
        if !self.order.contains(&target) {
            self.order.push(target);
        }
    }

    /// The final step: deliver the last kept response, or refuse if there is none.
    fn end(&self, fleet: &impl Fleet) -> Do {
        let has_answered = |id: TargetId| self.excluded.contains(&id);
        match self.failed {
            // That others do not have it says nothing while one of them has not answered: the client may ask again.
            _ if self.is_search && !self.is_over && !fleet.all().targets().all(has_answered) => {
                Do::Refuse(Refusal::Failed(Code::UpstreamUnreachable))
            }
            _ if self.has_response => Do::Deliver,
            code => Do::Refuse(Refusal::Failed(code.unwrap_or(Code::UpstreamTimeout))),
        }
    }

    /// Charges the next try to the retry budget, once. The first try is free. Returns whether the try may be made.
    fn charge(&mut self, now: Nanos, budget: &Budget) -> bool {
        self.is_charged = self.is_charged || self.tries == 0 || budget.try_withdraw(now);
        self.is_charged
    }

    fn select(&mut self, now: Nanos, fleet: &impl Fleet) -> Selection {
        let missed = std::mem::take(&mut self.missed);
        // In a later round, a reopened target that was never tried comes before targets that failed.
        let tried = if self.rounds == 0 { &self.tried } else { &self.order };
        let known = |id: TargetId| tried.contains(&id) || has_failed(&self.backend_failed, id, fleet);
        let skip = |id: TargetId| known(id) || missed.contains(&id);
        // Only the first try moves the rotation.
        let (is_first, advances) = (tried.is_empty(), self.tries == 0);
        if let Some(target) = choose::pick(fleet, advances, skip) {
            self.missed = missed;
            return Selection::Target { target, panic: false };
        }
        let survey = Survey::of(now, fleet, known);
        let Survey { busy, is_up, has_refused_key, has_ejected, budget, is_too_large } = survey;
        if has_ejected && !is_up {
            if let Some(target) = choose::in_panic(fleet, advances, skip) {
                self.missed = missed;
                return Selection::Target { target, panic: true };
            }
            let busy = Survey::of_ejected(now, fleet, known);
            return match () {
                () if !is_first => Selection::Tried(busy),
                () if busy.is_empty() => Selection::Refuse(Refusal::NoBackend),
                () => Selection::Busy { busy, panic: true },
            };
        }
        let is_left = |id: &TargetId| !self.is_known(*id, fleet) && !missed.contains(id);
        let rest = self.order.iter().copied().filter(|_| self.rounds > 0).filter(is_left);
        if let Some(target) = choose::in_order(fleet, rest) {
            self.missed = missed;
            return Selection::Target { target, panic: false };
        }
        match budget {
            _ if !is_first => Selection::Tried(busy),
            _ if !busy.is_empty() => Selection::Busy { busy, panic: false },
            Some(why) => Selection::Refuse(Refusal::Budget(why)),
            None if has_refused_key => Selection::Refuse(Refusal::KeysRefused),
            None if is_too_large => Selection::Refuse(Refusal::TooLarge),
            None => Selection::Refuse(Refusal::NoBackend),
        }
    }

    /// All targets have been tried: starts another round after a backoff, if a target may be retried, or else waits for
    /// a busy one.
    fn next_round(
        &mut self,
        now: Nanos,
        fleet: &impl Fleet,
        budget: &Budget,
        (mut busy, random): (Busy, u64),
    ) -> Do {
        let may_retry = |id: &TargetId| !self.excluded.contains(id) && fleet.check(*id).is_ok();
        let Rules { base_delay, max_delay, deadline, wait_until, .. } = self.rules;
        if self.is_single_round || !self.order.iter().any(may_retry) {
            if !self.is_single_round {
                self.wait_for_cooling(now, fleet, &mut busy);
            }
            let reopens = busy.opens.is_some_and(|(at, ..)| at <= wait_until);
            // The target that has it may be full.
            let waits = reopens || self.is_search && busy.is_open_ended();
            return if waits { Do::Wait(busy) } else { self.end(fleet) };
        }
        let wait = backoff(base_delay, max_delay, self.rounds, random).as_nanos();
        let until = now.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX));
        if until >= deadline || !self.charge(now, budget) {
            return self.come_back(now, fleet);
        }
        self.tried.clone_from(&self.excluded);
        self.backend_failed.clear();
        self.rounds += 1;
        Do::Backoff { until }
    }

    /// Adds to `busy` the targets that have failed and cool down: once they reopen in time, the request may come back.
    fn wait_for_cooling(&mut self, now: Nanos, fleet: &impl Fleet, busy: &mut Busy) {
        for id in self.order.clone() {
            let state = fleet.check(id);
            let is_in_time = matches!(state, Err(Closed::Cooling(at)) if at <= self.rules.wait_until);
            if is_in_time && !self.excluded.contains(&id) {
                busy.note(now, fleet.backend(id), state);
                self.waited.push(id);
                for known in [&mut self.tried, &mut self.order, &mut self.backend_failed] {
                    known.retain(|known| *known != id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
