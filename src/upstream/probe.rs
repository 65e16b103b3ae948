//! Active health checks: one loop a backend, on the control thread, always on a fresh connection.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT, CONNECTION, HeaderValue, USER_AGENT};
use http::{Method, Request};
use tokio::time::{sleep, timeout};

use super::Upstream;
use super::link::{HyperLink, Link, SendBody};
use crate::clock;
use crate::config::Health;
use crate::policy::breaker::{Change, Probe, Status, Thresholds};
use crate::state::Shared;

/// Probes `upstream` for as long as it is polled. A check is skipped while real traffic went well.
pub async fn watch(shared: Arc<Shared>, upstream: Arc<Upstream>, health: Health) {
    let thresholds = Thresholds { failures: health.failure_threshold, successes: health.success_threshold };
    let interval = clock::nanos(health.interval);
    sleep(health.interval.min(Duration::from_millis(200)).mul_f64(fastrand::f64())).await;
    loop {
        let now = clock::now();
        let proven = upstream.breaker.succeeded_within(interval, now);
        if !(proven && matches!(upstream.breaker.status(now), Status::Healthy | Status::Cooling(_))) {
            let probe = timeout(health.timeout, check(&upstream)).await.unwrap_or(Probe::Failed);
            if let Some(change) = upstream.breaker.probed(probe, thresholds, clock::now()) {
                announce(&shared, &upstream, change, "the health check");
            }
        }
        sleep(health.interval.mul_f64(0.9 + 0.2 * fastrand::f64())).await;
    }
}

/// Logs a change of state and has the schedule rebuilt.
pub fn announce(shared: &Shared, upstream: &Upstream, change: Change, cause: &str) {
    let (level, event, text) = match change {
        Change::Down => ("warn", "backend_down", "is out: too many failures in a row, the last seen by"),
        Change::Misconfigured => {
            ("error", "backend_misconfigured", "refuses its api_key (or needs one), as seen by")
        }
        Change::Up => ("info", "backend_up", "is back, as seen by"),
    };
    shared.log.event(level, event, &format!("{} {text} {cause}", upstream.name()));
    shared.fleet_changed.notify_one();
}

/// One check: GET of `health_path` with the backend's key.
async fn check(upstream: &Upstream) -> Probe {
    let Ok(io) = upstream.connector().connect().await else { return Probe::Failed };
    let Ok(mut link) = HyperLink::new(io).await else { return Probe::Failed };
    let mut request = Request::new(SendBody::default());
    *request.method_mut() = Method::GET;
    *request.uri_mut() = upstream.health.clone();
    let headers = request.headers_mut();
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    headers.insert(USER_AGENT, HeaderValue::from_static(concat!("zap/", env!("CARGO_PKG_VERSION"))));
    upstream.dress(headers);
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    link.start(request);
    match poll_fn(|cx| link.poll_head(cx)).await {
        Ok(head) => Probe::of_status(head.status.as_u16(), upstream.conf.forward_authorization),
        Err(_) => Probe::Failed,
    }
}
