//! Who is to blame for the failures of one request: a target, or the request itself.
//!
//! A target is shared, so it is never judged by one request alone: what other targets answered to the same request
//! decides.

use crate::policy::balance::BackendId;
use crate::policy::route::TargetId;

/// What a target answered to the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A failure with this status: of the response, or of an error inside a 200.
    Failed(u16),
    /// A status that says nothing about the target: the wait for a limit, a refused key.
    Neutral,
    /// No answer: a time-out, a cut, silence.
    None,
    /// A 4xx that may be due to the request.
    Refused(u16),
}

/// The last answer of each target that was asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answers(Vec<(TargetId, Answer)>);

impl Answers {
    /// Notes the answer of a target, in place of an earlier one.
    pub(crate) fn note(&mut self, target: TargetId, answer: Answer) {
        match self.0.iter_mut().find(|(id, _)| *id == target) {
            Some((_, known)) => *known = answer,
            None => self.0.push((target, answer)),
        }
    }

    /// Forgets what a target answered before.
    pub(crate) fn forget(&mut self, target: TargetId) {
        self.0.retain(|(id, _)| *id != target);
    }

    /// The targets that gave no answer at all. That is not due to the request, whatever others would have answered.
    pub(crate) fn silent(&self) -> impl Iterator<Item = TargetId> {
        self.0.iter().filter(|(_, answer)| *answer == Answer::None).map(|(id, _)| *id)
    }

    /// The targets that are to blame now that the request has ended. `was_served`: another target has served it. If
    /// nobody has, and all that answered gave the same status or one of them a 4xx, the request is to blame. Two keys
    /// of one backend, which have the same `pool`, are no two opinions.
    pub(crate) fn blamed(
        &self,
        was_served: bool,
        pool: impl Fn(TargetId) -> BackendId,
    ) -> impl Iterator<Item = TargetId> {
        let is_failure = |answer: &Answer| matches!(answer, Answer::Failed(_) | Answer::None);
        let mut statuses = self.0.iter().filter_map(|(id, answer)| match answer {
            Answer::Failed(status) => Some((pool(*id), *status)),
            Answer::Neutral | Answer::None | Answer::Refused(_) => None,
        });
        let first = statuses.next();
        let is_other = |(backend, _): (BackendId, u16)| first.is_some_and(|(known, _)| known != backend);
        let has_other = statuses.clone().any(is_other);
        let is_same =
            has_other && statuses.all(|(_, status)| first.is_some_and(|(_, known)| known == status));
        let is_refused = self.0.iter().any(|(_, answer)| matches!(answer, Answer::Refused(_)));
        let blames_request = !was_served && (is_same || is_refused);
        self.0.iter().filter(move |(_, answer)| !blames_request && is_failure(answer)).map(|(id, _)| *id)
    }
}
