//! Why a try or a health check failed: a kind for metrics and decisions, and the cause in words for the operator.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};

use crate::code::Code;

/// See the module. Holds no URL, no key and nothing of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// As metrics and answers have it.
    pub(crate) kind: Code,
    /// In a few words: `connection refused`, `certificate: unknown issuer`, `HTTP 503 to GET /health`.
    pub(crate) cause: Cow<'static, str>,
}

impl Fault {
    /// A fault of this kind.
    pub(crate) fn new(kind: Code, cause: impl Into<Cow<'static, str>>) -> Self {
        Fault { kind, cause: cause.into() }
    }

    /// What came is not HTTP.
    pub(crate) fn not_http(why: &'static str) -> Self {
        Fault::new(Code::UpstreamInvalidResponse, format!("not HTTP: {why}"))
    }

    /// The connection failed before an answer.
    pub(crate) fn unreachable(error: &io::Error) -> Self {
        Fault::new(Code::UpstreamUnreachable, io_cause(error))
    }

    /// This machine has no file, port or memory to connect with: no fault of the peer.
    pub(crate) fn exhausted(error: &io::Error) -> Self {
        Fault::new(Code::UpstreamUnreachable, format!("this machine: {}", io_cause(error)))
    }

    /// The answer has a status that is no answer for the client.
    pub(crate) fn status(kind: Code, status: u16) -> Self {
        Fault::new(kind, format!("HTTP {status}"))
    }

    /// Zap cut the try on its way out.
    pub(crate) fn cut() -> Self {
        Fault::new(Code::Draining, "cut, because Zap shuts down")
    }

    /// The peer closed the connection before an answer.
    pub(crate) fn closed() -> Self {
        Fault::new(Code::UpstreamUnreachable, "connection closed before an answer")
    }

    /// The TLS handshake failed.
    pub(crate) fn tls(error: &(dyn Error + 'static)) -> Self {
        // An I/O error holds another error but does not call it its source.
        let mut innermost = error;
        while let Some(inner) = innermost.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            innermost = inner;
        }
        let io = || error.downcast_ref::<io::Error>().map(io_cause).unwrap_or("failed".into());
        let cause = match innermost.downcast_ref::<rustls::Error>() {
            Some(tls) => tls_cause(tls),
            None => format!("TLS handshake: {}", io()).into(),
        };
        Fault::new(Code::UpstreamTlsError, cause)
    }

    /// Nothing came within `limit`; `what` the time went by for.
    pub(crate) fn timed_out(what: &str, limit: Duration) -> Self {
        let secs = (limit.as_secs_f64() * 10.0).round() / 10.0;
        Fault::new(Code::UpstreamTimeout, format!("{what} timed out after {secs} s"))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)
    }
}

/// What the system says, in the words of the trade.
fn io_cause(error: &io::Error) -> Cow<'static, str> {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".into(),
        io::ErrorKind::ConnectionReset => "connection reset".into(),
        io::ErrorKind::BrokenPipe => "connection closed while the request was sent".into(),
        io::ErrorKind::UnexpectedEof => "connection closed".into(),
        io::ErrorKind::HostUnreachable => "host unreachable".into(),
        io::ErrorKind::NetworkUnreachable => "network unreachable".into(),
        io::ErrorKind::AddrNotAvailable => "no address of this machine reaches it".into(),
        io::ErrorKind::TimedOut => "connection timed out".into(),
        _ => {
            let text = error.to_string();
            let missing = ["Name or service not known", "No address associated", "nodename nor servname"];
            if missing.iter().any(|words| text.contains(words)) {
                return "no such host".into();
            }
            if text.contains("name resolution") {
                return "the name server does not answer".into();
            }
            // The number of the error says nothing to most readers.
            text.split(" (os error").next().unwrap_or_default().to_lowercase().into()
        }
    }
}

fn tls_cause(error: &rustls::Error) -> Cow<'static, str> {
    match error {
        rustls::Error::InvalidCertificate(why) => certificate_cause(why),
        rustls::Error::AlertReceived(AlertDescription::HandshakeFailure) => {
            "TLS: the peer refuses the handshake".into()
        }
        rustls::Error::AlertReceived(alert) => format!("TLS: the peer sent the alert {alert:?}").into(),
        rustls::Error::InvalidMessage(_) => "TLS: the peer does not speak TLS".into(),
        other => format!("TLS: {other}").into(),
    }
}

fn certificate_cause(error: &CertificateError) -> Cow<'static, str> {
    match error {
        CertificateError::UnknownIssuer => "certificate: unknown issuer".into(),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "certificate: not valid for this name".into()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "certificate: expired".into(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "certificate: not valid yet".into()
        }
        CertificateError::Revoked => "certificate: revoked".into(),
        CertificateError::BadSignature => "certificate: bad signature".into(),
        other => format!("certificate: {other}").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_words_of_the_trade() {
        let of = |errno: i32| Fault::unreachable(&io::Error::from_raw_os_error(errno)).to_string();
        assert_eq!(of(111), "connection refused");
        assert_eq!(of(104), "connection reset");
        assert_eq!(of(113), "host unreachable");
        assert_eq!(of(24), "too many open files");
        let name = io::Error::other("failed to lookup address information: Name or service not known");
        assert_eq!(Fault::unreachable(&name).to_string(), "no such host");
        let timed_out = Fault::timed_out("connect", Duration::from_millis(2_000));
        assert_eq!(
            (timed_out.kind, &*timed_out.cause),
            (Code::UpstreamTimeout, "connect timed out after 2 s")
        );
        let wrapped = io::Error::other(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer));
        assert_eq!(Fault::tls(&wrapped).to_string(), "certificate: unknown issuer");
        assert_eq!(Fault::tls(&io::Error::other(wrapped)).to_string(), "certificate: unknown issuer");
        let plain = io::Error::from(io::ErrorKind::UnexpectedEof);
        assert_eq!(Fault::tls(&plain).to_string(), "TLS handshake: connection closed");
        assert_eq!(Fault::not_http("two lengths").to_string(), "not HTTP: two lengths");
    }
}
