//! Responses of Zap's own, in the form that a client expects.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{HeaderName, Response, StatusCode};

use crate::client::body::Body;
use crate::protocol::endpoint::Protocol;
use crate::protocol::error_body::{ErrorBody, error_status};

/// Creates an error response in the shape of a protocol, with further headers. `status` is that of OpenAI's API.
pub(crate) fn error<S>(
    (protocol, status): (Protocol, StatusCode),
    error: &ErrorBody<'_>,
    headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>,
) -> Response<Body<S>> {
    let code = error_status(protocol, error.code, status.as_u16());
    let json = error.write(protocol, code);
    let status = StatusCode::from_u16(code).unwrap_or(status);
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
