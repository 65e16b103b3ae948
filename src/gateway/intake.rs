//! A request's body: read within bounds of size and time, scanned as it comes, kept as it came.

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, EXPECT, HeaderMap};
use http_body::Body as _;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use crate::clock;
use crate::error::GatewayError;
use crate::policy::patch::BodyFault;
use crate::policy::scan::{Fields, Member, ScanError, Scanner};
use crate::policy::{Nanos, SECOND};
use crate::server::io::Conn;
use crate::telemetry::Endpoint;

/// A body must grow by [`PROGRESS`] bytes in this time.
const PATIENCE: Nanos = 30 * SECOND;
const PROGRESS: usize = 1024;

/// Pieces that are kept as they came; beyond it small ones share a buffer, so that a body sent byte by byte
/// takes no more memory than one sent at once.
const MAX_PIECES: usize = 256;
const SMALL: usize = 4096;

/// A chat request: its body in pieces and what the scan found.
#[derive(Debug)]
pub struct ChatRequest {
    /// The body as it came.
    pub chunks: Vec<Bytes>,
    /// Its top-level members.
    pub fields: Fields,
}

/// What the head alone can be refused for.
///
/// # Errors
/// 413, 415 or 417.
pub fn check_head(headers: &HeaderMap, max: u64) -> Result<(), GatewayError> {
    let announced = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > max) {
        return Err(GatewayError::TooLarge(max));
    }
    if headers.get_all(CONTENT_ENCODING).iter().any(|v| !v.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(GatewayError::UnsupportedEncoding);
    }
    if headers.get_all(EXPECT).iter().any(|v| !v.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        return Err(GatewayError::ExpectationFailed);
    }
    Ok(())
}

/// Reads and scans the body of a request to `endpoint`, of at most `max` bytes.
///
/// # Errors
/// What is wrong with it, or [`GatewayError::RequestTimeout`] where it stops growing or `deadline` passes.
pub async fn read(
    mut body: Incoming,
    conn: &Conn,
    endpoint: Endpoint,
    max: u64,
    deadline: Nanos,
) -> Result<ChatRequest, GatewayError> {
    let mut scanner = Scanner::new();
    let mut pieces = Pieces::default();
    let (mut length, mut marked) = (0u64, 0u64);
    let mut until = deadline.min(conn.coarse_now() + PATIENCE);
    while !body.is_end_stream() {
        let frame = conn.alarm.limit(until, body.frame()).await.map_err(|_| GatewayError::RequestTimeout)?;
        let Some(frame) = frame else { break };
        // Trailers end at Zap.
        let Ok(data) = frame.map_err(|_| GatewayError::BodyIncomplete)?.into_data() else { continue };
        length += data.len() as u64;
        if length > max {
            return Err(GatewayError::TooLarge(max));
        }
        scanner.feed(&data).map_err(refuse)?;
        pieces.push(data);
        if length - marked >= PROGRESS as u64 {
            marked = length;
            until = deadline.min(clock::now() + PATIENCE);
        }
    }
    let fields = scanner.finish().map_err(refuse)?;
    fields.check(endpoint == Endpoint::Chat, endpoint.has_default_model()).map_err(refuse_fault)?;
    Ok(ChatRequest { chunks: pieces.finish(), fields })
}

fn refuse(error: ScanError) -> GatewayError {
    match error {
        ScanError::Duplicate(member) => GatewayError::DuplicateKey(member.name()),
        ScanError::Invalid { offset } => GatewayError::InvalidJson(offset),
    }
}

fn refuse_fault(fault: BodyFault) -> GatewayError {
    match fault {
        BodyFault::InvalidType(member @ Member::Model) => {
            GatewayError::InvalidType(member.name(), "a string")
        }
        BodyFault::InvalidType(member @ Member::Stream) => {
            GatewayError::InvalidType(member.name(), "true or false")
        }
        BodyFault::InvalidType(member @ Member::Messages) => {
            GatewayError::InvalidType(member.name(), "an array")
        }
        BodyFault::MissingMessages => GatewayError::MissingMessages,
        BodyFault::MissingModel => GatewayError::MissingModel,
    }
}

#[derive(Default)]
struct Pieces {
    done: Vec<Bytes>,
    /// Small pieces that came after many others.
    gathered: BytesMut,
}

impl Pieces {
    fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        if self.done.len() < MAX_PIECES || piece.len() >= SMALL {
            self.flush();
            self.done.push(piece);
            return;
        }
        self.gathered.extend_from_slice(&piece);
        if self.gathered.len() >= 4 * SMALL {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if !self.gathered.is_empty() {
            self.done.push(self.gathered.split().freeze());
        }
    }

    fn finish(mut self) -> Vec<Bytes> {
        self.flush();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn the_head_alone_may_be_refused() {
        for (name, value, want) in [
            ("content-length", "10", Ok(())),
            ("content-length", "11", Err(GatewayError::TooLarge(10))),
            ("content-encoding", "Identity", Ok(())),
            ("content-encoding", "gzip", Err(GatewayError::UnsupportedEncoding)),
            ("expect", "100-Continue", Ok(())),
            ("expect", "200-ok", Err(GatewayError::ExpectationFailed)),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            assert_eq!(check_head(&headers, 10), want, "{name}: {value}");
        }
    }

    #[test]
    fn a_body_sent_byte_by_byte_is_kept_in_few_pieces_and_in_order() {
        let mut pieces = Pieces::default();
        let body: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        body[..100_000].iter().for_each(|b| pieces.push(Bytes::copy_from_slice(&[*b])));
        pieces.push(Bytes::copy_from_slice(&body[100_000..110_000]));
        body[110_000..].iter().for_each(|b| pieces.push(Bytes::copy_from_slice(&[*b])));
        let done = pieces.finish();
        assert!(done.len() < MAX_PIECES + 20, "{}", done.len());
        assert_eq!(done.concat(), body);
    }
}
