//! Judges the result of a try: whether the request goes on, and what it means for the target.

use crate::code::Code;
use crate::policy::dispatch::blame::Answer;
use crate::policy::retry::{Outcome, judge};

/// The result of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The connection failed before the head of a response, or the response is not HTTP.
    Broke(Code),
    /// Zap is shutting down and cut the try.
    Cut,
    /// The target was ejected while the request waited for it.
    Ejected,
    /// This machine has no free file or port for a connection. The backend is not to blame.
    Exhausted,
    /// The head of a response has arrived.
    Head {
        /// The status.
        status: u16,
        /// Whether the request carried a key from Zap's configuration.
        own_key: bool,
        /// Whether the target has served another request a moment ago, and states no wait on a 429.
        is_alive: bool,
    },
    /// No response arrived in time.
    TimedOut,
    /// A good head, and then no answer.
    Unfit(Unfit),
}

/// Why a response with a good status is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// The response broke off before any content.
    CutShort,
    /// The response ended without content.
    Empty,
    /// The response is an error, which stands for this status.
    Error {
        /// The status, 400 to 599.
        status: u16,
        /// Whether the request carried a key from Zap's configuration.
        own_key: bool,
        /// Whether the target has served another request a moment ago.
        is_alive: bool,
    },
    /// A 4xx that says that the model is not there, or that the request is too long for it.
    OtherModel(u16),
    /// The target does not have what the request refers to. Nobody knows which target does.
    NotHere(u16),
    /// No content arrived in time.
    Silent,
}

/// What an event means for the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The response goes to the client, unless its body proves unfit.
    Deliver,
    /// The try failed.
    Failed(Failure),
}

/// A try that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The error code for metrics and log.
    pub code: Code,
    /// Whether the failure counts against the backend as a whole, at once.
    pub blames_backend: bool,
    /// What the response means for further requests to the target.
    pub mark: Option<Mark>,
    /// Whether to keep the response. It is delivered if no further try succeeds.
    pub keep: bool,
    /// What the failure means for the blame at the end of the request.
    pub(super) answer: Answer,
    /// Whether the request ends here, without a further try.
    pub(super) is_fatal: bool,
    /// Whether this target is excluded from further rounds.
    pub(super) no_retry: bool,
    /// Whether the target only does not have what the request refers to: that is no failure of its own, and costs
    /// neither a try nor budget.
    pub is_search: bool,
}

/// What a response means for further requests to its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The backend refused the key: take it out for a while.
    BadKey,
    /// The target has no room now: let it cool down for a moment.
    Busy,
    /// Let the target cool down for as long as the response says, or for the default time.
    Limited,
    /// The response is about the request, not about the target: if the try was a trial, another request may go in its
    /// place.
    NoResult,
}

impl Failure {
    fn new(code: Code, answer: Answer) -> Self {
        Failure {
            code,
            answer,
            blames_backend: false,
            mark: None,
            keep: false,
            is_fatal: false,
            no_retry: false,
            is_search: false,
        }
    }

    /// Whether the target will take the request once it has cooled down, so that the try costs nothing.
    pub(super) fn is_a_wait(&self) -> bool {
        matches!(self.mark, Some(Mark::Busy | Mark::Limited))
    }

    /// Whether another key of the backend may succeed.
    pub(super) fn is_of_key(&self) -> bool {
        self.is_a_wait() || self.mark == Some(Mark::BadKey)
    }

    /// Judges a response by a status that is a failure; `None` if it is none.
    fn of_status(status: u16, own_key: bool, is_alive: bool) -> Option<Failure> {
        let kept = |code, answer| Failure { keep: true, ..Failure::new(code, answer) };
        Some(match judge(status, own_key) {
            Outcome::Deliver => return None,
            Outcome::Failure => kept(Code::UpstreamError, Answer::Failed(status)),
            Outcome::Overloaded if is_alive => {
                Failure { mark: Some(Mark::Busy), ..kept(Code::UpstreamError, Answer::Neutral) }
            }
            Outcome::Overloaded => kept(Code::UpstreamError, Answer::Failed(status)),
            Outcome::Refused | Outcome::Elsewhere => {
                Failure { no_retry: true, ..kept(Code::UpstreamRefused, Answer::Refused(status)) }
            }
            Outcome::Limited => {
                let mark = Some(if is_alive { Mark::Busy } else { Mark::Limited });
                Failure { mark, ..kept(Code::UpstreamRateLimited, Answer::Neutral) }
            }
            Outcome::BadKey => {
                let mark = Some(Mark::BadKey);
                Failure { mark, no_retry: true, ..Failure::new(Code::UpstreamAuthError, Answer::Neutral) }
            }
            Outcome::Redirect => {
                Failure { is_fatal: true, ..Failure::new(Code::UpstreamRedirect, Answer::Neutral) }
            }
        })
    }

    fn of_body(unfit: Unfit) -> Failure {
        match unfit {
            Unfit::CutShort => Failure::new(Code::StreamInterrupted, Answer::None),
            Unfit::Empty => Failure::new(Code::UpstreamEmpty, Answer::Failed(502)),
            // An error that stands for a 4xx is one in every respect but one: the response is not passed on as it is.
            Unfit::Error { status, own_key, is_alive } => {
                let failure = Failure::of_status(status, own_key, is_alive);
                if let Some(failure) = failure.filter(|failure| failure.mark == Some(Mark::BadKey)) {
                    return failure;
                }
                let refused = || Failure {
                    no_retry: true,
                    ..Failure::new(Code::UpstreamRefused, Answer::Refused(status))
                };
                Failure {
                    code: Code::UpstreamErrorEvent,
                    keep: true,
                    is_fatal: false,
                    ..failure.unwrap_or_else(refused)
                }
            }
            Unfit::OtherModel(status) => {
                let answer = Answer::Refused(status);
                // A model that is not there is not there for the next request either.
                let mark = (status != 404).then_some(Mark::NoResult);
                Failure { keep: true, no_retry: true, mark, ..Failure::new(Code::UpstreamRefused, answer) }
            }
            Unfit::NotHere(status) => Failure {
                keep: true,
                no_retry: true,
                is_search: true,
                mark: Some(Mark::NoResult),
                ..Failure::new(Code::UpstreamRefused, Answer::Refused(status))
            },
            Unfit::Silent => Failure { no_retry: true, ..Failure::new(Code::UpstreamTimeout, Answer::None) },
        }
    }
}

/// Judges the result of a try.
pub(super) fn verdict(event: Event) -> Verdict {
    Verdict::Failed(match event {
        Event::Broke(code) => Failure { blames_backend: true, ..Failure::new(code, Answer::Neutral) },
        Event::Cut => Failure { is_fatal: true, ..Failure::new(Code::Draining, Answer::Neutral) },
        Event::Ejected => Failure { no_retry: true, ..Failure::new(Code::UpstreamTimeout, Answer::Neutral) },
        Event::Exhausted => Failure::new(Code::UpstreamUnreachable, Answer::Neutral),
        Event::TimedOut => Failure { no_retry: true, ..Failure::new(Code::UpstreamTimeout, Answer::None) },
        Event::Head { status, own_key, is_alive } => match Failure::of_status(status, own_key, is_alive) {
            Some(failure) => failure,
            None => return Verdict::Deliver,
        },
        Event::Unfit(unfit) => Failure::of_body(unfit),
    })
}
