//! The way to a backend: a TCP connection to it, or to its proxy.
//!
//! To a backend with TLS a proxy opens a tunnel (`CONNECT`, RFC 9110, section 9.3.6), so that it sees neither keys nor
//! bodies. For a plain backend it forwards requests in absolute form (RFC 9112, section 3.2.2).

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::header::PROXY_AUTHORIZATION;
use http::{HeaderName, HeaderValue, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;

use crate::config::{Backend, BaseUrl, Proxy, ProxySource};
use crate::upstream::dial::{DialError, Dialer};

/// Largest head of a response to `CONNECT`, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// Most headers in a response to `CONNECT`.
const MAX_HEADERS: usize = 100;

/// A [`DialError`] or a [`ProxyError`].
type WayError = Box<dyn std::error::Error + Send + Sync>;

/// Opens TCP connections for one backend, directly or through its proxy.
#[derive(Clone)]
pub(crate) struct Way {
    dialer: Dialer,
    proxy: Option<Arc<Hop>>,
}

/// A proxy on the way.
struct Hop {
    address: Uri,
    /// The request that opens a tunnel; `None` if the proxy forwards requests.
    connect: Option<Vec<u8>>,
}

/// A connection through a proxy could not be opened.
#[derive(Debug)]
pub(crate) enum ProxyError {
    /// The proxy cannot be reached.
    Dial(DialError),
    /// The connection to the proxy failed before it had opened the tunnel.
    Io(io::Error),
    /// The proxy opens no tunnel: its status.
    Refused(u16),
    /// The answer of the proxy is not HTTP.
    NotHttp,
}

impl fmt::Display for ProxyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProxyError::Dial(error) => write!(f, "proxy: {error}"),
            ProxyError::Io(error) => write!(f, "proxy: {error}"),
            ProxyError::Refused(status) => write!(f, "proxy: HTTP {status} to CONNECT"),
            ProxyError::NotHttp => f.write_str("proxy: the answer to CONNECT is not HTTP"),
        }
    }
}

impl std::error::Error for ProxyError {}

impl Way {
    /// Creates the way to the backend at `url`.
    ///
    /// # Errors
    /// Returns a message for the operator if the address of the proxy is invalid.
    pub(crate) fn new(dialer: Dialer, url: &BaseUrl, proxy: Option<&Proxy>) -> Result<Self, &'static str> {
        let hop = |proxy: &Proxy| -> Result<_, &'static str> {
            let address = format!("{proxy}/").parse().map_err(|_| "the host of its proxy is not valid")?;
            Ok(Arc::new(Hop { address, connect: url.https.then(|| connect_request(url, proxy)) }))
        };
        Ok(Way { dialer, proxy: proxy.map(hop).transpose()? })
    }

    /// A way to the same backend that rotates through the addresses independently.
    pub(crate) fn with_own_rotation(&self) -> Self {
        Way { dialer: self.dialer.with_own_rotation(), proxy: self.proxy.clone() }
    }

    /// Whether there is a proxy.
    pub(crate) fn has_proxy(&self) -> bool {
        self.proxy.is_some()
    }

    /// Whether a proxy forwards the requests, so that it sees them and answers some itself.
    pub(crate) fn is_forwarded(&self) -> bool {
        self.proxy.as_ref().is_some_and(|hop| hop.connect.is_none())
    }
}

fn connect_request(url: &BaseUrl, proxy: &Proxy) -> Vec<u8> {
    let (host, port) = (&url.host, url.port);
    let to = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let agent = concat!("zap/", env!("CARGO_PKG_VERSION"));
    let mut request = format!("CONNECT {to} HTTP/1.1\r\nhost: {to}\r\nuser-agent: {agent}\r\n").into_bytes();
    if let Some(value) = &proxy.authorization {
        request.extend_from_slice(b"proxy-authorization: ");
        request.extend_from_slice(value.as_bytes());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    request
}

impl Service<Uri> for Way {
    type Response = TokioIo<TcpStream>;
    type Error = WayError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, WayError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), WayError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let Some(hop) = self.proxy.clone() else {
            let dialing = self.dialer.dial_to(&to);
            return Box::pin(async move { Ok(TokioIo::new(dialing.await?)) });
        };
        let dialing = self.dialer.dial_to(&hop.address);
        Box::pin(async move {
            let stream = dialing.await.map_err(ProxyError::Dial)?;
            if let Some(request) = &hop.connect {
                open_tunnel(&stream, request).await?;
            }
            Ok(TokioIo::new(stream))
        })
    }
}

/// Sends `request` and reads the head of the answer.
async fn open_tunnel(stream: &TcpStream, request: &[u8]) -> Result<(), ProxyError> {
    let mut left = request;
    while !left.is_empty() {
        stream.writable().await.map_err(ProxyError::Io)?;
        match stream.try_write(left) {
            Ok(written) => left = left.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(ProxyError::Io(error)),
        }
    }
    let mut head = Vec::with_capacity(1024);
    loop {
        stream.readable().await.map_err(ProxyError::Io)?;
        let mut piece = [0; 1024];
        let read = match stream.try_read(&mut piece) {
            Ok(0) => return Err(ProxyError::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(ProxyError::Io(error)),
        };
        head.extend_from_slice(piece.get(..read).unwrap_or_default());
        match status(&head)? {
            Some((200..300, length)) if length == head.len() => return Ok(()),
            // The backend waits for the client to speak, so these bytes are not the backend's.
            Some((200..300, _)) => return Err(ProxyError::NotHttp),
            Some((status, _)) => return Err(ProxyError::Refused(status)),
            None if head.len() > MAX_HEAD => return Err(ProxyError::NotHttp),
            None => {}
        }
    }
}

/// The status in a head, and the length of the head; `None` if the head is not complete.
fn status(head: &[u8]) -> Result<Option<(u16, usize)>, ProxyError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(head) {
        Ok(httparse::Status::Complete(length)) => Ok(response.code.map(|code| (code, length))),
        Ok(httparse::Status::Partial) => Ok(None),
        Err(_) => Err(ProxyError::NotHttp),
    }
}

/// What stands before the path of a request (RFC 9112, section 3.2): the scheme and the authority if a proxy forwards
/// the requests, else nothing.
pub(crate) fn origin(backend: &Backend) -> String {
    let url = &backend.url;
    match backend.proxy {
        Some(_) if !url.https => format!("http://{}", url.authority),
        _ => String::new(),
    }
}

/// The header for a proxy that forwards the requests.
pub(crate) fn authorization(backend: &Backend) -> Option<(HeaderName, HeaderValue)> {
    let value = backend.proxy.as_ref().filter(|_| !backend.url.https)?.authorization.clone()?;
    Some((PROXY_AUTHORIZATION, value))
}

/// Says which backend uses which proxy, without credentials; `None` if none does.
pub(crate) fn summary(backends: &[Backend]) -> Option<String> {
    let used: Vec<String> = backends
        .iter()
        .filter_map(|b| {
            let proxy = b.proxy.as_ref()?;
            let source = match proxy.source {
                ProxySource::File => "backends.proxy",
                ProxySource::Variable(name) => name,
            };
            Some(format!("backend {} uses the proxy {proxy} of {source}", b.name))
        })
        .collect();
    (!used.is_empty()).then(|| used.join(", "))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    #[test]
    fn the_summary_names_backends_and_proxies_without_credentials() {
        let text = "[[backends]]\nname = \"a\"\nurl = \"https://a\"\nweight = 1\nproxy = \"http://u:sk-CANARY@p:1\"\n\
                    [[backends]]\nname = \"b\"\nurl = \"http://localhost\"\nweight = 1\n\
                    [[backends]]\nname = \"c\"\nurl = \"http://c\"\nweight = 1\n";
        let env = |name: &str| (name == "http_proxy").then(|| "u:sk-CANARY@[::1]:3".to_owned());
        let config = Config::parse(text, "test", Path::new(""), &env).unwrap();
        let want = "backend a uses the proxy http://p:1 of backends.proxy, \
                    backend c uses the proxy http://[::1]:3 of http_proxy";
        assert_eq!(summary(&config.backends).as_deref(), Some(want));
        assert_eq!(summary(&config.backends[1..2]), None);
    }

    #[test]
    fn the_status_is_read_from_a_whole_head_only() {
        let found = |head: &[u8]| status(head).ok();
        let whole = b"HTTP/1.1 200 Connection established\r\nvia: x\r\n\r\n";
        assert_eq!(found(whole), Some(Some((200, whole.len()))));
        assert_eq!(found(&[&whole[..], b"ahead"].concat()), Some(Some((200, whole.len()))));
        for length in 0..whole.len() {
            assert_eq!(found(&whole[..length]), Some(None), "{length}");
        }
        assert_eq!(found(b"HTTP/1.0 407 No\r\n\r\n"), Some(Some((407, 19))));
        assert_eq!(found(b"SSH-2.0-x\r\n"), None);
    }
}
