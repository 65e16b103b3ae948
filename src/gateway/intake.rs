//! A request's body: read within bounds of size and time, scanned as it comes, kept as it came.

use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, EXPECT, HeaderMap, HeaderValue};
use smallvec::SmallVec;
use xxhash_rust::xxh64::Xxh64;

use crate::client::exchange::Exchange;
use crate::client::load::Upload;
use crate::clock;
use crate::gateway::Gateway;
use crate::gateway::refusal::GatewayError;
use crate::http1::headers::is_encoded;
use crate::json::members::{Affinity, Fields, ScanError, Watch};
use crate::json::patch::BodyFault;
use crate::json::scan::Scanner;
use crate::protocol::endpoint::Api;
use crate::telemetry::RequestRecord;
use crate::time::{Nanos, SECOND};

/// A body must grow by [`PROGRESS`] bytes in this time.
const PATIENCE: Nanos = 30 * SECOND;
const PROGRESS: usize = 1024;

/// Pieces that are smaller share a buffer, but for the first: each holds the whole of the buffer that it was read into,
/// and a body sent byte by byte is to take no more memory than one sent at once.
const SMALL: usize = 4096;

/// A body's pieces: most often one.
pub(crate) type Chunks = SmallVec<[Bytes; 1]>;

/// A chat request: its body in pieces and what the scan found.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    /// The body as it came.
    pub chunks: Chunks,
    /// Its top-level members.
    pub fields: Fields,
}

/// What the head alone can be refused for.
///
/// # Errors
/// 413, 415 or 417.
pub(crate) fn check_head(headers: &HeaderMap, max: u64) -> Result<(), GatewayError> {
    let announced = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > max) {
        return Err(GatewayError::TooLarge(max));
    }
    if is_encoded(headers) {
        return Err(GatewayError::UnsupportedEncoding);
    }
    if headers.get_all(EXPECT).iter().any(|v| !v.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        return Err(GatewayError::ExpectationFailed);
    }
    Ok(())
}

/// The reading of a request's body.
pub(crate) struct Intake<'a> {
    /// The worker's gateway.
    pub(crate) gateway: &'a Gateway,
    /// The client's side.
    pub(crate) exchange: &'a Exchange,
    /// What the scanner looks for.
    pub(crate) watch: &'a Watch,
    /// When the request's time is up.
    pub(crate) deadline: Nanos,
}

impl Intake<'_> {
    /// Reads and scans the body. The [`Upload`] is there where the body had to be waited for: until the request has a slot, so
    /// that the drain waits for it.
    ///
    /// # Errors
    /// What is wrong with it, or [`GatewayError::RequestTimeout`] where it stops growing or the deadline passes.
    pub(crate) async fn read(
        &self,
        mut body: impl http_body::Body<Data = Bytes> + Unpin,
        api: &Api,
        record: &mut RequestRecord,
    ) -> Result<(ChatRequest, Option<Upload>), GatewayError> {
        let refuse = |error| refuse(error, self.watch);
        let max = self.gateway.server().max_body_bytes;
        let mut scanner = Scanner::new(self.watch);
        let mut upload = None;
        let mut pieces = Pieces::default();
        let (mut length, mut marked) = (0u64, 0u64);
        let mut until = self.deadline.min(self.exchange.coarse_now() + PATIENCE);
        while !body.is_end_stream() {
            // What is here already costs no look at the clock.
            let mut since = None;
            let frame = poll_fn(|cx| {
                let frame = Pin::new(&mut body).poll_frame(cx);
                if frame.is_pending() {
                    since.get_or_insert_with(clock::now);
                    upload.get_or_insert_with(|| self.gateway.begin_upload());
                }
                frame
            });
            let frame = self.exchange.limit(until, frame).await.map_err(|_| GatewayError::RequestTimeout)?;
            record.others += since.map_or(0, |since| clock::now() - since);
            let Some(frame) = frame else { break };
            // Trailers end at Zap.
            let Ok(data) = frame.map_err(|_| GatewayError::BodyIncomplete)?.into_data() else { continue };
            length += data.len() as u64;
            if length > max {
                return Err(GatewayError::TooLarge(max));
            }
            scanner.feed(&data).map_err(refuse)?;
            pieces.push(data);
            if length - marked >= PROGRESS as u64 && !body.is_end_stream() {
                marked = length;
                until = self.deadline.min(clock::now() + PATIENCE);
            }
        }
        let fields = scanner.finish().map_err(refuse)?;
        fields.check(api.needs_messages, api.has_default_model).map_err(refuse_fault)?;
        Ok((ChatRequest { chunks: pieces.finish(), fields }, upload))
    }
}

fn refuse(error: ScanError, watch: &Watch) -> GatewayError {
    match error {
        ScanError::CaseVariant { key, member } => GatewayError::KeyCase(key, member.name(watch).into()),
        ScanError::Duplicate(member) => GatewayError::DuplicateKey(member.name(watch).to_owned().into()),
        ScanError::Invalid { offset } => GatewayError::InvalidJson(offset),
    }
}

fn refuse_fault(fault: BodyFault) -> GatewayError {
    match fault {
        BodyFault::ModelType => GatewayError::InvalidType("model", "a string"),
        BodyFault::StreamType => GatewayError::InvalidType("stream", "true or false"),
        BodyFault::MissingMessages => GatewayError::MissingMessages,
        BodyFault::MissingModel => GatewayError::MissingModel,
    }
}

impl ChatRequest {
    /// What tells the conversation from others, the first that is there: the header `x-zap-session`, the body's
    /// `prompt_cache_key`, its `user`, else the model with at most `most` bytes of the opening messages. The same on
    /// every turn, in every process; `None` where there is nothing.
    pub(crate) fn affinity(
        &self,
        session: Option<&HeaderValue>,
        model: Option<&str>,
        most: usize,
    ) -> Option<u64> {
        let Affinity { cache_key, user, opening } = &self.fields.affinity;
        // One may not pass for another.
        let hash = |seed, first: &[u8], span: Range<u64>| {
            let mut hash = Xxh64::new(seed);
            hash.update(first);
            self.bytes(span).for_each(|piece| hash.update(piece));
            hash.digest()
        };
        if let Some(session) = session.filter(|s| !s.is_empty()) {
            return Some(hash(0, session.as_bytes(), 0..0));
        }
        if let Some(span) = cache_key {
            return Some(hash(1, b"", span.clone()));
        }
        if let Some(span) = user {
            return Some(hash(2, b"", span.clone()));
        }
        let Range { start, end } = opening.clone()?;
        Some(hash(3, model.unwrap_or_default().as_bytes(), start..end.min(start + most as u64)))
    }

    /// A stretch of the body, in pieces.
    fn bytes(&self, span: Range<u64>) -> impl Iterator<Item = &[u8]> {
        let mut start = 0u64;
        self.chunks.iter().filter_map(move |chunk| {
            let (from, end) = (start, start + chunk.len() as u64);
            start = end;
            let part = span.start.clamp(from, end)..span.end.clamp(from, end);
            (part.start < part.end).then(|| &chunk[(part.start - from) as usize..(part.end - from) as usize])
        })
    }
}

#[derive(Default)]
struct Pieces {
    done: Chunks,
    /// Small pieces.
    gathered: BytesMut,
}

impl Pieces {
    fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        if self.done.is_empty() && self.gathered.is_empty() || piece.len() >= SMALL {
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

    fn finish(mut self) -> Chunks {
        self.flush();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scanned(body: &str, size: usize) -> ChatRequest {
        let watch = Watch { affinity: true, ..Watch::default() };
        let chunks: Chunks = body.as_bytes().chunks(size).map(Bytes::copy_from_slice).collect();
        let mut scanner = Scanner::new(&watch);
        chunks.iter().for_each(|c| scanner.feed(c).unwrap());
        ChatRequest { chunks, fields: scanner.finish().unwrap() }
    }

    #[test]
    fn a_conversation_is_the_same_on_every_turn_and_however_it_is_cut() {
        let opening = r#"{"role":"system","content":"s"},{"role":"user","content":"hello"}"#;
        let turn = |more: &str| format!(r#"{{"messages":[{opening}{more}],"model":"m"}}"#);
        let first = turn("");
        let later = turn(r#",{"role":"assistant","content":"hi"},{"role":"user","content":"and?"}"#);
        let key = |body: &str, size| scanned(body, size).affinity(None, Some("m"), 4096);
        for size in [1, 7, 1000] {
            assert_eq!(key(&first, size), key(&later, 64));
        }
        assert_ne!(key(&first, 9), key(&first.replace("hello", "hallo"), 9));
        assert_ne!(key(&first, 9), scanned(&first, 9).affinity(None, Some("other"), 4096));
        let short = |body: &str| scanned(body, 9).affinity(None, Some("m"), 40);
        assert_eq!(short(&first), short(&first.replace("hello", "hallo")), "beyond what is looked at");
    }

    #[test]
    fn a_session_counts_before_a_cache_key_before_a_user() {
        let body = |more: &str| format!(r#"{{"messages":[]{more}}}"#);
        let session = HeaderValue::from_static("x");
        let key = |more: &str, session| scanned(&body(more), 8).affinity(session, None, 9);
        let all = r#","user":"x","prompt_cache_key":"x""#;
        let keys = [key(all, Some(&session)), key(all, None), key(r#","user":"x""#, None), key("", None)];
        for (i, one) in keys.iter().enumerate() {
            assert!(one.is_some() && !keys[..i].contains(one), "{keys:?}");
        }
        assert_eq!(keys[0], key("", Some(&session)));
        assert_eq!(scanned("{}", 8).affinity(None, Some("m"), 9), None, "nothing to go by");
    }

    #[test]
    fn the_head_alone_may_be_refused() {
        for (name, value, want) in [
            ("content-length", "10", Ok(())),
            ("content-length", "11", Err(GatewayError::TooLarge(10))),
            ("content-encoding", "Identity", Ok(())),
            ("content-encoding", "identity, identity", Ok(())),
            ("content-encoding", "none", Ok(())),
            ("content-encoding", "", Ok(())),
            ("content-encoding", "gzip", Err(GatewayError::UnsupportedEncoding)),
            ("content-encoding", "identity, br", Err(GatewayError::UnsupportedEncoding)),
            ("content-encoding", "gzip, none", Err(GatewayError::UnsupportedEncoding)),
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
        // The first, the large one, and what stands before and behind it.
        assert_eq!(done.len(), 2 + 99_999usize.div_ceil(4 * SMALL) + 90_000usize.div_ceil(4 * SMALL));
        assert!(done[1..].iter().all(|piece| piece.len() <= 4 * SMALL));
        assert_eq!(done.concat(), body);
    }
}
