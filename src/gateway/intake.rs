//! Reads the body of a request, with limits on size and time. The body is scanned as it arrives, and kept unchanged.

use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HeaderMap, HeaderValue};
use memchr::memmem;
use serde_json::Value;
use xxhash_rust::xxh64::Xxh64;

use crate::client::exchange::Exchange;
use crate::client::load::Upload;
use crate::clock;
use crate::gateway::Gateway;
use crate::gateway::buffered::MemoryHold;
use crate::gateway::chunk_buffer::{ChunkBuffer, Chunks};
use crate::gateway::refusal::GatewayError;
use crate::http1::headers::is_encoded;
use crate::json::members::{Affinity, Fields, ScanError, Watch};
use crate::json::patch::BodyFault;
use crate::json::scan::Scanner;
use crate::protocol::body_text::prose_length;
use crate::protocol::endpoint::{Api, BodyFormat};
use crate::protocol::multipart::{Form, FormError, FormScanner, MODEL};
use crate::telemetry::record::RequestRecord;
use crate::time::{Nanos, SECOND};

/// A body must grow by [`MIN_PROGRESS`] bytes within this time.
const STALL_TIMEOUT: Nanos = 30 * SECOND;
const MIN_PROGRESS: usize = 1024;

/// Longest `metadata` that is read, in bytes.
const MAX_METADATA: u64 = 16 * 1024;

/// A request to a backend: its body in chunks, and the result of the scan.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    /// The body as received.
    pub chunks: Chunks,
    /// The top-level members that Zap reads; of a form, its model alone.
    pub fields: Fields,
    /// The form, if the body is one.
    pub form: Option<Form>,
}

/// Checks what the head announces about the body. `max`: the largest body, in bytes.
///
/// # Errors
/// [`GatewayError::TooLarge`], [`GatewayError::UnsupportedEncoding`] or [`GatewayError::ExpectationFailed`].
pub(crate) fn check_head(headers: &HeaderMap, max: u64) -> Result<(), GatewayError> {
    let length = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > max) {
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

/// Reads the body of one request.
pub(crate) struct BodyReader<'a> {
    /// The worker's gateway.
    pub(crate) gateway: &'a Gateway,
    /// The exchange on the client connection.
    pub(crate) exchange: &'a Exchange,
    /// The members that the scanner looks for.
    pub(crate) watch: &'a Watch,
    /// The headers of the request.
    pub(crate) headers: &'a HeaderMap,
}

/// The scanner of a body.
enum BodyScanner<'a> {
    Form(FormScanner),
    Json(Scanner<'a>, &'a Watch),
    Nothing,
}

impl<'a> BodyScanner<'a> {
    fn new(format: BodyFormat, headers: &HeaderMap, watch: &'a Watch) -> Result<Self, GatewayError> {
        Ok(match format {
            BodyFormat::Form => {
                // With two values it is not sure which one a backend reads.
                let mut values = headers.get_all(CONTENT_TYPE).iter();
                let value = values.next().filter(|_| values.next().is_none()).map(HeaderValue::as_bytes);
                BodyScanner::Form(FormScanner::new(value.unwrap_or_default()).map_err(form_error)?)
            }
            BodyFormat::Json => BodyScanner::Json(Scanner::new(watch), watch),
            BodyFormat::Nothing => BodyScanner::Nothing,
        })
    }

    fn feed(&mut self, data: &[u8]) -> Result<(), GatewayError> {
        match self {
            BodyScanner::Form(scanner) => scanner.feed(data).map_err(form_error),
            BodyScanner::Json(scanner, watch) => scanner.feed(data).map_err(|error| scan_error(error, watch)),
            BodyScanner::Nothing => Ok(()),
        }
    }

    fn finish(self) -> Result<(Fields, Option<Form>), GatewayError> {
        match self {
            BodyScanner::Form(scanner) => {
                let form = scanner.finish().map_err(form_error)?;
                let fields = Fields { model: form.model.clone(), length: form.length, ..Fields::default() };
                Ok((fields, Some(form)))
            }
            BodyScanner::Json(scanner, watch) => {
                Ok((scanner.finish().map_err(|error| scan_error(error, watch))?, None))
            }
            BodyScanner::Nothing => Ok((Fields::default(), None)),
        }
    }
}

impl BodyReader<'_> {
    /// Reads and scans the body. Also returns an [`Upload`] if it had to wait for the body: the drain waits for the
    /// request as long as the caller holds the [`Upload`], which is until the request has a slot. `hold` gets the
    /// memory of the body.
    ///
    /// # Errors
    /// Returns the error in the body, [`GatewayError::RequestTimeout`] if the body stalls, or
    /// [`GatewayError::MemoryFull`].
    pub(crate) async fn read(
        &self,
        mut body: impl http_body::Body<Data = Bytes> + Unpin,
        api: &Api,
        (record, hold): (&mut RequestRecord, &mut MemoryHold),
    ) -> Result<(ChatRequest, Option<Upload>), GatewayError> {
        let max = self.gateway.server().max_body_bytes;
        let mut scanner = BodyScanner::new(api.body, self.headers, self.watch)?;
        let mut upload = None;
        let mut chunks = ChunkBuffer::of_length(body.size_hint().exact());
        // `checked`: the length at the last time that the body had made progress.
        let (mut length, mut checked) = (0u64, 0u64);
        let mut until = self.exchange.coarse_now() + STALL_TIMEOUT;
        while !body.is_end_stream() {
            // The clock is read only if the frame has not arrived yet.
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
            record.waited += since.map_or(0, |since| clock::now() - since);
            let Some(frame) = frame else { break };
            // Zap does not forward trailers.
            let Ok(data) = frame.map_err(|_| GatewayError::BodyIncomplete)?.into_data() else { continue };
            length += data.len() as u64;
            if length > max {
                return Err(GatewayError::TooLarge(max));
            }
            if api.body != BodyFormat::Nothing {
                let waited = hold.grow(data.len() as u64, self.exchange).await?;
                record.waited += waited;
                until += waited;
                scanner.feed(&data)?;
                chunks.push(data);
            }
            if length - checked >= MIN_PROGRESS as u64 && !body.is_end_stream() {
                checked = length;
                until = clock::now() + STALL_TIMEOUT;
            }
        }
        let (fields, form) = scanner.finish()?;
        fields.check(api.needs_messages, api.has_default_model).map_err(body_error)?;
        Ok((ChatRequest { chunks: chunks.finish(), fields, form }, upload))
    }
}

fn scan_error(error: ScanError, watch: &Watch) -> GatewayError {
    match error {
        ScanError::CaseVariant { key, member } => GatewayError::KeyCase(key, member.name(watch).into()),
        ScanError::Duplicate(member) => GatewayError::DuplicateKey(member.name(watch).to_owned().into()),
        ScanError::Invalid { offset } => GatewayError::InvalidJson(offset),
    }
}

fn form_error(error: FormError) -> GatewayError {
    match error {
        FormError::CaseVariant(name) => GatewayError::KeyCase(name, MODEL.into()),
        FormError::Duplicate => GatewayError::DuplicateKey(MODEL.into()),
        FormError::Invalid(why) => GatewayError::InvalidForm(why),
    }
}

fn body_error(fault: BodyFault) -> GatewayError {
    match fault {
        BodyFault::ModelType => GatewayError::InvalidType("model", "a string"),
        BodyFault::StreamType => GatewayError::InvalidType("stream", "true or false"),
        BodyFault::MissingMessages => GatewayError::MissingMessages,
        BodyFault::MissingModel => GatewayError::MissingModel,
    }
}

impl ChatRequest {
    /// Returns a hash that identifies the conversation, of the first of these that is present: the header of a session,
    /// the members `prompt_cache_key`, `metadata.user_id` and `user`, the model with at most `max_bytes` of the opening
    /// of `messages`, `input` or `prompt`, unless `max_bytes` is `None`. The hash is the same for every request of the
    /// conversation and in every process. `None` if none of these is present.
    pub(crate) fn affinity(
        &self,
        session: Option<&HeaderValue>,
        model: Option<&str>,
        max_bytes: Option<usize>,
    ) -> Option<u64> {
        let Affinity { cache_key, user, metadata, opening } = &self.fields.affinity;
        // A seed for each kind of key, so that equal texts of two kinds have different hashes.
        let hash = |seed, first: &[u8], span: Range<u64>| {
            let mut hash = Xxh64::new(seed);
            hash.update(first);
            self.bytes(span).for_each(|part| hash.update(part));
            hash.digest()
        };
        if let Some(session) = session.filter(|s| !s.is_empty()) {
            return Some(hash(0, session.as_bytes(), 0..0));
        }
        if let Some(span) = cache_key {
            return Some(hash(1, b"", span.clone()));
        }
        let user_id = metadata.as_ref().and_then(|span| self.user_id(span.clone()));
        if let Some(id) = user_id {
            return Some(hash(4, id.as_bytes(), 0..0));
        }
        if let Some(span) = user {
            return Some(hash(2, b"", span.clone()));
        }
        let (Range { start, end }, max_bytes) = (opening.clone()?, max_bytes? as u64);
        Some(hash(3, model.unwrap_or_default().as_bytes(), start..end.min(start + max_bytes)))
    }

    /// The string `user_id` in a short `metadata`.
    fn user_id(&self, span: Range<u64>) -> Option<String> {
        let metadata = Some(span).filter(|span| span.end - span.start <= MAX_METADATA)?;
        let metadata: Value = serde_json::from_slice(&self.copy(metadata)).ok()?;
        metadata["user_id"].as_str().filter(|id| !id.is_empty()).map(str::to_owned)
    }

    /// The length of the body's text in bytes, for estimates of its tokens; 0 for a form, which is a file for the most
    /// part.
    pub(crate) fn text_length(&self) -> u64 {
        if self.form.is_some() {
            return 0;
        }
        prose_length(self.fields.length, self.chunks.iter().map(|chunk| &chunk[..]))
    }

    /// Whether a range of the body has this text.
    pub(crate) fn contains(&self, span: Range<u64>, text: &str) -> bool {
        let mut parts = self.bytes(span.clone());
        match (parts.next(), parts.next()) {
            (Some(only), None) => memmem::find(only, text.as_bytes()).is_some(),
            _ => memmem::find(&self.copy(span), text.as_bytes()).is_some(),
        }
    }

    /// Copies a range of the body.
    pub(crate) fn copy(&self, span: Range<u64>) -> Vec<u8> {
        self.bytes(span).flatten().copied().collect()
    }

    /// Returns the bytes of a range of the body, in parts.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(body: &str, chunk_size: usize) -> ChatRequest {
        let watch = Watch { affinity: true, ..Watch::default() };
        let chunks: Chunks = body.as_bytes().chunks(chunk_size).map(Bytes::copy_from_slice).collect();
        let mut scanner = Scanner::new(&watch);
        chunks.iter().for_each(|c| scanner.feed(c).unwrap());
        ChatRequest { chunks, fields: scanner.finish().unwrap(), form: None }
    }

    #[test]
    fn the_affinity_of_a_conversation_is_the_same_on_every_turn_and_for_any_chunking() {
        let opening = r#"{"role":"system","content":"s"},{"role":"user","content":"hello"}"#;
        let turn = |more: &str| format!(r#"{{"messages":[{opening}{more}],"model":"m"}}"#);
        let first = turn("");
        let later = turn(r#",{"role":"assistant","content":"hi"},{"role":"user","content":"and?"}"#);
        let key = |body: &str, size| scan(body, size).affinity(None, Some("m"), Some(4096));
        for size in [1, 7, 1000] {
            assert_eq!(key(&first, size), key(&later, 64));
        }
        assert_ne!(key(&first, 9), key(&first.replace("hello", "hallo"), 9));
        assert_ne!(key(&first, 9), scan(&first, 9).affinity(None, Some("other"), Some(4096)));
        let short = |body: &str| scan(body, 9).affinity(None, Some("m"), Some(40));
        assert_eq!(
            short(&first),
            short(&first.replace("hello", "hallo")),
            "the difference is beyond `max_bytes`"
        );
    }

    #[test]
    fn affinity_prefers_the_session_to_the_cache_key_to_the_users_to_the_messages() {
        let body = |more: &str| format!(r#"{{"messages":[]{more}}}"#);
        let session = HeaderValue::from_static("x");
        let key = |more: &str, session| scan(&body(more), 8).affinity(session, None, Some(9));
        let all = r#","user":"x","metadata":{"user_id":"x"},"prompt_cache_key":"x""#;
        let keys = [
            key(all, Some(&session)),
            key(all, None),
            key(r#","user":"x","metadata":{"user_id":"x"}"#, None),
            key(r#","user":"x","metadata":{"user_id":7}"#, None),
            key("", None),
        ];
        for (i, one) in keys.iter().enumerate() {
            assert!(one.is_some() && !keys[..i].contains(one), "{keys:?}");
        }
        assert_eq!(keys[0], key("", Some(&session)));
        assert_eq!(scan("{}", 8).affinity(None, Some("m"), Some(9)), None, "the body has nothing to hash");
    }

    #[test]
    fn check_head_refuses_invalid_lengths_encodings_and_expectations() {
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
}
