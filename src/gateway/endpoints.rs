//! What Zap answers by itself: `/health`, `/ready`, `/metrics`, `/status`.

use std::time::SystemTime;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use serde_json::json;

use super::body::Body;
use crate::clock;
use crate::policy::SECOND;
use crate::policy::breaker::Status;
use crate::state::Shared;
use crate::telemetry::{encode, metrics};
use crate::upstream::Upstream;

/// `/health`: the process lives.
pub fn health() -> Response<Body> {
    text(StatusCode::OK, "application/json", "{\"status\":\"ok\"}".into())
}

/// `/ready`: new requests are welcome.
pub fn ready(shared: &Shared) -> Response<Body> {
    if shared.is_draining() {
        text(StatusCode::SERVICE_UNAVAILABLE, "application/json", "{\"status\":\"draining\"}".into())
    } else {
        text(StatusCode::OK, "application/json", "{\"status\":\"ready\"}".into())
    }
}

/// `/metrics`: Prometheus text.
pub fn metrics(shared: &Shared) -> Response<Body> {
    text(StatusCode::OK, encode::CONTENT_TYPE, metrics::encode(shared).into())
}

/// `/status`: the backends and their states.
pub fn status(shared: &Shared) -> Response<Body> {
    let snapshot = shared.snapshot.load();
    let backends: Vec<_> = snapshot.backends.iter().map(|b| backend(b)).collect();
    let status = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "draining": shared.is_draining(),
        "in_flight": shared.admission.in_flight(),
        "queue_depth": shared.admission.depth(),
        "backends": backends,
    });
    text(StatusCode::OK, "application/json", status.to_string().into())
}

fn backend(b: &Upstream) -> serde_json::Value {
    let now = clock::now();
    let status = b.breaker.status(now);
    let (state, cooling) = match status {
        Status::Cooling(until) => ("cooling", Some((until - now).div_ceil(SECOND / 10) as f64 / 10.0)),
        Status::Ejected => ("ejected", None),
        Status::Healthy => ("healthy", None),
        Status::Misconfigured => ("misconfigured", None),
    };
    let until = |secs: f64| clock::timestamp(SystemTime::now() + std::time::Duration::from_secs_f64(secs));
    json!({
        "name": b.name(),
        "state": if b.conf.weight == 0 { "drained" } else { state },
        "weight": b.conf.weight,
        "priority": b.conf.priority,
        "in_flight": b.in_flight(),
        "cooling_secs": cooling,
        "cooling_until": cooling.map(until),
        "last_error": b.last_error().map(|(at, code)| json!({ "code": code.text(), "at": clock::timestamp(at) })),
    })
}

fn text(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
