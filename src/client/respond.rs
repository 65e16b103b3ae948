//! Responses of Zap's own, in the form that a client expects.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{HeaderName, Response, StatusCode};

use crate::client::body::Body;

/// The error object of the OpenAI API.
#[derive(Debug)]
pub(crate) struct ErrorBody<'a> {
    /// What happened, and what the client can do.
    pub message: &'a str,
    /// The `type`: a class of errors.
    pub kind: &'static str,
    /// The member of the request that is wrong.
    pub param: Option<&'a str>,
    /// A word that names the error.
    pub code: &'static str,
}

/// Creates an error response: `{"error":{"message":…,"type":…,"param":…,"code":…}}`, with further headers.
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
    headers.into_iter().for_each(|(name, value)| {
        response.headers_mut().insert(name, value);
    });
    response
}

/// Creates a response with a body of one piece.
pub(crate) fn text<S>(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body<S>> {
    let mut response = Response::new(Body::full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
