//! `zap healthcheck`: one request to a running Zap, for images without curl.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http::Uri;
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};

/// Longest time for the whole exchange. Below the time limits of the files that `zap print` prints.
const LIMIT: Duration = Duration::from_secs(3);

/// Longest response head that is read, in bytes.
const MAX_HEAD: usize = 1024;

/// How a server has shown that it is healthy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// The server has responded with a status from 200 to 299.
    Responded,
    /// The server has asked for a client certificate in the TLS handshake. This command has none, and has sent no
    /// request.
    WantsCertificate,
}

/// Sends a GET to `url`.
///
/// # Errors
/// Returns in words why there is neither a response with a status from 200 to 299 nor a request for a certificate.
pub(crate) fn ask(url: &str) -> Result<Health, String> {
    let uri: Uri = url.parse().map_err(|error| format!("not a URL: {error}"))?;
    let scheme = uri.scheme_str().filter(|scheme| ["http", "https"].contains(scheme));
    let host = uri.host().filter(|_| scheme.is_some());
    let host = host.ok_or("must begin with http:// or https:// and a host")?;
    let is_tls = scheme == Some("https");
    let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    if port == 0 {
        return Err("port 0 names no running Zap; use --url".into());
    }
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or(host, |authority| authority.as_str());
    let request = format!("GET {path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n");
    let end = Instant::now() + LIMIT;
    // A name such as localhost may have several addresses, and Zap may listen on one of them only.
    let name = host.trim_start_matches('[').trim_end_matches(']');
    let addresses = (name, port).to_socket_addrs().map_err(|error| error.to_string())?;
    let mut why = "the host has no address".to_owned();
    let server =
        if is_tls { Some(ServerName::try_from(name.to_owned()).map_err(|e| e.to_string())?) } else { None };
    for address in addresses {
        match exchange((address, server.as_ref()), &request, end) {
            Ok(Some(200..=299)) => return Ok(Health::Responded),
            Ok(Some(status)) => return Err(format!("HTTP {status}")),
            Ok(None) => return Ok(Health::WantsCertificate),
            Err(error) => why = in_words(&error),
        }
    }
    Err(why)
}

/// Sends the request, with TLS to a `server`, and returns the status of the response; `None` if the server has asked
/// for a certificate.
fn exchange(
    (address, server): (SocketAddr, Option<&ServerName<'static>>),
    request: &str,
    end: Instant,
) -> io::Result<Option<u16>> {
    let mut socket = Timed { socket: TcpStream::connect_timeout(&address, left(end)?)?, end };
    let Some(server) = server else { return status(&mut socket, request).map(Some) };
    let certificate = Arc::new(NoCertificate::default());
    let mut stream = unchecked_tls(socket, server.clone(), certificate.clone()).map_err(io::Error::other)?;
    // The whole handshake, the answer to the request for a certificate included.
    stream.flush()?;
    if certificate.was_asked.load(Ordering::Relaxed) {
        return Ok(None);
    }
    status(&mut stream, request).map(Some)
}

/// Sends the request and returns the status of the response.
fn status(stream: &mut (impl Read + Write), request: &str) -> io::Result<u16> {
    stream.write_all(request.as_bytes())?;
    let mut head = Vec::new();
    while !head.contains(&b'\n') && head.len() < MAX_HEAD {
        let mut buffer = [0; 256];
        match stream.read(&mut buffer)? {
            0 => break,
            n => head.extend_from_slice(&buffer[..n]),
        }
    }
    let line = String::from_utf8_lossy(&head);
    let status = line.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
    status.ok_or_else(|| io::Error::other("the response is not HTTP/1.1"))
}

/// A connection whose reads and writes fail once `end` has passed.
struct Timed {
    socket: TcpStream,
    end: Instant,
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(left(self.end)?))?;
        self.socket.read(buffer)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(left(self.end)?))?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Begins TLS without a check of the certificate: the check is of this machine's own Zap, whose certificate names a
/// host that is known elsewhere.
fn unchecked_tls(
    socket: Timed,
    server: ServerName<'static>,
    certificate: Arc<NoCertificate>,
) -> Result<StreamOwned<ClientConnection, Timed>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_client_cert_resolver(certificate);
    Ok(StreamOwned::new(ClientConnection::new(Arc::new(config), server)?, socket))
}

/// Accepts every certificate whose key the server has.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Shows the server no certificate, and notes whether the server has asked for one.
#[derive(Debug, Default)]
struct NoCertificate {
    was_asked: AtomicBool,
}

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.was_asked.store(true, Ordering::Relaxed);
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// The time until `end`.
fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn in_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".into(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            format!("no response within {} s", LIMIT.as_secs())
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_url_of_a_zap_is_refused() {
        for url in ["", "a", "/health", "ftp://127.0.0.1:1", "http://", "http://127.0.0.1:0/", "http://a b"] {
            assert!(ask(url).is_err(), "{url}");
        }
    }
}
