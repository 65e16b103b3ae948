//! Why no target can take a request, and when the first one can.

use crate::policy::balance::BackendId;
use crate::policy::breaker::Status;
use crate::policy::choose::{Closed, Fleet};
use crate::policy::route::TargetId;
use crate::policy::spend::Refused;
use crate::time::Nanos;

/// Busy targets that a request may wait for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Busy {
    /// The target that reopens first: the time, its backend, and whether a quota is the reason.
    pub opens: Option<(Nanos, BackendId, bool)>,
    /// Full backends, each listed once.
    pub full: Vec<BackendId>,
    /// Backends whose quota is taken by what other requests have reserved, each listed once.
    pub reserved: Vec<BackendId>,
    /// When the first ejected target may be tried.
    pub trial: Option<Nanos>,
}

/// Why no target is available.
#[derive(Default)]
pub(super) struct Survey {
    pub(super) busy: Busy,
    /// Whether a target is up. It may be busy or already tried.
    pub(super) is_up: bool,
    /// Whether a target refuses Zap's key.
    pub(super) has_refused_key: bool,
    /// Whether an untried target is ejected.
    pub(super) has_ejected: bool,
    /// Whether the request is too large for an untried target.
    pub(super) is_too_large: bool,
    /// Why the budgets of untried targets refuse the request; [`Refused::Reserved`] takes precedence.
    pub(super) budget: Option<Refused>,
}

impl Survey {
    pub(super) fn of(now: Nanos, fleet: &impl Fleet, known: impl Fn(TargetId) -> bool) -> Self {
        let mut survey = Survey::default();
        for id in fleet.all().targets() {
            let closed = fleet.check(id);
            let is_known = known(id);
            match closed {
                Err(Closed::Out(Status::Unauthorized)) => survey.has_refused_key = true,
                Err(Closed::Out(_)) => survey.has_ejected |= !is_known,
                Err(Closed::Budget(why)) if survey.budget != Some(Refused::Reserved) && !is_known => {
                    survey.budget = Some(why);
                }
                Err(Closed::TooLarge) => survey.is_too_large |= !is_known,
                Err(Closed::Budget(_) | Closed::Elsewhere) => {}
                _ => survey.is_up = true,
            }
            if !is_known {
                survey.busy.note(now, fleet.backend(id), closed);
                if matches!(closed, Err(Closed::Out(_))) {
                    survey.busy.note_trial(fleet.trial(id));
                }
            }
        }
        survey
    }

    /// The permits, cooldowns and quotas that a request for the ejected targets must wait for.
    pub(super) fn of_ejected(now: Nanos, fleet: &impl Fleet, known: impl Fn(TargetId) -> bool) -> Busy {
        let mut busy = Busy::default();
        let unknown = fleet.all().targets().filter(|id| !known(*id));
        unknown.for_each(|id| busy.note(now, fleet.backend(id), fleet.check_ejected(id)));
        busy
    }
}

impl Busy {
    pub(super) fn is_empty(&self) -> bool {
        self.opens.is_none() && !self.is_open_ended()
    }

    /// Whether a backend may reopen at a time that nobody knows.
    pub(crate) fn is_open_ended(&self) -> bool {
        !self.full.is_empty() || !self.reserved.is_empty()
    }

    fn note_trial(&mut self, at: Option<Nanos>) {
        self.trial = self.trial.into_iter().chain(at).min();
    }

    /// Adds the `result` of a check of `backend`.
    pub(super) fn note(&mut self, now: Nanos, backend: BackendId, result: Result<(), Closed>) {
        match result {
            Err(Closed::Cooling(at)) => self.opens(at, backend, false),
            Err(Closed::Quota(at)) => self.opens(at, backend, true),
            Err(Closed::Full) if !self.full.contains(&backend) => self.full.push(backend),
            Err(Closed::Reserved) if !self.reserved.contains(&backend) => self.reserved.push(backend),
            Err(
                Closed::Full
                | Closed::Reserved
                | Closed::Out(_)
                | Closed::Budget(_)
                | Closed::Elsewhere
                | Closed::TooLarge,
            ) => {}
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
