//! The TLS handshake with a client, and the answer to a client that speaks plain HTTP to a TLS port.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, ready};

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use crate::client::deadline::{Deadline, Deadlines, Elapsed, time_to_begin};
use crate::client::stream::{ClientStream, Wire, has_data};
use crate::code::Code;
use crate::config::common_name;
use crate::protocol::endpoint::Protocol;
use crate::protocol::error_body::ErrorBody;
use crate::time::{Nanos, SECOND};

/// How long the input of a client that speaks plain HTTP is dropped, so that it can read the answer before a reset
/// reaches it.
const LINGER: Nanos = 2 * SECOND;

/// Most bytes that are dropped.
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
    /// The client has sent nothing.
    Silent,
    /// Zap stops.
    Stopped,
    /// The handshake took longer than this.
    TimedOut(Nanos),
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HandshakeError::Failed(error) => write!(f, "{error}"),
            HandshakeError::PlainHttp => {
                f.write_str("the client speaks plain HTTP, and this port speaks TLS")
            }
            HandshakeError::Silent => f.write_str("the client sent nothing"),
            HandshakeError::Stopped => f.write_str("Zap stops"),
            HandshakeError::TimedOut(limit) => write!(f, "it was not complete after {} s", limit / SECOND),
        }
    }
}

/// A TLS connection, and what the handshake has shown of the client.
#[derive(Debug)]
pub(crate) struct Greeted {
    pub stream: ClientStream,
    /// The common name of the certificate that the client has shown; it is verified.
    pub common_name: Option<Box<str>>,
}

/// Makes a TLS connection of `tcp`. `is_reserve`: whether all regular connections are taken. `is_closing`: whether idle
/// connections close.
///
/// # Errors
/// See [`HandshakeError`]. The connection is closed then.
pub(crate) async fn accept(
    (tcp, is_reserve): (TcpStream, bool),
    tls: Arc<ServerConfig>,
    deadlines: &Deadlines,
    is_closing: impl Fn() -> bool,
) -> Result<Greeted, HandshakeError> {
    let limit_of_time = time_to_begin(is_reserve);
    let deadline = deadlines.add(deadlines.coarse_now() + limit_of_time);
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
        None => return Err(HandshakeError::Silent),
        Some(first) if first.is_ascii_uppercase() => {
            let now = deadlines.coarse_now();
            let _ = limit(&deadline, now + LINGER, answer_in_plain(tcp)).await;
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
                true => HandshakeError::Stopped,
                false => HandshakeError::TimedOut(limit_of_time),
            })),
            greeted => greeted.map_err(HandshakeError::Failed),
        }
    });
    let stream = greeted.await?;
    let certificates = stream.get_ref().1.peer_certificates();
    let common_name = certificates.and_then(|all| common_name(all.first()?)).map(String::into_boxed_str);
    Ok(Greeted { stream: stream.into(), common_name })
}

/// Runs `work` until `at`, and wakes the task then.
async fn limit<F: Future>(deadline: &Rc<Deadline>, at: Nanos, work: F) -> Result<F::Output, Elapsed> {
    let mut limited = pin!(deadline.limit(at, work));
    poll_fn(|cx| {
        deadline.register(cx);
        limited.as_mut().poll(cx)
    })
    .await
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
async fn answer_in_plain(mut tcp: TcpStream) {
    let answer = plain_answer();
    let (mut sent, mut left) = (0, MAX_DISCARD);
    poll_fn(|cx| {
        let mut tcp = pin!(&mut tcp);
        while sent < answer.len() {
            match ready!(tcp.as_mut().poll_write(cx, &answer.as_bytes()[sent..])) {
                Ok(n) if n > 0 => sent += n,
                _ => return Poll::Ready(()),
            }
        }
        if ready!(tcp.as_mut().poll_shutdown(cx)).is_err() {
            return Poll::Ready(());
        }
        let mut scratch = [0; 4096];
        loop {
            let mut buf = ReadBuf::new(&mut scratch);
            match ready!(tcp.as_mut().poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() && left >= buf.filled().len() => {
                    left -= buf.filled().len()
                }
                _ => return Poll::Ready(()),
            }
        }
    })
    .await;
}
