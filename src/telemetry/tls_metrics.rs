//! The metrics of the certificates of the listeners.

use crate::config::{Config, certificate_ends};
use crate::telemetry::encode::Encoder;

const EXPIRY: &str = "zap_tls_certificate_expiry_timestamp_seconds";

/// Writes when each certificate expires. Without TLS the family has no samples.
pub(crate) fn encode(e: &mut Encoder, config: &Config) {
    e.family(EXPIRY, "gauge", "When a certificate of a listener expires, in seconds since 1970.");
    for (name, end) in certificate_ends(config.tls.iter().chain(&config.admin.tls)) {
        e.sample(EXPIRY, &[("name", name)], u64::try_from(end).unwrap_or(0));
    }
}
