//! The metrics of the certificates of the listener.

use crate::config::{Config, ServerTls};
use crate::telemetry::encode::Encoder;

const EXPIRY: &str = "zap_tls_certificate_expiry_timestamp_seconds";

/// Writes when each certificate expires. Without TLS the family has no samples.
pub(crate) fn encode(e: &mut Encoder, config: &Config) {
    e.family(EXPIRY, "gauge", "When a certificate of the listener expires, in seconds since 1970.");
    for (name, end) in config.tls.iter().flat_map(ServerTls::ends) {
        e.sample(EXPIRY, &[("name", name)], u64::try_from(end).unwrap_or(0));
    }
}
