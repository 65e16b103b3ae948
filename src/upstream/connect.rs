//! Opening a connection: name look-up, TCP, TLS, under one time limit.
//!
//! Roots are the system's (`SSL_CERT_FILE` and `SSL_CERT_DIR` honoured), because that is where an operator's own
//! authority already stands; a backend's `ca_file` adds to them.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tower_service::Service;

use crate::clock;
use crate::clock::Late;
use crate::config;
use crate::upstream::dial::{DialError, Dialer};
use crate::upstream::fault::Fault;
use crate::upstream::resolver::Resolver;

/// An open connection, plain or TLS.
pub(crate) type Io = MaybeHttpsStream<TokioIo<TcpStream>>;

/// What the system or TLS said.
pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

/// The certificates that are trusted everywhere, loaded once and only if a backend needs them.
#[derive(Debug)]
pub(crate) struct Roots {
    system: RootCertStore,
}

impl Roots {
    /// Loads the system's roots if any of `backends` speaks TLS.
    pub(crate) fn load(backends: &[config::Backend]) -> Self {
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
pub(crate) struct Connector {
    https: HttpsConnector<Dialer>,
    dialer: Dialer,
    tls: Arc<ClientConfig>,
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
    pub(crate) fn new(backend: &config::Backend, roots: &Roots) -> Result<Self, String> {
        let url = &backend.url;
        let scheme = if url.https { "https" } else { "http" };
        let to = format!("{scheme}://{}/", url.authority)
            .parse()
            .map_err(|_| "its host is not valid".to_owned())?;
        let own_roots = match backend.ca_file.as_deref().filter(|_| url.https) {
            Some(path) => {
                read_pem(path).map_err(|e| format!("ca_file holds no certificate that can be read ({e})"))?
            }
            None => Vec::new(),
        };
        let tls = Arc::new(roots.config(&own_roots)?);
        let dialer = Dialer::new(Resolver::system());
        let https = HttpsConnector::from((dialer.clone(), tls.clone()));
        Ok(Connector { https, dialer, tls, to, own_roots: own_roots.into() })
    }

    /// A connector to the same backend that takes the turns of its addresses for itself.
    pub(crate) fn with_own_turns(&self) -> Self {
        let https = HttpsConnector::from((self.dialer.with_own_turns(), self.tls.clone()));
        Connector { https, ..self.clone() }
    }

    /// Whether both trust the same certificates beside the system's.
    pub(crate) fn trusts_as(&self, other: &Connector) -> bool {
        self.own_roots == other.own_roots
    }

    /// Opens one connection within `limit`.
    ///
    /// # Errors
    /// Why the peer could not be reached, or what this machine lacks.
    pub(crate) async fn connect(&self, limit: Duration) -> Result<Io, ConnectError> {
        let opening = self.https.clone().call(self.to.clone());
        match clock::within(limit, opening).await {
            Ok(Ok(io)) => Ok(io),
            Ok(Err(e)) => Err(match e.downcast_ref::<DialError>() {
                Some(failure) if failure.exhausted => ConnectError::exhausted(&failure.error),
                Some(failure) => ConnectError::Peer(Fault::unreachable(&failure.error)),
                None => ConnectError::Peer(Fault::tls(&*e)),
            }),
            Err(Late) => Err(ConnectError::Peer(Fault::timed_out("connect", limit))),
        }
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// This machine has no file, port or memory for it: no fault of the peer.
    Exhausted {
        /// What is lacking.
        fault: Fault,
        /// One open file less would have helped.
        lacks_a_file: bool,
    },
    /// What the peer did.
    Peer(Fault),
}

impl ConnectError {
    fn exhausted(error: &io::Error) -> Self {
        let errno = error.raw_os_error().map(Errno::from_raw_os_error);
        ConnectError::Exhausted {
            fault: Fault::exhausted(error),
            lacks_a_file: errno.is_some_and(is_lack_of_files),
        }
    }
}

/// Whether a system call failed because the process, or the machine, has too many open files.
pub(crate) fn is_lack_of_files(errno: Errno) -> bool {
    matches!(errno, Errno::MFILE | Errno::NFILE)
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
        #[cfg(target_os = "linux")]
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(20)));
    }
}
