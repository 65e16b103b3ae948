//! Why a try or a health check failed: a code for metrics and decisions, and a cause for the operator.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};

use crate::code::Code;

/// Why a try or a health check failed. Contains no URL, no key and no part of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The error code in metrics and responses.
    pub(crate) kind: Code,
    /// The cause in a few words: `connection refused`, `certificate: unknown issuer`, `HTTP 503 to GET /health`.
    pub(crate) cause: Cow<'static, str>,
}

impl Fault {
    /// Creates a fault.
    pub(crate) fn new(kind: Code, cause: impl Into<Cow<'static, str>>) -> Self {
        Fault { kind, cause: cause.into() }
    }

    /// The response is not valid HTTP.
    pub(crate) fn not_http(why: &'static str) -> Self {
        Fault::new(Code::UpstreamInvalidResponse, format!("not HTTP: {why}"))
    }

    /// The connection could not be opened, or it failed.
    pub(crate) fn unreachable(error: &io::Error) -> Self {
        Fault::new(Code::UpstreamUnreachable, io_cause(error))
    }

    /// This machine has no free file, port or memory for a connection. The peer is not to blame.
    pub(crate) fn exhausted(error: &io::Error) -> Self {
        Fault::new(Code::UpstreamUnreachable, format!("this machine: {}", io_cause(error)))
    }

    /// The proxy on the way to the backend wants other credentials than those in its URL.
    pub(crate) fn proxy_credentials() -> Self {
        let cause = "proxy: HTTP 407: the credentials in its URL are missing or wrong";
        Fault::new(Code::UpstreamUnreachable, cause)
    }

    /// The same fault at the proxy on the way to the backend.
    pub(crate) fn at_proxy(self) -> Self {
        Fault { cause: format!("proxy: {}", self.cause).into(), ..self }
    }

    /// The status of the response counts as a failure.
    pub(crate) fn status(kind: Code, status: u16) -> Self {
        Fault::new(kind, format!("HTTP {status}"))
    }

    /// Zap cut the try because it shuts down.
    pub(crate) fn cut() -> Self {
        Fault::new(Code::Draining, "cut, because Zap shuts down")
    }

    /// The peer closed the connection before the head of the response.
    pub(crate) fn closed() -> Self {
        Fault::new(Code::UpstreamUnreachable, "connection closed before a response")
    }

    /// The peer closed the connection inside the body of the response.
    pub(crate) fn cut_short() -> Self {
        Fault::new(Code::UpstreamUnreachable, "connection closed inside the body")
    }

    /// The TLS handshake failed.
    pub(crate) fn tls(error: &(dyn Error + 'static)) -> Self {
        // `io::Error::source` skips the error that it wraps, so `get_ref` is needed.
        let (mut innermost, mut io) = (error, None);
        while let Some(outer) = innermost.downcast_ref::<io::Error>() {
            io = Some(outer);
            let Some(inner) = outer.get_ref() else { break };
            innermost = inner;
        }
        let io = || io.map_or("failed".into(), io_cause);
        let cause = match innermost.downcast_ref::<rustls::Error>() {
            Some(tls) => tls_cause(tls),
            None => format!("TLS handshake: {}", io()).into(),
        };
        Fault::new(Code::UpstreamTlsError, cause)
    }

    /// Nothing arrived within `limit`. `what` names the phase that timed out.
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

/// The cause of an I/O error, in standard terms.
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
            // Cut the error number, which most operators cannot read.
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
    fn causes_use_standard_terms() {
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
        // hyper-rustls wraps the error of the handshake once more.
        let eof = io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof");
        assert_eq!(Fault::tls(&io::Error::other(eof)).to_string(), "TLS handshake: connection closed");
        let plain = io::Error::from(io::ErrorKind::ConnectionReset);
        assert_eq!(Fault::tls(&plain).to_string(), "TLS handshake: connection reset");
        assert_eq!(Fault::not_http("two lengths").to_string(), "not HTTP: two lengths");
    }
}
