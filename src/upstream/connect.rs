//! Opens a connection: name look-up, TCP and TLS under one time limit.
//!
//! The trusted roots are the system's, as set by `SSL_CERT_FILE` and `SSL_CERT_DIR`, since an operator's own
//! certificate authority is usually installed there. A backend's `ca_file` adds further roots.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::{StatusCode, Uri};
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, MaybeHttpsStream};
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tower_service::Service;

use crate::clock;
use crate::clock::LimitExpired;
use crate::code::Code;
use crate::config;
use crate::upstream::dial::{DialError, Dialer};
use crate::upstream::fault::Fault;
use crate::upstream::proxy::{ProxyError, Way};
use crate::upstream::resolver::Resolver;

/// An open connection, plain or TLS.
pub(crate) type Io = MaybeHttpsStream<TokioIo<TcpStream>>;

/// An error of the system or of TLS.
pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

/// The system's trusted certificates. They are loaded once, and only if a backend needs them.
#[derive(Debug)]
pub(crate) struct Roots {
    system: RootCertStore,
}

impl Roots {
    /// Loads the system's roots if any of `backends` uses TLS.
    pub(crate) fn load(backends: &[config::Backend]) -> Self {
        Roots::if_needed(backends.iter().any(|b| b.url.https))
    }

    fn if_needed(is_needed: bool) -> Self {
        let mut system = RootCertStore::empty();
        if is_needed {
            system.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        Roots { system }
    }

    /// Whether the system has no root certificates at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.system.is_empty()
    }

    /// The TLS settings with these roots beside those of the system. Zap shows `identity` to a backend that asks for
    /// it.
    fn config(
        &self,
        more: &[CertificateDer<'static>],
        identity: Option<&config::Identity>,
    ) -> Result<ClientConfig, String> {
        let mut roots = self.system.clone();
        for certificate in more {
            let added = roots.add(certificate.clone());
            added.map_err(|e| format!("ca_file has an invalid certificate ({e})"))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| format!("TLS setup failed ({e})"))?;
        let builder = builder.with_root_certificates(roots);
        match identity {
            None => Ok(builder.with_no_client_auth()),
            Some(identity) => builder
                .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
                .map_err(|e| format!("client_cert and client_key cannot be used ({e})")),
        }
    }
}

fn read_pem(path: &Path) -> Result<Vec<CertificateDer<'static>>, BoxError> {
    let all = CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>()?;
    if all.is_empty() { Err("no PEM certificate found".into()) } else { Ok(all) }
}

/// The TLS side of a connector.
#[derive(Clone)]
struct Tls {
    config: Arc<ClientConfig>,
    /// The name in the backend's certificate, if it is not the host of its URL.
    name: Option<ServerName<'static>>,
}

impl Tls {
    fn connector(&self, way: Way) -> HttpsConnector<Way> {
        match &self.name {
            None => HttpsConnector::from((way, self.config.clone())),
            Some(name) => {
                let name = Arc::new(FixedServerNameResolver::new(name.clone()));
                HttpsConnector::new(way, self.config.clone(), false, name)
            }
        }
    }
}

/// Opens connections to one backend.
#[derive(Clone)]
pub(crate) struct Connector {
    https: HttpsConnector<Way>,
    way: Way,
    tls: Tls,
    to: Uri,
    /// The certificates of `ca_file`.
    own_roots: Arc<[CertificateDer<'static>]>,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("to", &self.to).finish_non_exhaustive()
    }
}

impl Connector {
    /// Creates a connector to `backend`.
    ///
    /// # Errors
    /// Returns a message if the backend's URL or its certificates are invalid.
    pub(crate) fn new(backend: &config::Backend, roots: &Roots) -> Result<Self, String> {
        let url = &backend.url;
        let to = origin(url)?;
        let own_roots = match backend.ca_file.as_deref().filter(|_| url.https) {
            Some(path) => read_pem(path).map_err(|e| format!("ca_file cannot be read ({e})"))?,
            None => Vec::new(),
        };
        let config = roots.config(&own_roots, backend.client_identity.as_ref())?;
        let tls = Tls { config: Arc::new(config), name: backend.server_name.clone() };
        let way = Way::new(Dialer::new(Resolver::system()), url, backend.proxy.as_ref())?;
        Ok(Connector { https: tls.connector(way.clone()), way, tls, to, own_roots: own_roots.into() })
    }

    /// Creates a connector to `url`, without a proxy, that trusts the roots of the system.
    ///
    /// # Errors
    /// Returns a message if the URL is invalid.
    pub(crate) fn direct(url: &config::BaseUrl) -> Result<Self, String> {
        let to = origin(url)?;
        let config = Roots::if_needed(url.https).config(&[], None)?;
        let tls = Tls { config: Arc::new(config), name: None };
        let way = Way::new(Dialer::new(Resolver::system()), url, None)?;
        Ok(Connector { https: tls.connector(way.clone()), way, tls, to, own_roots: Arc::default() })
    }

    /// Creates a connector to the same backend that rotates through the addresses independently.
    pub(crate) fn with_own_rotation(&self) -> Self {
        Connector { https: self.tls.connector(self.way.with_own_rotation()), ..self.clone() }
    }

    /// Whether both connectors have the same certificates of `ca_file`.
    pub(crate) fn has_same_roots(&self, other: &Connector) -> bool {
        self.own_roots == other.own_roots
    }

    /// Opens one connection within `limit`.
    ///
    /// # Errors
    /// Returns why the peer could not be reached, or which resource this machine lacks.
    pub(crate) async fn connect(&self, limit: Duration) -> Result<Io, ConnectError> {
        let opening = self.https.clone().call(self.to.clone());
        match clock::within(limit, opening).await {
            Ok(Ok(io)) => Ok(io),
            Ok(Err(e)) => Err(match e.downcast_ref::<DialError>() {
                Some(failure) if failure.exhausted => ConnectError::exhausted(&failure.error),
                Some(failure) => ConnectError::Peer(Fault::unreachable(&failure.error)),
                None => match e.downcast_ref::<ProxyError>() {
                    Some(failure) => ConnectError::at_proxy(failure),
                    None => ConnectError::Peer(Fault::tls(&*e)),
                },
            }),
            Err(LimitExpired) => {
                let what = if self.way.has_proxy() { "connect through the proxy" } else { "connect" };
                Err(ConnectError::Peer(Fault::timed_out(what, limit)))
            }
        }
    }

    /// The fault of a response that the proxy has sent in place of the backend. Only a proxy that forwards the requests
    /// can do so, and only 407 tells the two apart.
    pub(crate) fn proxy_fault(&self, status: StatusCode) -> Option<Fault> {
        (status == StatusCode::PROXY_AUTHENTICATION_REQUIRED && self.way.is_forwarded())
            .then(Fault::proxy_credentials)
    }
}

/// The scheme and the authority of a URL.
fn origin(url: &config::BaseUrl) -> Result<Uri, String> {
    let scheme = if url.https { "https" } else { "http" };
    let origin = format!("{scheme}://{}/", url.authority);
    origin.parse().map_err(|_| "its host is not valid".to_owned())
}

/// Why a connection could not be opened.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// This machine has no free file, port or memory. The peer is not to blame.
    Exhausted {
        /// The fault, with the lacking resource as its cause.
        fault: Fault,
        /// Whether the lacking resource is an open file, so that closing another file helps.
        lacks_a_file: bool,
    },
    /// The peer failed.
    Peer(Fault),
}

impl ConnectError {
    fn at_proxy(error: &ProxyError) -> Self {
        ConnectError::Peer(match error {
            ProxyError::Dial(failure) if failure.exhausted => return ConnectError::exhausted(&failure.error),
            ProxyError::Dial(DialError { error, .. }) | ProxyError::Io(error) => {
                Fault::unreachable(error).at_proxy()
            }
            ProxyError::Refused(407) => Fault::proxy_credentials(),
            other => Fault::new(Code::UpstreamUnreachable, other.to_string()),
        })
    }

    fn exhausted(error: &io::Error) -> Self {
        let errno = error.raw_os_error().map(Errno::from_raw_os_error);
        ConnectError::Exhausted {
            fault: Fault::exhausted(error),
            lacks_a_file: errno.is_some_and(is_lack_of_files),
        }
    }
}

/// Whether a system call failed because the process or the machine has too many open files.
pub(crate) fn is_lack_of_files(errno: Errno) -> bool {
    matches!(errno, Errno::MFILE | Errno::NFILE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn connections_detect_a_peer_that_vanished() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let text = format!("[[backends]]\nurl = \"{url}\"\nweight = 1\n");
        let config = Config::of(&text).unwrap();
        let connector = Connector::new(&config.backends[0], &Roots::load(&config.backends)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let io = runtime.block_on(connector.connect(Duration::from_secs(5))).unwrap();
        let MaybeHttpsStream::Http(tcp) = io else { panic!("the connection is not plain TCP") };
        let socket = socket2::SockRef::from(tcp.inner());
        assert!(socket.keepalive().unwrap() && socket.tcp_nodelay().unwrap());
        let asked = socket.tcp_keepalive_time().unwrap()
            + socket.tcp_keepalive_interval().unwrap() * socket.tcp_keepalive_retries().unwrap();
        assert!(asked <= Duration::from_secs(30), "{asked:?}");
        #[cfg(target_os = "linux")]
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(20)));
    }
}
