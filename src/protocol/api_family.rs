//! The families of APIs that clients and backends speak.

/// The family of APIs that an endpoint belongs to: it decides which backends can serve the endpoint, which headers pass
/// and what an error looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Protocol {
    #[default]
    OpenAi,
    Anthropic,
}

impl Protocol {
    /// The name of its API, for messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Protocol::OpenAi => "OpenAI",
            Protocol::Anthropic => "Anthropic",
        }
    }

    /// The headers of a client that belong to the protocol and pass to the backend, in lower case.
    pub(crate) fn headers(self) -> &'static [&'static str] {
        match self {
            Protocol::OpenAi => &["openai-beta"],
            Protocol::Anthropic => &["anthropic-beta", "anthropic-version"],
        }
    }
}
