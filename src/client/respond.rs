//! Answers of Zap's own, as they look to a client.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{HeaderName, Response, StatusCode};

use crate::client::body::Body;

/// What an error says, in OpenAI's terms.
#[derive(Debug)]
pub(crate) struct ErrorBody<'a> {
    /// What happened, and what to do next.
    pub message: &'a str,
    /// The class of the error.
    pub kind: &'static str,
    /// The member of the request that is to blame.
    pub param: Option<&'a str>,
    /// What happened, in one word.
    pub code: &'static str,
}

/// An error: `{"error":{"message":…,"type":…,"param":…,"code":…}}`, with further headers.
pub(crate) fn error<S>(
    status: StatusCode,
    error: &ErrorBody<'_>,
    headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>,
) -> Response<Body<S>> {
    let string = |s: &str| serde_json::Value::from(s);
    let json = format!(
        "{{\"error\":{{\"message\":{},\"type\":\"{}\",\"param\":{},\"code\":\"{}\"}}}}",
        string(error.message),
        error.kind,
        error.param.map_or(serde_json::Value::Null, string),
        error.code
    );
    let mut response = text(status, "application/json", json.into());
    response.headers_mut().extend(headers);
    response
}

/// A text in one piece.
pub(crate) fn text<S>(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body<S>> {
    let mut response = Response::new(Body::full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
