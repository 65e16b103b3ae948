//! The law of `upstream::decode`: however an answer is cut it reads the same, and what is accepted hyper's client
//! accepts too, and sees the same in it.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, Version, response};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper::rt::{Read, ReadBufCursor, Write};

use crate::http1::decode::{Decoder, Invalid, MAX_HEAD, MAX_HEADERS};

/// What was read of an answer.
#[derive(Debug, PartialEq)]
struct DecodedAnswer {
    status: StatusCode,
    version: Version,
    headers: HeaderMap,
    body: Vec<u8>,
    /// It ended as its framing says.
    whole: bool,
    /// Another may follow.
    goes_on: bool,
}

/// `upstream::decode`: the first byte says how the rest is cut.
pub fn upstream_response(data: &[u8]) {
    let Some((size, bytes)) = data.split_first() else { return };
    let ours = decode(bytes, usize::MAX);
    let cut = decode(bytes, 1 + usize::from(*size));
    match (&ours, &cut) {
        // What stands behind an answer is seen at once or never: that is the link's to find.
        (Ok(Some(a)), Ok(Some(b))) => {
            assert_eq!((a.status, &a.headers, &a.body, a.whole), (b.status, &b.headers, &b.body, b.whole));
            assert!(b.goes_on || !a.goes_on, "cut in pieces it ends earlier");
        }
        (Ok(None), Ok(None)) | (Err(_), Err(_)) => {}
        // A body's fault in the piece with the head refuses both; later it cuts the body.
        (Err(_), Ok(Some(b))) => assert!(!b.whole, "{ours:?}, cut {cut:?}"),
        _ => panic_of(&ours, &cut),
    }
    if let Ok(Some(answer)) = ours
        && answer.whole
        && answer.status != StatusCode::SWITCHING_PROTOCOLS
    {
        let theirs = hypers(bytes);
        let Some((head, body)) = theirs else { unreachable!("hyper refuses {answer:?}") };
        assert_eq!(
            (answer.status, answer.version, &answer.headers),
            (head.status, head.version, &head.headers)
        );
        assert_eq!(answer.body, body, "{:?}", head.headers);
    }
}

fn panic_of(ours: &impl std::fmt::Debug, cut: &impl std::fmt::Debug) {
    unreachable!("{ours:?}, cut {cut:?}");
}

/// Reads `bytes` in pieces, and then the end of the connection; `None`: no head.
fn decode(bytes: &[u8], piece: usize) -> Result<Option<DecodedAnswer>, Invalid> {
    let mut decoder = Decoder::default();
    decoder.begin();
    let mut answer: Option<DecodedAnswer> = None;
    for piece in bytes.chunks(piece.min(bytes.len()).max(1)) {
        let Some(answer) = &mut answer else {
            let Some((parts, data)) = decoder.head(piece)? else { continue };
            let response::Parts { status, version, headers, .. } = parts;
            answer = Some(DecodedAnswer {
                status,
                version,
                headers,
                body: data.to_vec(),
                whole: false,
                goes_on: false,
            });
            continue;
        };
        if decoder.is_done() || decoder.is_broken() {
            break;
        }
        match decoder.body(piece) {
            Ok(data) => answer.body.extend_from_slice(&data),
            Err(_) => return Ok(Some(DecodedAnswer { whole: false, ..take(answer) })),
        }
    }
    let Some(mut answer) = answer else {
        decoder.end_of_head()?;
        return Ok(None);
    };
    answer.goes_on = decoder.may_go_on();
    answer.whole = !decoder.is_broken() && decoder.end();
    Ok(Some(answer))
}

fn take(answer: &mut DecodedAnswer) -> DecodedAnswer {
    let (headers, body) = (std::mem::take(&mut answer.headers), std::mem::take(&mut answer.body));
    DecodedAnswer { headers, body, ..*answer }
}

/// The same through hyper's client, which asks first and then finds `bytes` and the end of the connection.
fn hypers(bytes: &[u8]) -> Option<(response::Parts, Vec<u8>)> {
    let mut cx = Context::from_waker(Waker::noop());
    let io = Script { bytes: bytes.to_vec(), at: 0, asked: false };
    let mut builder = http1::Builder::new();
    builder.max_buf_size(2 * MAX_HEAD).max_headers(MAX_HEADERS);
    let Poll::Ready(Ok((mut sender, connection))) = pin!(builder.handshake(io)).as_mut().poll(&mut cx) else {
        return None;
    };
    let mut connection = pin!(connection);
    let mut over = connection.as_mut().poll(&mut cx).is_ready();
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.method_mut() = http::Method::POST;
    let mut answering = pin!(async move {
        let (head, mut body) = sender.send_request(request).await.ok()?.into_parts();
        let mut data = Vec::new();
        while let Some(frame) = body.frame().await {
            // Trailers end at Zap.
            data.extend(frame.ok()?.into_data().unwrap_or_default());
        }
        Some((head, data))
    });
    // Every step of one of them lets the other go on.
    for _ in 0..10_000 {
        if let Poll::Ready(answer) = answering.as_mut().poll(&mut cx) {
            return answer;
        }
        if !over {
            over = connection.as_mut().poll(&mut cx).is_ready();
        }
    }
    None
}

/// A peer that answers with these bytes once it was asked.
struct Script {
    bytes: Vec<u8>,
    at: usize,
    asked: bool,
}

impl Read for Script {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.asked {
            return Poll::Pending;
        }
        let n = buf.remaining().min(self.bytes.len() - self.at);
        buf.put_slice(&self.bytes[self.at..self.at + n]);
        self.at += n;
        Poll::Ready(Ok(()))
    }
}

impl Write for Script {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.asked = true;
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
