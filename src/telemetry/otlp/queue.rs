//! Finished traces on their way from the workers to the exporter. The queue is bounded, and no worker ever waits.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use tokio::sync::Notify;

use crate::clock;
use crate::telemetry::encode::Encoder;
use crate::telemetry::otlp::trace::FinishedTrace;

/// Most traces that wait. A trace takes about 1 KB.
const CAPACITY: usize = 8192;

/// So many traces are sent in one request at most.
pub(crate) const MAX_BATCH: usize = 512;

/// Why spans were dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Dropped {
    QueueFull,
    Refused,
    Stopped,
    Unreachable,
}

impl Dropped {
    /// All causes with their names, in the order of their discriminants.
    const ALL: [(&str, Dropped); 4] = [
        ("queue_full", Dropped::QueueFull),
        ("refused", Dropped::Refused),
        ("stopped", Dropped::Stopped),
        ("unreachable", Dropped::Unreachable),
    ];
}

/// The queue, and what became of the spans.
#[derive(Debug, Default)]
pub(crate) struct TraceQueue {
    /// Allocated at the first trace.
    queue: OnceLock<ArrayQueue<Box<FinishedTrace>>>,
    /// Spans that the exporter has taken and not yet counted as sent or dropped.
    taken: AtomicU64,
    sent: AtomicU64,
    dropped: [AtomicU64; Dropped::ALL.len()],
    /// Whether the exporter was told of a whole batch.
    is_told: AtomicBool,
    is_closing: AtomicBool,
    /// Notified when a whole batch waits, or when Zap stops.
    wake: Notify,
    /// Notified when all traces are sent or dropped.
    flushed: Notify,
}

impl TraceQueue {
    /// Adds a trace, or drops it if the queue is full.
    pub(crate) fn push(&self, trace: Box<FinishedTrace>) {
        let queue = self.queue.get_or_init(|| ArrayQueue::new(CAPACITY));
        if let Err(trace) = queue.push(trace) {
            self.drop_spans(trace.spans(), Dropped::QueueFull);
        } else if queue.len() >= MAX_BATCH && !self.is_told.swap(true, Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }

    /// Takes up to [`MAX_BATCH`] traces with the same settings, oldest first. `next`: a trace that was taken and did
    /// not fit, for the next call.
    pub(crate) fn take(&self, next: &mut Option<Box<FinishedTrace>>) -> Vec<FinishedTrace> {
        self.is_told.store(false, Ordering::Relaxed);
        let mut batch: Vec<FinishedTrace> = Vec::new();
        while batch.len() < MAX_BATCH {
            let pop = || self.queue.get()?.pop().inspect(|trace| self.add_taken(trace.spans()));
            let Some(trace) = next.take().or_else(pop) else { break };
            let settings = |trace: &FinishedTrace| std::ptr::from_ref(&*trace.trace.settings);
            if batch.first().is_some_and(|first| settings(first) != settings(&trace)) {
                *next = Some(trace);
                break;
            }
            batch.push(*trace);
        }
        batch
    }

    fn add_taken(&self, spans: u64) {
        self.taken.fetch_add(spans, Ordering::Relaxed);
    }

    /// Counts spans of a batch that the collector has taken.
    pub(crate) fn count_sent(&self, spans: u64) {
        self.sent.fetch_add(spans, Ordering::Relaxed);
        self.taken.fetch_sub(spans, Ordering::Relaxed);
    }

    /// Counts spans of a batch that are lost.
    pub(crate) fn count_lost(&self, spans: u64, cause: Dropped) {
        self.drop_spans(spans, cause);
        self.taken.fetch_sub(spans, Ordering::Relaxed);
    }

    fn drop_spans(&self, spans: u64, cause: Dropped) {
        self.dropped[cause as usize].fetch_add(spans, Ordering::Relaxed);
    }

    /// Waits for `interval`, for a whole batch, or until Zap stops.
    pub(crate) async fn wait(&self, interval: Duration) {
        tokio::select! {
            () = self.wake.notified() => {}
            () = tokio::time::sleep(interval) => {}
        }
    }

    /// Waits for `span`, or until Zap stops.
    pub(crate) async fn pause(&self, span: Duration) {
        let until = clock::now() + clock::nanos(span);
        while !self.is_closing() {
            match until.saturating_sub(clock::now()) {
                0 => return,
                left => self.wait(Duration::from_nanos(left)).await,
            }
        }
    }

    /// Whether Zap stops, so that nothing is sent twice.
    pub(crate) fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Relaxed)
    }

    /// Reports that the exporter has sent all.
    pub(crate) fn note_flushed(&self) {
        self.flushed.notify_one();
    }

    /// Has the exporter send what is left, for at most `limit`. Returns the number of spans that are not sent.
    pub(crate) async fn close(&self, limit: Duration) -> u64 {
        let Some(queue) = self.queue.get() else { return 0 };
        self.is_closing.store(true, Ordering::Relaxed);
        self.wake.notify_one();
        if clock::within(limit, self.flushed.notified()).await.is_ok() {
            return 0;
        }
        let waiting: u64 = std::iter::from_fn(|| queue.pop()).map(|trace| trace.spans()).sum();
        let left = waiting + self.taken.load(Ordering::Relaxed);
        self.drop_spans(left, Dropped::Stopped);
        left
    }

    /// Writes the metrics.
    pub(crate) fn write(&self, e: &mut Encoder) {
        e.family("zap_otlp_spans_sent_total", "counter", "Spans that the collector has taken.");
        e.sample("zap_otlp_spans_sent_total", &[], self.sent.load(Ordering::Relaxed));
        e.family("zap_otlp_spans_dropped_total", "counter", "Spans that did not reach the collector.");
        for (name, cause) in Dropped::ALL {
            let n = self.dropped[cause as usize].load(Ordering::Relaxed);
            e.sample("zap_otlp_spans_dropped_total", &[("cause", name)], n);
        }
    }
}
