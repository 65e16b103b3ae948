//! Properties of `http1::decode`: a response decodes to the same result however its bytes are split, and hyper's client
//! accepts every response that the decoder accepts, with the same content.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, Version, response};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper::rt::{Read, ReadBufCursor, Write};

use crate::http1::decode::{Decoder, Invalid, MAX_HEAD, MAX_HEADERS};

/// A decoded response.
#[derive(Debug, PartialEq)]
struct DecodedResponse {
    status: StatusCode,
    version: Version,
    headers: HeaderMap,
    body: Vec<u8>,
    /// Whether the response ended as its framing says.
    complete: bool,
    /// Whether another response may follow on the connection.
    reusable: bool,
}

/// Fuzzes `http1::decode`. The first byte is the size of the pieces, less one; the rest is the input.
pub fn upstream_response(data: &[u8]) {
    let Some((size, bytes)) = data.split_first() else { return };
    let at_once = decode(bytes, usize::MAX);
    let split = decode(bytes, 1 + usize::from(*size));
    match (&at_once, &split) {
        // The decoder sees bytes after the response only if they are in the same piece; otherwise the link finds them.
        (Ok(Some(a)), Ok(Some(b))) => {
            assert_eq!(
                (a.status, &a.headers, &a.body, a.complete),
                (b.status, &b.headers, &b.body, b.complete)
            );
            assert!(b.reusable || !a.reusable, "the connection is reusable only if the input is not split");
        }
        (Ok(None), Ok(None)) | (Err(_), Err(_)) => {}
        // A fault of the body in the piece of the head fails the whole response; in a later piece it cuts the body.
        (Err(_), Ok(Some(b))) => assert!(!b.complete, "{at_once:?}, split {split:?}"),
        _ => fail(&at_once, &split),
    }
    if let Ok(Some(response)) = at_once
        && response.complete
        && response.status != StatusCode::SWITCHING_PROTOCOLS
    {
        let by_hyper = decode_with_hyper(bytes);
        let Some((head, body)) = by_hyper else { unreachable!("hyper refuses {response:?}") };
        assert_eq!(
            (response.status, response.version, &response.headers),
            (head.status, head.version, &head.headers)
        );
        assert_eq!(response.body, body, "{:?}", head.headers);
    }
}

fn fail(at_once: &impl std::fmt::Debug, split: &impl std::fmt::Debug) {
    unreachable!("{at_once:?}, split {split:?}");
}

/// Decodes `bytes` in pieces of `piece` bytes, then the end of the connection. Returns `None` if there is no whole
/// head.
fn decode(bytes: &[u8], piece: usize) -> Result<Option<DecodedResponse>, Invalid> {
    let mut decoder = Decoder::default();
    decoder.begin();
    let mut response: Option<DecodedResponse> = None;
    for piece in bytes.chunks(piece.min(bytes.len()).max(1)) {
        let Some(response) = &mut response else {
            let Some((parts, data)) = decoder.head(piece)? else { continue };
            let response::Parts { status, version, headers, .. } = parts;
            response = Some(DecodedResponse {
                status,
                version,
                headers,
                body: data.to_vec(),
                complete: false,
                reusable: false,
            });
            continue;
        };
        if decoder.is_done() || decoder.is_broken() {
            break;
        }
        match decoder.body(piece) {
            Ok(data) => response.body.extend_from_slice(&data),
            Err(_) => return Ok(Some(DecodedResponse { complete: false, ..take(response) })),
        }
    }
    let Some(mut response) = response else {
        decoder.end_of_head()?;
        return Ok(None);
    };
    response.reusable = decoder.may_go_on();
    response.complete = !decoder.is_broken() && decoder.end();
    Ok(Some(response))
}

fn take(response: &mut DecodedResponse) -> DecodedResponse {
    let (headers, body) = (std::mem::take(&mut response.headers), std::mem::take(&mut response.body));
    DecodedResponse { headers, body, ..*response }
}

/// Decodes `bytes` with hyper's client: the client sends a request, then reads `bytes` and the end of the connection.
fn decode_with_hyper(bytes: &[u8]) -> Option<(response::Parts, Vec<u8>)> {
    let mut cx = Context::from_waker(Waker::noop());
    let io = ScriptedPeer { bytes: bytes.to_vec(), at: 0, has_request: false };
    let mut builder = http1::Builder::new();
    builder.max_buf_size(2 * MAX_HEAD).max_headers(MAX_HEADERS);
    let Poll::Ready(Ok((mut sender, connection))) = pin!(builder.handshake(io)).as_mut().poll(&mut cx) else {
        return None;
    };
    let mut connection = pin!(connection);
    let mut connection_done = connection.as_mut().poll(&mut cx).is_ready();
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.method_mut() = http::Method::POST;
    let mut exchange = pin!(async move {
        let (head, mut body) = sender.send_request(request).await.ok()?.into_parts();
        let mut data = Vec::new();
        while let Some(frame) = body.frame().await {
            // Zap drops trailers.
            data.extend(frame.ok()?.into_data().unwrap_or_default());
        }
        Some((head, data))
    });
    // The waker does nothing, so poll both in turn: each step of one can unblock the other.
    for _ in 0..10_000 {
        if let Poll::Ready(response) = exchange.as_mut().poll(&mut cx) {
            return response;
        }
        if !connection_done {
            connection_done = connection.as_mut().poll(&mut cx).is_ready();
        }
    }
    None
}

/// A peer that sends `bytes` after it receives a request.
struct ScriptedPeer {
    bytes: Vec<u8>,
    at: usize,
    has_request: bool,
}

impl Read for ScriptedPeer {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.has_request {
            return Poll::Pending;
        }
        let n = buf.remaining().min(self.bytes.len() - self.at);
        buf.put_slice(&self.bytes[self.at..self.at + n]);
        self.at += n;
        Poll::Ready(Ok(()))
    }
}

impl Write for ScriptedPeer {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.has_request = true;
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
