//! The error codes: one word for each cause.

macro_rules! codes {
    ($($variant:ident $text:literal,)*) => {
        /// The `code` of an error and the `reason` or `kind` of a metric.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub(crate) enum Code { $($variant,)* }

        impl Code {
            /// All codes, in the order of declaration.
            pub(crate) const ALL: [Code; codes!(@count $($variant)*)] = [$(Code::$variant,)*];

            /// Returns the code as text, for answers and metric labels.
            pub(crate) const fn text(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            /// Whether the code only tells why a try failed: it appears in metrics and the log, but in no answer of
            /// Zap's own.
            pub(crate) const fn is_label(self) -> bool {
                matches!(
                    self,
                    Code::StreamInterrupted
                        | Code::UpstreamError
                        | Code::UpstreamErrorEvent
                        | Code::UpstreamRefused
                )
            }
        }
    };
    (@count $($v:ident)*) => { [$(stringify!($v)),*].len() };
}

codes! {
    BadRequest "bad_request",
    Draining "draining",
    DuplicateKey "duplicate_key",
    ExpectationFailed "expectation_failed",
    InsufficientQuota "insufficient_quota",
    InternalError "internal_error",
    InvalidAdminToken "invalid_admin_token",
    InvalidApiKey "invalid_api_key",
    InvalidJson "invalid_json",
    InvalidMultipart "invalid_multipart",
    InvalidType "invalid_type",
    LedgerUnavailable "ledger_unavailable",
    MemoryFull "memory_full",
    MethodNotAllowed "method_not_allowed",
    MisdirectedRequest "misdirected_request",
    MissingMessages "missing_messages",
    MissingModel "missing_model",
    ModelNotFound "model_not_found",
    NoBackend "no_backend",
    OriginNotAllowed "origin_not_allowed",
    QueueFull "queue_full",
    QueueTimeout "queue_timeout",
    RateLimitExceeded "rate_limit_exceeded",
    RequestTimeout "request_timeout",
    RequestTooLarge "request_too_large",
    RequestTooLargeForLimit "request_too_large_for_limit",
    ResponseNotFound "response_not_found",
    StreamInterrupted "stream_interrupted",
    TooManyConnections "too_many_connections",
    UnknownUrl "unknown_url",
    UnsupportedContentEncoding "unsupported_content_encoding",
    UpgradeRequired "upgrade_required",
    UpstreamAuthError "upstream_auth_error",
    UpstreamEmpty "upstream_empty",
    UpstreamError "upstream_error",
    UpstreamErrorEvent "upstream_error_event",
    UpstreamInvalidResponse "upstream_invalid_response",
    UpstreamRateLimited "upstream_rate_limited",
    UpstreamRedirect "upstream_redirect",
    UpstreamRefused "upstream_refused",
    UpstreamTimeout "upstream_timeout",
    UpstreamTlsError "upstream_tls_error",
    UpstreamUnreachable "upstream_unreachable",
}
