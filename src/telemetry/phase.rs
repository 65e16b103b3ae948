//! The phases of a request, as metrics and log name them.

/// The phase that a request is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Phase {
    Body,
    Queued,
    Connecting,
    Waiting,
    Backoff,
    Streaming,
}

impl Phase {
    /// All phases, in the order of their discriminants.
    pub(crate) const ALL: [Phase; 6] =
        [Phase::Body, Phase::Queued, Phase::Connecting, Phase::Waiting, Phase::Backoff, Phase::Streaming];

    /// The phase as a label value.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Phase::Body => "body",
            Phase::Queued => "queued",
            Phase::Connecting => "connecting",
            Phase::Waiting => "waiting",
            Phase::Backoff => "backoff",
            Phase::Streaming => "streaming",
        }
    }
}
