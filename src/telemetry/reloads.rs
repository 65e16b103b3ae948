//! The results of reloads.

use std::time::SystemTime;

use parking_lot::Mutex;

use crate::telemetry::encode::Encoder;

/// Configuration reloads by result; the fleet thread writes them.
#[derive(Debug)]
pub(crate) struct Reloads(Mutex<Results>);

#[derive(Debug)]
struct Results {
    applied: u64,
    rejected: u64,
    /// When a configuration was last put in place.
    applied_at: SystemTime,
    /// When the last reload was, and why it was rejected; empty: it was applied.
    last: Option<(SystemTime, String)>,
}

impl Reloads {
    /// No reload so far; the configuration of the start counts as a success.
    pub(crate) fn new() -> Self {
        let applied_at = SystemTime::now();
        Reloads(Mutex::new(Results { applied: 0, rejected: 0, applied_at, last: None }))
    }

    /// Records that a reload has put a new configuration in place.
    pub(crate) fn applied(&self) {
        let (mut results, now) = (self.0.lock(), SystemTime::now());
        results.applied += 1;
        results.applied_at = now;
        results.last = Some((now, String::new()));
    }

    /// Records that a reload has failed, and `why`, and left the old configuration in place.
    pub(crate) fn rejected(&self, why: &str) {
        let mut results = self.0.lock();
        results.rejected += 1;
        results.last = Some((SystemTime::now(), why.to_owned()));
    }

    /// When the last reload was, and why it was rejected; empty: it was applied.
    pub(crate) fn last(&self) -> Option<(SystemTime, String)> {
        self.0.lock().last.clone()
    }

    /// Writes the metrics.
    pub(crate) fn write(&self, e: &mut Encoder) {
        let results = self.0.lock();
        e.family("zap_config_reloads_total", "counter", "Configuration reloads.");
        for (result, n) in [("applied", results.applied), ("rejected", results.rejected)] {
            e.sample("zap_config_reloads_total", &[("result", result)], n);
        }
        let text = "1 if the last reload was applied or there was none, 0 if it was rejected.";
        e.family("zap_config_last_reload_successful", "gauge", text);
        let is_successful = results.last.as_ref().is_none_or(|(_, fault)| fault.is_empty());
        e.sample("zap_config_last_reload_successful", &[], u64::from(is_successful));
        let text = "When a configuration was last put in place, by a reload or at the start.";
        e.family("zap_config_last_reload_success_timestamp_seconds", "gauge", text);
        let at = results.applied_at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        e.sample("zap_config_last_reload_success_timestamp_seconds", &[], at);
    }
}
