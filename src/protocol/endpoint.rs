//! The endpoints.

/// What a path is for: the `endpoint` of metrics and log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
    Embeddings,
    Health,
    Images,
    Metrics,
    Models,
    Moderations,
    Other,
    Ready,
    Rerank,
    Responses,
    Speech,
    Status,
}

impl Endpoint {
    /// All of them, in the order of their discriminants.
    pub(crate) const ALL: [Endpoint; 14] = [
        Endpoint::Chat,
        Endpoint::Completions,
        Endpoint::Embeddings,
        Endpoint::Health,
        Endpoint::Images,
        Endpoint::Metrics,
        Endpoint::Models,
        Endpoint::Moderations,
        Endpoint::Other,
        Endpoint::Ready,
        Endpoint::Rerank,
        Endpoint::Responses,
        Endpoint::Speech,
        Endpoint::Status,
    ];

    /// As it stands in labels.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Endpoint::Chat => "chat",
            Endpoint::Completions => "completions",
            Endpoint::Embeddings => "embeddings",
            Endpoint::Health => "health",
            Endpoint::Images => "images",
            Endpoint::Metrics => "metrics",
            Endpoint::Models => "models",
            Endpoint::Moderations => "moderations",
            Endpoint::Other => "other",
            Endpoint::Ready => "ready",
            Endpoint::Rerank => "rerank",
            Endpoint::Responses => "responses",
            Endpoint::Speech => "speech",
            Endpoint::Status => "status",
        }
    }

    /// Its path behind a backend's API base; `None`: Zap answers it by itself.
    pub(crate) fn tail(self) -> Option<&'static str> {
        Some(match self {
            Endpoint::Chat => "/chat/completions",
            Endpoint::Completions => "/completions",
            Endpoint::Embeddings => "/embeddings",
            Endpoint::Images => "/images/generations",
            Endpoint::Moderations => "/moderations",
            Endpoint::Rerank => "/rerank",
            Endpoint::Responses => "/responses",
            Endpoint::Speech => "/audio/speech",
            Endpoint::Health
            | Endpoint::Metrics
            | Endpoint::Models
            | Endpoint::Other
            | Endpoint::Ready
            | Endpoint::Status => return None,
        })
    }

    /// Whether a request may leave its model to the backend's default.
    pub(crate) fn has_default_model(self) -> bool {
        matches!(self, Endpoint::Chat | Endpoint::Completions | Endpoint::Responses)
    }

    /// Whether a stream of it ends with `[DONE]`.
    pub(crate) fn ends_with_done(self) -> bool {
        matches!(self, Endpoint::Chat | Endpoint::Completions)
    }
}
