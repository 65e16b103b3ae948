//! Opening a connection: name look-up, TCP, TLS, under one time limit.
//!
//! Roots are the system's (`SSL_CERT_FILE` and `SSL_CERT_DIR` honoured), because that is where an operator's own
//! authority already stands; a backend's `ca_file` adds to them.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tower_service::Service;

use super::names::Resolver;
use crate::clock::{self, Late};
use crate::config;
use crate::error::Code;

/// Silence after which a peer is asked whether it is still there; then again every half of it.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// An open connection, plain or TLS.
pub type Io = MaybeHttpsStream<TokioIo<TcpStream>>;

type BoxError = Box<dyn Error + Send + Sync>;

/// The certificates that are trusted everywhere, loaded once and only if a backend needs them.
#[derive(Debug)]
pub struct Roots {
    system: RootCertStore,
}

impl Roots {
    /// Loads the system's roots if any of `backends` speaks TLS.
    pub fn load(backends: &[config::Backend]) -> Self {
        let mut system = RootCertStore::empty();
        if backends.iter().any(|b| b.url.https) {
            system.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        Roots { system }
    }

    fn config(&self, more: &[CertificateDer<'static>]) -> Result<ClientConfig, String> {
        let mut roots = self.system.clone();
        for certificate in more {
            let added = roots.add(certificate.clone());
            added.map_err(|e| format!("ca_file holds a certificate that is none ({e})"))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| format!("TLS cannot be set up ({e})"))?;
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }
}

fn read_pem(path: &Path) -> Result<Vec<CertificateDer<'static>>, BoxError> {
    let all = CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>()?;
    if all.is_empty() { Err("it is empty".into()) } else { Ok(all) }
}

/// Opens connections to one backend.
#[derive(Clone)]
pub struct Connector {
    https: HttpsConnector<Tcp>,
    to: Uri,
    /// What stands in `ca_file`.
    own_roots: Arc<[CertificateDer<'static>]>,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("to", &self.to).finish_non_exhaustive()
    }
}

impl Connector {
    /// A connector to `backend`.
    ///
    /// # Errors
    /// What is wrong with its URL or its certificates.
    pub fn new(backend: &config::Backend, roots: &Roots) -> Result<Self, String> {
        let url = &backend.url;
        let scheme = if url.https { "https" } else { "http" };
        let to = format!("{scheme}://{}/", url.authority)
            .parse()
            .map_err(|_| "its host is not valid".to_owned())?;
        let mut tcp = HttpConnector::new_with_resolver(Resolver::system());
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // A peer that is gone without a word is noticed after two and a half of it.
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE / 2));
        tcp.set_keepalive_retries(Some(3));
        let own_roots = match backend.ca_file.as_deref().filter(|_| url.https) {
            Some(path) => {
                read_pem(path).map_err(|e| format!("ca_file holds no certificate that can be read ({e})"))?
            }
            None => Vec::new(),
        };
        let tls = roots.config(&own_roots)?;
        Ok(Connector { https: HttpsConnector::from((Tcp(tcp), tls)), to, own_roots: own_roots.into() })
    }

    /// Whether both trust the same certificates beside the system's.
    pub fn trusts_as(&self, other: &Connector) -> bool {
        self.own_roots == other.own_roots
    }

    /// Opens one connection within `limit`.
    ///
    /// # Errors
    /// [`Code::UpstreamUnreachable`], [`Code::UpstreamTlsError`] or, past the time limit, [`Code::UpstreamTimeout`]; or
    /// that this machine has nothing to connect with.
    pub async fn connect(&self, limit: Duration) -> Result<Io, ConnectError> {
        let opening = self.https.clone().call(self.to.clone());
        match clock::within(limit, opening).await {
            Ok(Ok(io)) => Ok(io),
            Ok(Err(e)) => Err(match e.downcast_ref::<TcpFailed>() {
                Some(TcpFailed { exhausted: true }) => ConnectError::Exhausted,
                Some(_) => ConnectError::Peer(Code::UpstreamUnreachable),
                None => ConnectError::Peer(Code::UpstreamTlsError),
            }),
            Err(Late) => Err(ConnectError::Peer(Code::UpstreamTimeout)),
        }
    }
}

/// The TCP half, whose failures can be told from those of TLS.
#[derive(Clone)]
struct Tcp(HttpConnector<Resolver>);

/// `exhausted`: no file, port or memory was left here.
#[derive(Debug)]
struct TcpFailed {
    exhausted: bool,
}

impl TcpFailed {
    fn new(error: &(dyn Error + 'static)) -> Self {
        let mut causes = std::iter::successors(Some(error), |e| Error::source(*e));
        let io = causes.find_map(|e| e.downcast_ref::<std::io::Error>());
        let lacking = [Errno::MFILE, Errno::NFILE, Errno::ADDRNOTAVAIL, Errno::NOBUFS, Errno::NOMEM];
        let code = io.and_then(std::io::Error::raw_os_error);
        let exhausted = code.is_some_and(|code| lacking.iter().any(|errno| errno.raw_os_error() == code));
        TcpFailed { exhausted }
    }
}

/// Why there is no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// This machine has no file, port or memory for it: no fault of the peer.
    Exhausted,
    /// What the peer did, as a code of the error table.
    Peer(Code),
}

impl fmt::Display for TcpFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no TCP connection")
    }
}

impl Error for TcpFailed {}

impl Service<Uri> for Tcp {
    type Response = TokioIo<TcpStream>;
    type Error = TcpFailed;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, TcpFailed>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TcpFailed>> {
        self.0.poll_ready(cx).map_err(|e| TcpFailed::new(&e))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let opening = self.0.call(to);
        Box::pin(async { opening.await.map_err(|e| TcpFailed::new(&e)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_peer_that_is_gone_without_a_word_will_be_noticed() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let text = format!("[[backends]]\nurl = \"{url}\"\nweight = 1\n");
        let config = Config::parse(&text, "test", Path::new(""), &|_| None).unwrap();
        let connector = Connector::new(&config.backends[0], &Roots::load(&config.backends)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let io = runtime.block_on(connector.connect(Duration::from_secs(5))).unwrap();
        let MaybeHttpsStream::Http(tcp) = io else { panic!("it is plain") };
        let socket = socket2::SockRef::from(tcp.inner());
        assert!(socket.keepalive().unwrap() && socket.tcp_nodelay().unwrap());
        let asked = socket.tcp_keepalive_time().unwrap()
            + socket.tcp_keepalive_interval().unwrap() * socket.tcp_keepalive_retries().unwrap();
        assert!(asked <= Duration::from_secs(30), "{asked:?}");
    }

    #[test]
    fn what_this_machine_lacks_is_no_fault_of_the_peer() {
        for (code, ours) in [(Errno::MFILE, true), (Errno::ADDRNOTAVAIL, true), (Errno::CONNREFUSED, false)] {
            let error = std::io::Error::from_raw_os_error(code.raw_os_error());
            assert_eq!(TcpFailed::new(&error).exhausted, ours, "{code:?}");
        }
    }
}
