//! The TLS handshake with a client, and the answer to a client that speaks plain HTTP to a TLS port.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, ready};

use rustls::ServerConfig;
use tokio::io::ReadBuf;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use crate::client::conn::{Conn, LINGER, Settings};
use crate::client::connection_limit::ConnectionPermit;
use crate::client::deadline::time_to_begin;
use crate::client::peer::Peer;
use crate::client::stream::{ClientStream, Wire, has_data};
use crate::code::Code;
use crate::config::common_name;
use crate::protocol::endpoint::Protocol;
use crate::protocol::error_body::ErrorBody;
use crate::time::{Nanos, SECOND};

/// Most bytes that are dropped of what a client sends in plain HTTP.
const MAX_DISCARD: usize = 1 << 20;

/// The first byte of every handshake (RFC 8446, section 5.1).
const HANDSHAKE_RECORD: u8 = 22;

const PLAIN_HTTP: &str =
    "This port speaks HTTPS, and the request came as plain HTTP; begin the URL with https://.";

/// Why a connection did not become a TLS connection.
#[derive(Debug)]
pub(crate) enum HandshakeError {
    /// The handshake failed, or the client disconnected in it.
    Failed(io::Error),
    /// The client has sent plain HTTP, and has got a 400.
    PlainHttp,
    /// The handshake took longer than this.
    TimedOut(Nanos),
    /// The client has sent nothing, or Zap stops: not an error.
    Unfinished,
}

impl HandshakeError {
    /// Whether the client has shown no certificate, and must.
    pub(crate) fn is_without_certificate(&self) -> bool {
        let HandshakeError::Failed(error) = self else { return false };
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
        cause == Some(&rustls::Error::NoCertificatesPresented)
    }
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HandshakeError::Failed(error) => write!(f, "{error}"),
            HandshakeError::PlainHttp => {
                f.write_str("the client speaks plain HTTP, and this port speaks TLS")
            }
            HandshakeError::TimedOut(limit) => write!(f, "it was not complete after {} s", limit / SECOND),
            HandshakeError::Unfinished => f.write_str("the client sent nothing, or Zap stops"),
        }
    }
}

/// Makes a TLS connection of `tcp`. `is_closing`: whether idle connections close.
///
/// # Errors
/// See [`HandshakeError`]. The connection is closed then.
pub(super) async fn accept(
    (tcp, peer, permit): (TcpStream, Peer, Option<ConnectionPermit>),
    tls: Arc<ServerConfig>,
    settings: &Settings,
    is_closing: impl Fn() -> bool,
) -> Result<Rc<Conn>, HandshakeError> {
    let deadlines = &settings.deadlines;
    let limit = time_to_begin(permit.as_ref().is_some_and(ConnectionPermit::is_reserve));
    let deadline = deadlines.add(deadlines.coarse_now() + limit);
    let first = poll_fn(|cx| {
        deadline.register(cx);
        let mut byte = [0];
        match tcp.poll_peek(cx, &mut ReadBuf::new(&mut byte)) {
            Poll::Pending if deadline.has_expired() || is_closing() && !has_data(&tcp) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(n)) if n > 0 => Poll::Ready(Some(byte[0])),
            Poll::Ready(_) => Poll::Ready(None),
        }
    });
    match first.await {
        None => return Err(HandshakeError::Unfinished),
        Some(first) if first.is_ascii_uppercase() => {
            let conn = Conn::new((ClientStream::Plain(tcp), peer, permit), None, settings);
            let _ = deadline.limit(conn.coarse_now() + LINGER, answer_in_plain(&conn)).await;
            return Err(HandshakeError::PlainHttp);
        }
        Some(first) if first != HANDSHAKE_RECORD => {
            return Err(HandshakeError::Failed(io::Error::other("the client does not speak TLS")));
        }
        Some(_) => {}
    }
    let mut handshake = pin!(TlsAcceptor::from(tls).accept(Wire::from(tcp)));
    let greeted = poll_fn(|cx| {
        deadline.register(cx);
        match handshake.as_mut().poll(cx) {
            Poll::Pending if deadline.has_expired() => Poll::Ready(Err(match is_closing() {
                true => HandshakeError::Unfinished,
                false => HandshakeError::TimedOut(limit),
            })),
            greeted => greeted.map_err(HandshakeError::Failed),
        }
    });
    let stream = greeted.await?;
    let certificates = stream.get_ref().1.peer_certificates();
    let common_name = certificates.and_then(|all| common_name(all.first()?)).map(String::into_boxed_str);
    Ok(Conn::new((stream.into(), peer, permit), common_name, settings))
}

/// The answer to plain HTTP.
fn plain_answer() -> String {
    let error =
        ErrorBody { message: PLAIN_HTTP, kind: "invalid_request_error", param: None, code: Code::BadRequest };
    let body = error.write(Protocol::OpenAi, 400);
    format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// Sends the answer to plain HTTP, then drops what the client still sends.
async fn answer_in_plain(conn: &Conn) {
    let answer = plain_answer();
    let mut sent = 0;
    let is_sent = poll_fn(|cx| {
        let mut socket = conn.socket.borrow_mut();
        while sent < answer.len() {
            match ready!(socket.poll_write(cx, &answer.as_bytes()[sent..])) {
                Ok(n) if n > 0 => sent += n,
                _ => return Poll::Ready(false),
            }
        }
        socket.poll_shutdown(cx).map(|shut| shut.is_ok())
    });
    if is_sent.await {
        conn.discard(MAX_DISCARD).await;
    }
}
