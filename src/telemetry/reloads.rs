//! The results of reloads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::telemetry::encode::Encoder;

/// Configuration reloads by result; the fleet thread writes them.
#[derive(Debug)]
pub(crate) struct Reloads {
    applied: AtomicU64,
    rejected: AtomicU64,
    has_failed: AtomicBool,
    /// When a configuration was last put in place, in seconds since the Unix epoch.
    applied_at: AtomicU64,
    /// When the last reload was, and why it was rejected; empty: it was applied.
    last: Mutex<Option<(SystemTime, String)>>,
}

impl Reloads {
    /// No reload so far; the configuration of the start counts as a success.
    pub(crate) fn new() -> Self {
        Reloads {
            applied: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            has_failed: AtomicBool::new(false),
            applied_at: AtomicU64::new(unix_seconds()),
            last: Mutex::new(None),
        }
    }

    /// Records that a reload has put a new configuration in place.
    pub(crate) fn applied(&self) {
        self.applied_at.store(unix_seconds(), Ordering::Relaxed);
        self.has_failed.store(false, Ordering::Relaxed);
        self.applied.fetch_add(1, Ordering::Relaxed);
        *self.last.lock() = Some((SystemTime::now(), String::new()));
    }

    /// Records that a reload has failed, and `why`, and left the old configuration in place.
    pub(crate) fn rejected(&self, why: &str) {
        self.has_failed.store(true, Ordering::Relaxed);
        self.rejected.fetch_add(1, Ordering::Relaxed);
        *self.last.lock() = Some((SystemTime::now(), why.to_owned()));
    }

    /// When the last reload was, and why it was rejected; empty: it was applied.
    pub(crate) fn last(&self) -> Option<(SystemTime, String)> {
        self.last.lock().clone()
    }

    /// Writes the metrics.
    pub(crate) fn write(&self, e: &mut Encoder) {
        e.family("zap_config_reloads_total", "counter", "Configuration reloads.");
        for (result, n) in [("applied", &self.applied), ("rejected", &self.rejected)] {
            e.sample("zap_config_reloads_total", &[("result", result)], n.load(Ordering::Relaxed));
        }
        let text = "1 if the last reload was applied or there was none, 0 if it was rejected.";
        e.family("zap_config_last_reload_successful", "gauge", text);
        let is_successful = !self.has_failed.load(Ordering::Relaxed);
        e.sample("zap_config_last_reload_successful", &[], u64::from(is_successful));
        let text = "When a configuration was last put in place, by a reload or at the start.";
        e.family("zap_config_last_reload_success_timestamp_seconds", "gauge", text);
        let at = self.applied_at.load(Ordering::Relaxed);
        e.sample("zap_config_last_reload_success_timestamp_seconds", &[], at);
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
