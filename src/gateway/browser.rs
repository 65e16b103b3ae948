//! Requests of web pages: which are refused, the preflight of CORS, and the headers that let a page read a response
//! (<https://fetch.spec.whatwg.org/#http-cors-protocol>).
//!
//! Without client keys, any page that a user of this machine opens could spend the providers' keys. Browsers mark what
//! pages send.

use bytes::Bytes;
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderName, HeaderValue, ORIGIN, VARY,
};
use http::request::Parts;
use http::{Method, Response, StatusCode};

use crate::client::body::Body;
use crate::code::Code;
use crate::config::Server;
use crate::gateway::ClientResponse;
use crate::gateway::error_row::{ErrorRow, row};
use crate::http1::origin::{Origins, is_foreign};
use crate::protocol::Endpoint;

const REQUEST_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-allow-private-network");

/// How long a browser may keep the answer to a preflight, in seconds. Browsers keep it for less.
const MAX_AGE: &str = "86400";

/// The methods of a path that does not exist, so that the page can read the 404.
const ANY_METHOD: &str = "GET, HEAD, POST";

/// The headers of responses that a page may read: all. Browsers take `*` as a name where a response allows credentials,
/// but no response of Zap does.
const EXPOSED: &str = "*";

/// Why a request is refused before its path and its key are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SiteRefusal {
    /// `Host` is none of `server.allowed_hosts`.
    Host,
    /// A page of another origin has sent it.
    Origin,
}

impl SiteRefusal {
    /// The row of the error.
    pub(crate) fn row(self) -> ErrorRow {
        let (status, code, message) = match self {
            SiteRefusal::Host => (
                StatusCode::MISDIRECTED_REQUEST,
                Code::MisdirectedRequest,
                "The Host of the request is not a name of this gateway; the operator can list it in server.allowed_hosts.",
            ),
            SiteRefusal::Origin => (
                StatusCode::FORBIDDEN,
                Code::OriginNotAllowed,
                "A browser sent this for a page of another origin; the operator can list the page's origin in server.cors_origins.",
            ),
        };
        row(status, "invalid_request_error", code, message)
    }
}

/// Checks where a request comes from and where it is meant to go. Probes are exempt: they call by address.
///
/// `must_check_origin`: a browser sent the request for a page, and there are no client keys to keep the page out.
pub(crate) fn check(
    server: &Server,
    headers: &HeaderMap,
    endpoint: Endpoint,
    must_check_origin: bool,
) -> Result<(), SiteRefusal> {
    if endpoint.is_health_check() {
        Ok(())
    } else if !server.allowed_hosts.allow(headers) {
        Err(SiteRefusal::Host)
    } else if must_check_origin && is_foreign(headers, &server.cors_origins) {
        Err(SiteRefusal::Origin)
    } else {
        Ok(())
    }
}

/// The answer to a preflight of a listed origin; `None` if the request is none.
pub(crate) fn preflight(listed: &Origins, head: &Parts, endpoint: Endpoint) -> Option<ClientResponse> {
    let is_preflight = !listed.is_none()
        && head.method == Method::OPTIONS
        && head.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
        && head.headers.get(ORIGIN).is_some_and(|origin| listed.allow(origin.as_bytes()));
    if !is_preflight {
        return None;
    }
    let mut response = Response::new(Body::full(Bytes::new()));
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    let methods = Some(endpoint.row().allow()).filter(|methods| !methods.is_empty()).unwrap_or(ANY_METHOD);
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(methods));
    if let Some(asked) = head.headers.get(ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
    }
    if head.headers.get(REQUEST_PRIVATE_NETWORK).is_some_and(|asked| asked == "true") {
        headers.insert(ALLOW_PRIVATE_NETWORK, HeaderValue::from_static("true"));
    }
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
    Some(response)
}

/// Lets a page of a listed origin read a response. `request`: the headers of its request.
pub(crate) fn expose(listed: &Origins, request: &HeaderMap, response: &mut HeaderMap) {
    if listed.is_none() {
        return;
    }
    // Also on responses to others: a cache must not hand them to a page of a listed origin.
    response.append(VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = request.get(ORIGIN).filter(|origin| listed.allow(origin.as_bytes())) {
        let allowed = if *listed == Origins::Any { HeaderValue::from_static("*") } else { origin.clone() };
        response.insert(ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        response.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
    }
}
