//! One row of the table of errors: the response to an error of Zap's own.

use std::borrow::Cow;

use http::StatusCode;

use crate::code::Code;
use crate::time::Nanos;

/// The type of errors of limits.
pub(crate) const LIMIT: &str = "rate_limit_error";

/// The response to an error.
#[derive(Debug)]
pub(crate) struct ErrorRow {
    /// The status.
    pub status: StatusCode,
    /// The `type`.
    pub kind: &'static str,
    /// The `code`.
    pub code: Code,
    /// The message.
    pub message: Cow<'static, str>,
    /// The time for `Retry-After`.
    pub retry_after: Option<Nanos>,
    /// Whether the connection closes after the response.
    pub close: bool,
}

/// A row without `Retry-After`, after which the connection stays open.
pub(crate) fn row(
    status: StatusCode,
    kind: &'static str,
    code: Code,
    message: impl Into<Cow<'static, str>>,
) -> ErrorRow {
    ErrorRow { status, kind, code, message: message.into(), retry_after: None, close: false }
}

impl ErrorRow {
    /// The row with a `Retry-After`.
    pub(crate) fn after(self, wait: Nanos) -> Self {
        ErrorRow { retry_after: Some(wait), ..self }
    }
}
