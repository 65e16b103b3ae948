//! Active health checks: one loop per backend, on the fleet thread. Each check uses a new connection.

use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep, sleep_until};

use crate::clock;
use crate::clock::LimitExpired;
use crate::code::Code;
use crate::gateway::state::{Generation, Shared};
use crate::policy::breaker::{Probe, Status, Thresholds};
use crate::server::first_checks::FirstCheck;
use crate::telemetry::failures::{Outcome, Seen};
use crate::telemetry::line::{Fields, in_words};
use crate::time::Nanos;
use crate::upstream::Upstream;
use crate::upstream::connect::ConnectError;
use crate::upstream::fault::Fault;
use crate::upstream::fleet::Snapshot;
use crate::upstream::get::get;

/// The first checks begin within this time of the start; with more than 100 backends, see [`FIRST_CHECK_SPACING`].
const FIRST_CHECKS: Duration = Duration::from_millis(200);

/// Average time between two first checks with many backends, so that they do not run all at once.
const FIRST_CHECK_SPACING: Duration = Duration::from_millis(2);

/// The time within which the first checks of `backends` backends begin.
fn first_check_window(backends: usize) -> Duration {
    FIRST_CHECKS.max(FIRST_CHECK_SPACING.saturating_mul(u32::try_from(backends).unwrap_or(u32::MAX)))
}

/// Checks the backend with this `id` until it is removed, drained or no longer checked. Each check uses the current
/// configuration. A check is skipped if a real request succeeded within the interval and the backend is healthy or
/// cools down.
pub(crate) async fn watch(first: FirstCheck, shared: Arc<Shared>, id: u64) {
    let mut first = Some(first);
    // A random delay, so that the backends are not checked at the same time.
    let backends = shared.current.load().backends.len();
    sleep(first_check_window(backends).mul_f64(fastrand::f64())).await;
    // The configuration of the last check: the first check under a new one tells more.
    let mut checked = Weak::new();
    while let Some((snapshot, upstream)) = find(&shared, id) {
        let health = &snapshot.config.health;
        let now = clock::now();
        let proven =
            upstream.state.breaker.succeeded_within(clock::nanos(interval(&snapshot, &upstream)), now);
        if !(proven && matches!(upstream.state.breaker.status(now), Status::Healthy | Status::Cooling(_))) {
            let checking = check(&upstream, snapshot.config.timeouts.connect);
            let late = |LimitExpired| {
                // Bytes of an answer are proof of life.
                let is_heard = upstream.state.was_heard_since(now);
                (!is_heard).then(|| Checked::failed(Fault::timed_out("health check", health.timeout)))
            };
            if let Some(result) = clock::within(health.timeout, checking).await.unwrap_or_else(late) {
                let is_first = !std::ptr::eq(checked.as_ptr(), Arc::as_ptr(&snapshot.config));
                checked = Arc::downgrade(&snapshot.config);
                let took = clock::now() - now;
                result.note(&shared, &snapshot, &upstream, is_first.then_some(took));
                if let (Ok(status), Some(first)) = (result.found, first.take()) {
                    first.passed(upstream.name(), status, took);
                }
            }
        }
        // A later check is not the first one.
        first = None;
        drop((snapshot, upstream));
        pause(&shared, id).await;
    }
}

/// Whether a backend is checked: it takes requests, and its checks are not switched off.
pub(crate) fn is_checked(upstream: &Upstream) -> bool {
    upstream.conf.weight > 0 && upstream.conf.health.is_enabled
}

/// The time between two checks of a backend.
fn interval(snapshot: &Snapshot, upstream: &Upstream) -> Duration {
    upstream.conf.health.interval.unwrap_or(snapshot.config.health.interval)
}

/// The backend with this `id`, unless it is not checked any more.
fn find(shared: &Shared, id: u64) -> Option<(Arc<Generation>, Arc<Upstream>)> {
    let snapshot = shared.current.load_full();
    let upstream = snapshot.backends.iter().find(|b| b.state.id == id && is_checked(b))?.clone();
    Some((snapshot, upstream))
}

/// Waits until the next check is due; a reload may change the interval.
async fn pause(shared: &Shared, id: u64) {
    let (since, jitter) = (Instant::now(), 0.8 + 0.2 * fastrand::f64());
    loop {
        let reloaded = shared.reloaded.notified();
        // Each pause would keep a snapshot of its own in memory: one that ends sees the latest one alone.
        let Some(interval) = find(shared, id).map(|(snapshot, upstream)| interval(&snapshot, &upstream))
        else {
            return;
        };
        let until = since + interval.mul_f64(jitter);
        tokio::select! {
            () = sleep_until(until) => return,
            () = reloaded => {}
        }
    }
}

/// The result of a check.
struct Checked {
    probe: Probe,
    /// The status of the response, or the cause of the failure.
    found: Result<u16, Fault>,
}

impl Checked {
    fn failed(fault: Fault) -> Self {
        Checked { probe: Probe::Failed, found: Err(fault) }
    }

    /// Records the result at the backend, and logs a change of its state. `first`: the time that the first check after
    /// a start or a reload took; its failure is logged at once.
    fn note(&self, shared: &Shared, snapshot: &Snapshot, upstream: &Upstream, first: Option<Nanos>) {
        upstream.checks.add(self.probe);
        let now = clock::now();
        let interval = clock::nanos(interval(snapshot, upstream));
        let limits = Thresholds { interval, ..snapshot.thresholds() };
        if self.probe == Probe::BadKey && upstream.state.breaker.succeeded_within(limits.interval, now) {
            // Real requests are served: only the path of the checks is refused.
            return;
        }
        let cause = match &self.found {
            Ok(status) => format!("health check: HTTP {status}"),
            Err(fault) => {
                upstream.note_error(fault);
                let seen = Seen { client: "", model: "", outcome: Outcome::HealthCheck, backend: "" };
                let tries = [(upstream.name(), &*fault.cause)];
                shared.telemetry.failures.note(&seen, &tries, SystemTime::now());
                format!("health check: {fault}")
            }
        };
        match (upstream.state.breaker.probed(self.probe, limits, now), first) {
            (Some(change), _) => shared.announce(upstream, change, &cause),
            (None, Some(took)) if self.probe != Probe::Alive => {
                let name = upstream.name();
                let text =
                    format!("the first check of backend {name} failed after {}: {cause}", in_words(took));
                let fields = Fields::default().text("backend", name).text("result", "failed").ms("ms", took);
                shared.telemetry.log.event_with("warn", "health_check", &text, &fields);
            }
            (None, _) => {}
        }
    }
}

/// Runs one check: GET of `health_path` with the backend's key. Returns `None` if this machine has no resources for a
/// connection, which says nothing about the backend.
async fn check(upstream: &Upstream, connect: Duration) -> Option<Checked> {
    let status = match get(upstream, upstream.probe(), connect).await {
        Ok(got) => got.head.status.as_u16(),
        Err(ConnectError::Exhausted { .. }) => return None,
        Err(ConnectError::Peer(fault)) => return Some(Checked::failed(fault)),
    };
    let probe = Probe::of_status(status, upstream.conf.forward_authorization);
    let kind = match probe {
        Probe::Alive => return Some(Checked { probe, found: Ok(status) }),
        Probe::BadKey => Code::UpstreamAuthError,
        Probe::Failed => Code::UpstreamError,
    };
    let cause = format!("HTTP {status} to GET {}", upstream.health_path());
    Some(Checked { probe, found: Err(Fault::new(kind, cause)) })
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use super::*;
    use crate::config::{Config, LogFormat};
    use crate::telemetry::log::Log;

    #[test]
    fn first_checks_of_many_backends_are_spread_over_time() {
        for (backends, ms) in [(0, 200), (1, 200), (100, 200), (101, 202), (1000, 2000)] {
            assert_eq!(first_check_window(backends), Duration::from_millis(ms), "{backends}");
        }
    }
    #[test]
    fn a_pause_keeps_no_snapshot_of_the_fleet() {
        let config = Config::of("[[backends]]\nname = \"a\"\nurl = \"http://a\"\nweight = 1\n").unwrap();
        let shared = Shared::new(config, Log::to(LogFormat::Text, std::io::sink())).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (before, id) = {
                let current = shared.current.load_full();
                (Arc::downgrade(&current), current.backends[0].state.id)
            };
            let mut pause = std::pin::pin!(pause(&shared, id));
            assert!(std::future::poll_fn(|cx| Poll::Ready(pause.as_mut().poll(cx).is_pending())).await);
            shared.rebuild();
            assert!(before.upgrade().is_none());
        });
    }
}
