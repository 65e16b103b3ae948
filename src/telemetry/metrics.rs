//! Counters and histograms, and the text of `/metrics`.
//!
//! Every worker writes only its own lane, so counting costs a load and a store; a scrape adds the lanes up.
//! Label values come from the configuration and from the fixed lists here, never from a client.

use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::clock;
use crate::code::Code;
use crate::config::Config;
use crate::counter::{Counter, Histogram, OVERHEAD, REQUEST, Total};
use crate::http1::trace_context::TraceId;
use crate::policy::breaker::Status;
use crate::policy::route::ConfiguredModel;
use crate::protocol::Endpoint;
use crate::telemetry::Telemetry;
use crate::telemetry::clients::{ClientLane, Clients};
use crate::telemetry::encode::{Encoder, Format};
use crate::telemetry::phase::Phase;
use crate::telemetry::{tls_metrics, token_metrics};
use crate::upstream::Upstream;
use crate::upstream::counters::{BackendLane, NoAnswer, ResponseCounters, STATUSES};

/// The side that cut a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Side {
    Client,
    Upstream,
}

const SIDES: [(&str, Side); 2] = [("client", Side::Client), ("upstream", Side::Upstream)];

/// The counts of one worker, except those of a backend.
#[derive(Debug)]
pub(crate) struct Lane {
    responses: ResponseCounters,
    durations: [Histogram; Endpoint::COUNT],
    /// Zap's own share of the time to the first byte.
    pub overhead: Histogram,
    /// Bytes of request bodies in memory.
    pub buffered: Counter,
    /// Time in the queue; counts only requests that were queued.
    pub queue_wait: Histogram,
    rejected: [Counter; Code::ALL.len()],
    interrupted: [Counter; SIDES.len()],
    disconnects: [Counter; Phase::ALL.len()],
    /// Requests sent to a backend although every candidate was ejected (panic).
    pub panic_picks: Counter,
    /// The counts of requests without a client key.
    pub anonymous: ClientLane,
}

impl Default for Lane {
    fn default() -> Self {
        Lane {
            responses: ResponseCounters::default(),
            durations: std::array::from_fn(|_| Histogram::new(REQUEST)),
            overhead: Histogram::new(OVERHEAD),
            buffered: Counter::default(),
            queue_wait: Histogram::new(REQUEST),
            rejected: std::array::from_fn(|_| Counter::default()),
            interrupted: Default::default(),
            disconnects: Default::default(),
            panic_picks: Counter::default(),
            anonymous: ClientLane::default(),
        }
    }
}

impl Lane {
    /// Counts a response that Zap made itself.
    pub(crate) fn count_response(&self, endpoint: Endpoint, status: u16) {
        self.responses.count(endpoint, status);
    }

    /// Records the total duration of a request, with its trace and the present time, if it has one.
    pub(crate) fn record_duration(&self, endpoint: Endpoint, nanos: u64, exemplar: Option<(TraceId, u64)>) {
        self.durations[endpoint as usize].record_traced(nanos, exemplar);
    }

    /// Counts a request that Zap refused.
    pub(crate) fn rejected(&self, code: Code) {
        self.rejected[code as usize].add(1);
    }

    /// Counts a stream that `side` cut.
    pub(crate) fn interrupted(&self, side: Side) {
        self.interrupted[side as usize].add(1);
    }

    /// Counts a client that disconnected in `phase`.
    pub(crate) fn disconnected(&self, phase: Phase) {
        self.disconnects[phase as usize].add(1);
    }
}

/// The codes of failed tries: values of the labels `reason` and `kind` in the families of backends.
const KINDS: [Code; 11] = [
    Code::StreamInterrupted,
    Code::UpstreamAuthError,
    Code::UpstreamEmpty,
    Code::UpstreamError,
    Code::UpstreamErrorEvent,
    Code::UpstreamInvalidResponse,
    Code::UpstreamRateLimited,
    Code::UpstreamRefused,
    Code::UpstreamTimeout,
    Code::UpstreamTlsError,
    Code::UpstreamUnreachable,
];

/// Input of a scrape.
#[derive(Debug)]
pub(crate) struct Scrape<'a> {
    /// The counts of the workers.
    pub telemetry: &'a Telemetry,
    /// The backends, in the order of the configuration.
    pub backends: &'a [Arc<Upstream>],
    /// The models that the configuration names.
    pub models: &'a [ConfiguredModel],
    /// The client keys.
    pub clients: &'a Clients,
    /// The configuration.
    pub config: &'a Config,
    /// Number of requests in the queue.
    pub queue_depth: usize,
    /// Number of client keys that the rate limiter tracks.
    pub rate_limit_keys: usize,
    /// Ids whose backend is known.
    pub known_ids: usize,
}

/// Encodes the text of `/metrics` in a format.
pub(crate) fn encode(scrape: &Scrape<'_>, format: Format) -> String {
    let mut e = Encoder::new(format);
    requests(&mut e, scrape);
    gateway(&mut e, scrape);
    clients(&mut e, scrape.clients);
    backends(&mut e, scrape.backends);
    models(&mut e, scrape);
    let now = clock::now();
    let anonymous = scrape.telemetry.anonymous(now);
    let clients: Vec<_> = token_metrics::totals_by_client(scrape.clients, anonymous, now).collect();
    token_metrics::encode(&mut e, scrape.backends, &clients);
    process(&mut e);
    e.finish()
}

fn sum<T>(lanes: &[T], value: impl Fn(&T) -> u64) -> u64 {
    lanes.iter().map(value).fold(0, u64::wrapping_add)
}

fn requests(e: &mut Encoder, scrape: &Scrape<'_>) {
    let (lanes, backends) = (&scrape.telemetry.lanes, scrape.backends);
    e.family(
        "zap_requests_total",
        "counter",
        "Requests by endpoint, backend and status; backend is empty if Zap made the response.",
    );
    for endpoint in Endpoint::ALL {
        responses(e, endpoint, "", lanes.iter().map(|l| &l.responses));
        for b in backends {
            responses(e, endpoint, b.name(), b.lanes.iter().map(|l| &l.responses));
        }
    }
    e.family(
        "zap_request_duration_seconds",
        "histogram",
        "Time from a request's arrival to the end of its response.",
    );
    for endpoint in Endpoint::ALL {
        let total = Total::of(REQUEST, lanes.iter().map(|l| &l.durations[endpoint as usize]));
        if total.count > 0 || endpoint == Endpoint::Chat {
            e.histogram("zap_request_duration_seconds", &[("endpoint", endpoint.name())], &total);
        }
    }
    e.family(
        "zap_backend_first_byte_seconds",
        "histogram",
        "Time from the start of a try to the head of its response, or to its failure.",
    );
    for b in backends {
        let total = Total::of(REQUEST, b.lanes.iter().map(|l| &l.first_byte));
        e.histogram("zap_backend_first_byte_seconds", &[("backend", b.name())], &total);
    }
    e.family("zap_overhead_seconds", "histogram", "Zap's own share of the time to the first byte.");
    e.histogram("zap_overhead_seconds", &[], &Total::of(OVERHEAD, lanes.iter().map(|l| &l.overhead)));
}

/// Writes the responses of `backend` at `endpoint` by status. Counts of 0 are left out, except status 200 of a
/// backend's chats.
fn responses<'l>(
    e: &mut Encoder,
    endpoint: Endpoint,
    backend: &str,
    lanes: impl Iterator<Item = &'l ResponseCounters>,
) {
    let mut totals = [0u64; (STATUSES.end - STATUSES.start) as usize];
    let mut is_used = false;
    for row in lanes.filter_map(|responses| responses.row(endpoint)) {
        is_used = true;
        totals.iter_mut().zip(row).for_each(|(total, counter)| *total = total.wrapping_add(counter.get()));
    }
    let always = endpoint == Endpoint::Chat && !backend.is_empty();
    if !is_used && !always {
        return;
    }
    for (status, n) in STATUSES.zip(totals) {
        if n > 0 || always && status == 200 {
            let mut text = itoa::Buffer::new();
            let labels =
                [("endpoint", endpoint.name()), ("backend", backend), ("status", text.format(status))];
            e.sample("zap_requests_total", &labels, n);
        }
    }
}

fn gateway(e: &mut Encoder, scrape: &Scrape<'_>) {
    let Scrape { telemetry, .. } = scrape;
    let lanes = &telemetry.lanes;
    let mut one = |name: &str, kind: &str, help: &str, value: u64| {
        e.family(name, kind, help);
        e.sample(name, &[], value);
    };
    one(
        "zap_buffered_bytes",
        "gauge",
        "Bytes in memory of request bodies, and of responses that are held back.",
        sum(lanes, |l| l.buffered.get()),
    );
    one(
        "zap_known_ids",
        "gauge",
        "Ids of responses, items and conversations whose backend is known.",
        scrape.known_ids as u64,
    );
    one("zap_queue_depth", "gauge", "Requests in the queue.", scrape.queue_depth as u64);
    one(
        "zap_rate_limit_keys",
        "gauge",
        "Client keys tracked by the rate limiter.",
        scrape.rate_limit_keys as u64,
    );
    one(
        "zap_panic_picks_total",
        "counter",
        "Requests sent to a backend although all were ejected.",
        sum(lanes, |l| l.panic_picks.get()),
    );
    one(
        "zap_log_lines_dropped_total",
        "counter",
        "Log lines dropped: stderr was full or closed, or a burst of invalid heads arrived.",
        telemetry.log.dropped(),
    );
    e.family(
        "zap_ledger_errors_total",
        "counter",
        "Times that the ledger's file could not be read or written.",
    );
    e.sample("zap_ledger_errors_total", &[], telemetry.ledger.errors());
    e.family("zap_queue_wait_seconds", "histogram", "Time in the queue, for requests that were queued.");
    e.histogram("zap_queue_wait_seconds", &[], &Total::of(REQUEST, lanes.iter().map(|l| &l.queue_wait)));
    e.family("zap_rejected_total", "counter", "Requests that Zap refused.");
    for code in Code::ALL {
        let n = sum(lanes, |l| l.rejected[code as usize].get());
        if !code.is_label() {
            e.sample("zap_rejected_total", &[("reason", code.text())], n);
        }
    }
    e.family("zap_streams_interrupted_total", "counter", "Streams cut before their end.");
    for (name, side) in SIDES {
        let n = sum(lanes, |l| l.interrupted[side as usize].get());
        e.sample("zap_streams_interrupted_total", &[("side", name)], n);
    }
    e.family(
        "zap_client_disconnects_total",
        "counter",
        "Clients that disconnected before the end of the response.",
    );
    for phase in Phase::ALL {
        let n = sum(lanes, |l| l.disconnects[phase as usize].get());
        e.sample("zap_client_disconnects_total", &[("phase", phase.name())], n);
    }
    telemetry.traces.write(e);
    telemetry.reloads.write(e);
    tls_metrics::encode(e, scrape.config);
    e.family("zap_build_info", "gauge", "Always 1; the version is the label.");
    e.sample("zap_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
}

/// Writes one series per configured client key. Without client keys the family has no samples.
fn clients(e: &mut Encoder, clients: &Clients) {
    e.family("zap_client_requests_total", "counter", "Requests by the client key that sent them.");
    for client in clients.iter() {
        let n = sum(&client.lanes, |lane| lane.requests.get());
        e.sample("zap_client_requests_total", &[("client", &client.conf.name)], n);
    }
}

fn backends(e: &mut Encoder, backends: &[Arc<Upstream>]) {
    let now = clock::now();
    let mut gauge = |name: &str, help: &str, value: &dyn Fn(&Upstream) -> u64| {
        e.family(name, "gauge", help);
        for b in backends {
            e.sample(name, &[("backend", b.name())], value(b));
        }
    };
    gauge("zap_in_flight", "Requests in flight to a backend.", &|b| b.in_flight() as u64);
    gauge(
        "zap_backend_up",
        "1 while a backend is neither ejected, as a whole or for every model in use, nor misconfigured.",
        &|b| u64::from(!b.state.breaker.status(now).is_out()),
    );
    gauge("zap_backend_cooling", "1 while a backend cools down.", &|b| {
        u64::from(matches!(b.state.breaker.status(now), Status::Cooling(_)))
    });
    e.family("zap_health_checks_total", "counter", "Health checks of a backend, by result.");
    for b in backends {
        for (result, n) in b.checks.all() {
            e.sample("zap_health_checks_total", &[("backend", b.name()), ("result", result)], n);
        }
    }
    e.family("zap_upstream_connections", "gauge", "Connections to a backend.");
    for b in backends {
        for (state, n) in
            [("active", sum(&b.lanes, |l| l.active.get())), ("idle", sum(&b.lanes, |l| l.idle.get()))]
        {
            e.sample("zap_upstream_connections", &[("backend", b.name()), ("state", state)], n);
        }
    }
    let mut by_kind =
        |name: &str, help: &str, label: &'static str, value: &dyn Fn(&BackendLane, Code) -> u64| {
            e.family(name, "counter", help);
            for b in backends {
                for kind in KINDS {
                    let n = sum(&b.lanes, |l| value(l, kind));
                    e.sample(name, &[("backend", b.name()), (label, kind.text())], n);
                }
            }
        };
    by_kind("zap_retries_total", "Retries after a failed try at this backend.", "reason", &|l, k| {
        l.retries[k as usize].get()
    });
    by_kind("zap_upstream_errors_total", "Failed tries at a backend.", "kind", &|l, k| {
        l.errors[k as usize].get()
    });
    e.family(
        "zap_prelude_failovers_total",
        "counter",
        "Requests that went to another target although this backend had responded, since the response was no answer.",
    );
    for b in backends {
        for (name, reason) in NoAnswer::ALL {
            let n = sum(&b.lanes, |l| l.prelude_failovers(reason));
            e.sample("zap_prelude_failovers_total", &[("backend", b.name()), ("reason", name)], n);
        }
    }
}

/// Writes a series for each model that the configuration names, at each of its backends.
fn models(e: &mut Encoder, scrape: &Scrape<'_>) {
    let now = clock::now();
    e.family("zap_model_up", "gauge", "1 while a backend serves a configured model.");
    for model in scrape.models {
        let b = &scrape.backends[model.backend];
        let status = b.state.breaker.status_for(|| model.key, now);
        e.sample(
            "zap_model_up",
            &[("backend", b.name()), ("model", &model.name)],
            u64::from(!status.is_out()),
        );
    }
}

fn process(e: &mut Encoder) {
    let Some(p) = Process::read() else { return };
    e.family("process_cpu_seconds_total", "counter", "User and system CPU time.");
    e.fraction("process_cpu_seconds_total", &[], p.cpu_seconds);
    e.family("process_resident_memory_bytes", "gauge", "Resident memory.");
    e.sample("process_resident_memory_bytes", &[], p.resident_bytes);
    e.family("process_open_fds", "gauge", "Open file descriptors.");
    e.sample("process_open_fds", &[], p.open_fds);
    e.family("process_start_time_seconds", "gauge", "Start of the process since the Unix epoch.");
    e.fraction("process_start_time_seconds", &[], p.start_seconds);
}

/// Resources of this process, read from /proc.
struct Process {
    cpu_seconds: f64,
    resident_bytes: u64,
    open_fds: u64,
    start_seconds: f64,
}

/// `USER_HZ`: ticks per second in /proc; always 100 on Linux.
const TICKS: f64 = 100.0;

impl Process {
    fn read() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = |i: usize| fields.get(i)?.parse::<f64>().ok();
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let resident = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
        let start_seconds = match START.get() {
            Some(start) => *start,
            // If another worker sets the value first, that value stays.
            None => {
                let start = start_seconds(ticks(19)? / TICKS)?;
                *START.get_or_init(|| start)
            }
        };
        Some(Process {
            cpu_seconds: (ticks(11)? + ticks(12)?) / TICKS,
            resident_bytes: resident.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024,
            open_fds: std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as u64,
            start_seconds,
        })
    }
}

/// Start of the process in seconds since the Unix epoch, computed once. The value is derived from two clocks, so that
/// each computation differs a little, and a collector takes a changed value for a restart.
static START: OnceLock<f64> = OnceLock::new();

/// Converts `since_boot`, in seconds since the system's boot, to seconds since the Unix epoch.
fn start_seconds(since_boot: f64) -> Option<f64> {
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    Some(wall - uptime + since_boot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusual_statuses_are_counted_without_a_panic() {
        let a = ResponseCounters::default();
        for status in [100, 200, 200, 599, 600, 42, u16::MAX] {
            a.count(Endpoint::Chat, status);
        }
        let row = a.row(Endpoint::Chat).unwrap();
        let of = |status: u16| row[usize::from(status - STATUSES.start)].get();
        assert_eq!((of(200), of(100), of(599)), (2, 1, 3));
        assert!(a.row(Endpoint::Other).is_none());
    }

    #[test]
    fn counts_of_zero_are_left_out_except_chats_of_a_backend() {
        let lanes = [ResponseCounters::default(), ResponseCounters::default()];
        let text = |endpoint, backend| {
            let mut e = Encoder::default();
            responses(&mut e, endpoint, backend, lanes.iter());
            e.finish()
        };
        let zero = "zap_requests_total{endpoint=\"chat\",backend=\"a\",status=\"200\"} 0\n";
        assert_eq!([text(Endpoint::Chat, "a"), text(Endpoint::Chat, "")], [zero, ""]);
        lanes.iter().for_each(|lane| lane.count(Endpoint::Models, 404));
        let two = "zap_requests_total{endpoint=\"models\",backend=\"\",status=\"404\"} 2\n";
        assert_eq!(text(Endpoint::Models, ""), two);
    }

    #[test]
    fn reads_the_resources_of_the_process() {
        let p = Process::read().unwrap();
        assert!(p.resident_bytes > 100_000 && p.open_fds >= 3 && p.cpu_seconds >= 0.0);
        assert!(p.start_seconds > 1.7e9);
    }
}
