//! Sends finished traces to the collector, on the fleet thread. A collector that fails costs no request anything: the
//! queue in front of the exporter is bounded, and what does not fit is dropped and counted.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::config::Otlp;
use crate::gateway::state::Shared;
use crate::telemetry::otlp::batch;
use crate::telemetry::otlp::queue::Dropped;
use crate::telemetry::otlp::trace::FinishedTrace;
use crate::upstream::fault::Fault;
use crate::upstream::post::{Posted, Poster};

/// How long a trace waits for others until a batch that is not whole is sent.
const INTERVAL: Duration = Duration::from_secs(1);

/// Longest time for one request to the collector.
const MAX_POST: Duration = Duration::from_secs(10);

/// How long a batch is sent again after the first request.
const MAX_RETRY: Duration = Duration::from_secs(10);

/// The pause before the second request; each further one doubles it, up to [`MAX_PAUSE`]. A random factor of 0.8 to 1
/// is applied.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

const MAX_PAUSE: Duration = Duration::from_secs(4);

/// Longest pause that a collector can ask for.
const MAX_ASKED: Duration = Duration::from_secs(30);

/// How long the exit of the process waits for the spans that are left.
pub(crate) const MAX_FLUSH: Duration = Duration::from_secs(3);

/// Sends traces until the future is dropped.
pub(crate) async fn export(shared: &Shared) {
    let queue = &shared.telemetry.traces;
    let mut exporter = Exporter { shared, poster: None, settings: Weak::new(), is_failing: false };
    let mut next = None;
    loop {
        queue.wait(INTERVAL).await;
        // Read first: what is pushed until then is sent below.
        let is_closing = queue.is_closing();
        loop {
            let traces = queue.take(&mut next);
            let Some(first) = traces.first() else { break };
            let settings = first.trace.settings.clone();
            exporter.send(&settings, traces).await;
        }
        if is_closing {
            queue.note_flushed();
        }
    }
}

struct Exporter<'s> {
    shared: &'s Shared,
    /// The way to the collector of `settings`.
    poster: Option<Poster>,
    settings: Weak<Otlp>,
    /// Whether the last batch was lost; the log tells of changes.
    is_failing: bool,
}

/// What became of a batch.
enum Sent {
    /// The collector has taken it, except so many spans.
    Taken {
        rejected: u64,
    },
    Lost(Dropped, String),
}

impl Exporter<'_> {
    /// Sends traces that have the same settings, and counts their spans.
    async fn send(&mut self, settings: &Arc<Otlp>, traces: Vec<FinishedTrace>) {
        let queue = &self.shared.telemetry.traces;
        let spans = traces.iter().map(FinishedTrace::spans).sum();
        let body = Bytes::from(batch::encode(settings, &traces));
        drop(traces);
        match self.post(settings, &body).await {
            Sent::Taken { rejected } => {
                let rejected = rejected.min(spans);
                queue.count_sent(spans - rejected);
                queue.count_lost(rejected, Dropped::Refused);
                if std::mem::take(&mut self.is_failing) {
                    let text = format!("the collector at {} takes spans again", settings.url.authority);
                    self.shared.telemetry.log.event("info", "otlp", &text);
                }
            }
            Sent::Lost(cause, why) => {
                queue.count_lost(spans, cause);
                if !std::mem::replace(&mut self.is_failing, true) {
                    let text = format!(
                        "the collector at {} does not take spans: {why}; they are dropped until it does",
                        settings.url.authority
                    );
                    self.shared.telemetry.log.event("warn", "otlp", &text);
                }
            }
        }
    }

    /// Sends a body, and sends it again while the collector may recover.
    async fn post(&mut self, settings: &Arc<Otlp>, body: &Bytes) -> Sent {
        if !std::ptr::eq(self.settings.as_ptr(), Arc::as_ptr(settings)) {
            match Poster::new(&settings.url, "application/x-protobuf", &settings.headers) {
                Ok(poster) => self.poster = Some(poster),
                Err(why) => return Sent::Lost(Dropped::Unreachable, why),
            }
            self.settings = Arc::downgrade(settings);
        }
        let Some(poster) = &mut self.poster else {
            return Sent::Lost(Dropped::Unreachable, "it has no address".to_owned());
        };
        let queue = &self.shared.telemetry.traces;
        let (began, mut pause) = (Instant::now(), FIRST_PAUSE);
        loop {
            let result = poster.post(body, if queue.is_closing() { MAX_FLUSH } else { MAX_POST }).await;
            if let Ok(Posted { status: 200..300, body, .. }) = &result {
                return Sent::Taken { rejected: batch::rejected(body) };
            }
            if !may_recover(&result) || queue.is_closing() || began.elapsed() >= MAX_RETRY {
                return match result {
                    Ok(posted) => Sent::Lost(Dropped::Refused, format!("HTTP {}", posted.status)),
                    Err(fault) => Sent::Lost(Dropped::Unreachable, fault.to_string()),
                };
            }
            let asked = result.ok().and_then(|posted| posted.retry_after).unwrap_or_default();
            let jittered = pause.mul_f64(0.8 + 0.2 * fastrand::f64());
            queue.pause(jittered.max(asked.min(MAX_ASKED))).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }
}

/// Whether a request to the collector may succeed later (OTLP, section "Failures").
fn may_recover(result: &Result<Posted, Fault>) -> bool {
    match result {
        Ok(posted) => matches!(posted.status, 429 | 502 | 503 | 504),
        Err(_) => true,
    }
}
