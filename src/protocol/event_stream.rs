//! Follows an event stream as it passes: cuts it at the ends of events, and tells what its events say.
//!
//! An unfinished event is held back, since no parser can use half an event. So what goes out ends with an event, and
//! an event of Zap's own may follow at any time. What was pushed goes out unchanged and in order. The verdict does not
//! depend on the chunking.
//!
//! The token counts of the answer are read, and the length of its text. Once there is content, an event of a
//! [shape](crate::protocol::event_shape) that is known is not parsed.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use crate::protocol::endpoint::StreamFormat;
use crate::protocol::event_class::{Class, Said, error_body, mentions_error, read_event};
use crate::protocol::event_lines::{LOOK_BACK, end_of_event, end_of_last_event, is_line_end};
use crate::protocol::event_shape::{Shape, null_usage};
use crate::protocol::oversized_event::OversizedEvent;
use crate::protocol::redact::Redactor;
use crate::protocol::usage::{Usage, UsageParts};

/// Longest unfinished event that is held back, in bytes. A longer one goes out in pieces.
pub(crate) const MAX_HELD: usize = 64 * 1024;

/// U+FEFF, which may begin a stream.
const BOM: &[u8] = b"\xEF\xBB\xBF";

/// A part of the stream that does not go out as it came.
#[derive(Debug)]
struct Edit {
    at: Range<usize>,
    /// What goes out in its place.
    with: Bytes,
}

impl Edit {
    fn cut(at: Range<usize>) -> Self {
        Edit { at, with: Bytes::new() }
    }
}

type Edits = SmallVec<[Edit; 4]>;

/// How a stream has ended: which event of its own ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    /// By its terminal event.
    Complete,
    /// By an error event.
    Error,
}

/// An error event that came before any content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EarlyError {
    /// The status that the error stands for.
    pub status: u16,
    /// The error as a JSON body.
    pub body: Vec<u8>,
}

/// The state of one stream.
#[derive(Debug)]
pub(crate) struct EventStream {
    format: StreamFormat,
    /// The unfinished event.
    partial: Vec<u8>,
    /// An unfinished event that is too long to be held.
    oversized: Option<OversizedEvent>,
    shape: Shape,
    /// Whether Zap has asked for the token counts, so that they must not go out.
    hides_usage: bool,
    /// Takes the backend's key out of errors, of what follows them, and of oversized events, which may be errors.
    redactor: Option<Redactor>,
    /// Whether a line feed that follows must not go out, since it belongs to an event that did not.
    hides_feed: bool,
    usage: Option<UsageParts>,
    /// Whether the counts are those of the whole answer.
    is_usage_whole: bool,
    text: u64,
    is_begun: bool,
    has_events: bool,
    has_content: bool,
    is_finished: bool,
    end: Option<StreamEnd>,
    early_error: Option<EarlyError>,
}

impl EventStream {
    /// Starts a stream. `hides_usage`: Zap has asked for the token counts, so they do not go out.
    pub(crate) fn new(format: StreamFormat, hides_usage: bool) -> Self {
        EventStream {
            format,
            partial: Vec::new(),
            oversized: None,
            shape: Shape::default(),
            hides_usage,
            redactor: None,
            hides_feed: false,
            usage: None,
            is_usage_whole: false,
            text: 0,
            is_begun: false,
            has_events: false,
            has_content: false,
            is_finished: false,
            end: None,
            early_error: None,
        }
    }

    /// Takes `key` out of error events.
    pub(crate) fn without_key(self, key: Option<Arc<str>>) -> Self {
        EventStream { redactor: key.and_then(Redactor::new), ..self }
    }

    /// Reads the next chunk. Returns what may go out: the bytes up to the end of the last whole event, without the token
    /// counts that Zap has asked for, and without the key in an error.
    pub(crate) fn push(&mut self, data: Bytes) -> Bytes {
        if self.oversized.is_some() {
            return self.push_oversized(data);
        }
        if self.partial.is_empty() {
            let end = end_of_last_event(&data, 0);
            if end == data.len() {
                return self.pass(data);
            }
            self.partial = data[end..].to_vec();
            let whole = self.pass(data.slice(..end));
            return self.released(whole);
        }
        let from = self.partial.len().saturating_sub(LOOK_BACK);
        self.partial.extend_from_slice(&data);
        let end = end_of_last_event(&self.partial, from);
        if end == 0 {
            return self.released(Bytes::new());
        }
        let rest = self.partial.split_off(end);
        let whole = std::mem::replace(&mut self.partial, rest);
        let whole = self.pass(whole.into());
        self.released(whole)
    }

    /// Ends the stream at the end of its body. Returns the bytes that were held back. They count as an event.
    pub(crate) fn finish(&mut self) -> Bytes {
        let end = self.end_oversized();
        let rest = std::mem::take(&mut self.partial);
        joined(end, self.pass(rest.into()))
    }

    /// The token counts of the answer.
    pub(crate) fn usage(&self) -> Option<Usage> {
        self.usage_so_far().filter(|_| self.is_usage_whole)
    }

    /// The token counts that have come so far. Unless they are [those of the answer](Self::usage), only the input counts.
    pub(crate) fn usage_so_far(&self) -> Option<Usage> {
        self.usage.as_ref()?.usage()
    }

    /// The length of the answer's text so far, in bytes.
    pub(crate) fn text(&self) -> u64 {
        self.text + self.oversized.as_ref().map_or(0, |event| event.text())
    }

    /// Whether parts of the stream may go out otherwise than they came, so that its length may change.
    pub(crate) fn may_change(&self) -> bool {
        self.hides_usage || self.redactor.is_some()
    }

    /// Whether a whole event has come. A comment is none.
    pub(crate) fn has_events(&self) -> bool {
        self.has_events
    }

    /// Whether a part of the answer has come.
    pub(crate) fn has_content(&self) -> bool {
        self.has_content
    }

    /// How the stream has ended: which event of its own ended it. What comes later does not matter.
    pub(crate) fn end(&self) -> Option<StreamEnd> {
        self.end
    }

    /// Whether the answer is whole if the body ends here.
    pub(crate) fn is_whole(&self) -> bool {
        match self.format {
            StreamFormat::Plain => true,
            // Some providers never send `[DONE]`.
            StreamFormat::Done => self.end == Some(StreamEnd::Complete) || self.is_finished,
            StreamFormat::Messages | StreamFormat::Responses => self.end == Some(StreamEnd::Complete),
        }
    }

    /// Takes the token counts of an event.
    fn note_usage(&mut self, usage: Option<UsageParts>, class: Class) {
        let Some(usage) = usage else { return };
        match (self.format, &mut self.usage) {
            // The counts of a message come in parts, and those at its start are only a beginning.
            (StreamFormat::Messages, known) => {
                known.get_or_insert_default().update(&usage);
                self.is_usage_whole |= class != Class::Prelude;
            }
            (StreamFormat::Done | StreamFormat::Plain | StreamFormat::Responses, known) => {
                *known = Some(usage);
                self.is_usage_whole = true;
            }
        }
    }

    /// The error event, if it came before any content.
    pub(crate) fn take_early_error(&mut self) -> Option<EarlyError> {
        self.early_error.take()
    }

    /// Bytes that are held back.
    pub(crate) fn held(&self) -> usize {
        self.partial.len() + self.redactor.as_ref().map_or(0, |redactor| redactor.held())
    }

    /// Whether what has gone out ends with an event.
    pub(crate) fn is_between_events(&self) -> bool {
        self.oversized.is_none()
    }

    /// Adds the unfinished event to `out` if it is too long to be held.
    fn released(&mut self, out: Bytes) -> Bytes {
        if self.partial.len() <= MAX_HELD {
            return out;
        }
        let beginning = std::mem::take(&mut self.partial);
        self.oversized = Some(OversizedEvent::new(self.format, &beginning));
        joined(out, self.redacted(beginning.into()))
    }

    /// Returns what may go out of a part of an oversized event.
    fn redacted(&mut self, part: Bytes) -> Bytes {
        match &mut self.redactor {
            Some(redactor) => redactor.push(&part),
            None => part,
        }
    }

    /// Passes an event on that is too long to be held, up to its end.
    fn push_oversized(&mut self, data: Bytes) -> Bytes {
        let Some(end) = self.oversized.as_mut().and_then(|event| event.push(&data)) else {
            return self.redacted(data);
        };
        let part = self.redacted(data.slice(..end));
        let part = joined(part, self.end_oversized());
        let rest = self.push(data.slice(end..));
        match self.partial.is_empty() && !self.may_change() {
            true => data,
            false => joined(part, rest),
        }
    }

    /// Ends an oversized event. Returns its bytes that were held back.
    fn end_oversized(&mut self) -> Bytes {
        let Some(event) = self.oversized.take() else { return Bytes::new() };
        self.text += event.text();
        let (class, usage) = event.finish();
        self.note_usage(usage, class);
        self.note(class, b"");
        self.redactor.as_mut().map(|redactor| redactor.flush()).unwrap_or_default()
    }

    /// Reads whole events. Returns what may go out of them.
    fn pass(&mut self, events: Bytes) -> Bytes {
        let edits = self.read(&events);
        if edits.is_empty() {
            return events;
        }
        let mut out = BytesMut::with_capacity(events.len());
        let mut from = 0;
        for Edit { at, with } in edits {
            out.extend_from_slice(&events[from..at.start]);
            out.extend_from_slice(&with);
            from = at.end;
        }
        out.extend_from_slice(&events[from..]);
        out.freeze()
    }

    /// Reads whole events. Returns the parts that do not go out as they are.
    fn read(&mut self, events: &[u8]) -> Edits {
        let (mut at, mut edits) = (0, Edits::new());
        if events.is_empty() {
            return edits;
        }
        if !std::mem::replace(&mut self.is_begun, true) && events.starts_with(BOM) {
            at = BOM.len();
        }
        if std::mem::take(&mut self.hides_feed) && events.starts_with(b"\n") {
            edits.push(Edit::cut(0..1));
            at = 1;
        }
        // Behind the end, only what must not go out is still looked for.
        while at < events.len() && (self.end.is_none() || self.may_change()) {
            let rest = &events[at..];
            let may_be_known = self.has_content && self.end.is_none();
            let known = if may_be_known { self.shape.find(rest) } else { None };
            let (start, end, edit) = match known {
                Some(known) => {
                    self.text += known.text;
                    (0, known.length, known.cut.map(Edit::cut))
                }
                None => {
                    let start = rest.iter().position(|b| !is_line_end(*b)).unwrap_or(rest.len());
                    let end = end_of_event(rest, start).unwrap_or(rest.len());
                    (start, end, if start < end { self.parse(&rest[start..end]) } else { None })
                }
            };
            let from = at + start;
            edits.extend(edit.map(|edit| Edit { at: from + edit.at.start..from + edit.at.end, ..edit }));
            at += end;
        }
        // The line feed of the last line end may still come.
        self.hides_feed = events.ends_with(b"\r")
            && edits.last().is_some_and(|edit| edit.at.end == events.len() && edit.with.is_empty());
        edits
    }

    /// Reads an event with a parser. Returns the part of it that does not go out as it is.
    fn parse(&mut self, event: &[u8]) -> Option<Edit> {
        let said = read_event(self.format, event);
        let is_behind = self.end.is_some();
        if !is_behind || self.hides_usage {
            self.note_usage(said.usage, said.class);
        }
        let cut = match said.class {
            _ if !self.hides_usage => None,
            Class::Usage => Some(0..event.len()),
            _ if is_behind => None,
            _ => null_usage(event),
        };
        let redacted = self.without_key_in(event, &said, cut.clone());
        if !is_behind {
            self.text += said.text;
            self.note(said.class, event);
            // The constant parts of a shape are not looked at again: they must not hold the key.
            let is_usual = said.class == Class::Content && said.usage.is_none() && said.is_json;
            if is_usual && redacted.is_none() {
                self.shape.learn(self.format, event, said.text, cut.clone());
            }
        }
        redacted.or_else(|| cut.map(Edit::cut))
    }

    /// Returns an event without the key and without `cut`; `None` if the event is no error, or has no key in it.
    fn without_key_in(&mut self, event: &[u8], said: &Said, cut: Option<Range<usize>>) -> Option<Edit> {
        let redactor = self.redactor.as_mut()?;
        // An error may also be text alone, or stand within a choice.
        let may_be_error = self.end.is_some()
            || !said.is_json
            || matches!(said.class, Class::Error(_))
            || mentions_error(event);
        if !may_be_error || !redactor.is_in(event) {
            return None;
        }
        let cut = cut.unwrap_or_default();
        let parts = [&event[..cut.start], &event[cut.end..]].map(|part| redactor.push(part));
        let with = [&parts[0][..], &parts[1], &redactor.flush()].concat().into();
        Some(Edit { at: 0..event.len(), with })
    }

    fn note(&mut self, class: Class, event: &[u8]) {
        self.has_events |= class != Class::Prelude || has_data(event);
        match class {
            Class::Prelude | Class::Usage => {}
            Class::Content => self.has_content = true,
            Class::Finish => (self.has_content, self.is_finished) = (true, true),
            Class::Terminal => {
                self.end = Some(StreamEnd::Complete);
                // The terminal event of `/v1/responses` has the whole response in it.
                self.has_content |= self.format == StreamFormat::Responses;
            }
            Class::Error(status) => {
                self.end = Some(StreamEnd::Error);
                if !self.has_content {
                    self.early_error = Some(EarlyError { status, body: error_body(self.format, event) });
                }
            }
        }
    }
}

fn joined(first: Bytes, second: Bytes) -> Bytes {
    match (first.is_empty(), second.is_empty()) {
        (true, _) => second,
        (_, true) => first,
        _ => [first, second].concat().into(),
    }
}

/// Whether an event has data, so that it is more than a comment.
fn has_data(event: &[u8]) -> bool {
    event.split(|b| is_line_end(*b)).any(|line| line.starts_with(b"data"))
}

/// Whether a body that begins with this is an event stream, whatever its content type says.
pub(crate) fn is_event_stream(beginning: &[u8]) -> bool {
    let text = beginning.strip_prefix(BOM).unwrap_or(beginning);
    [&b"data:"[..], b"event:", b"id:", b"retry:", b":"].iter().any(|field| text.starts_with(field))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_in_no_error_of_a_stream_whatever_the_chunking() {
        use StreamFormat::{Done, Messages, Plain, Responses};
        const KEY: &str = "sk-CANARY/0123456789";
        const CHUNK: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"sk-CANARY\"}}]}\n\n";
        let long = "x".repeat(MAX_HELD);
        let rows = [
            (Done, r#"data: {"error":{"message":"bad KEY","code":401}}"#.to_owned(), "data: [DONE]\n\n"),
            (Done, r#"data: {"error":"KEYKEY","choices":[{"delta":{"content":"x"}}]}"#.into(), ""),
            (Done, r#"data: {"error":"bad","usage":null}"#.into(), "data: {\"error\":\"KEY\"}\n\ndata: KEY"),
            (Done, r#"data: {"choices":[{"error":{"message":"KEY"},"finish_reason":"error"}]}"#.into(), ""),
            (
                Done,
                r#"data: {"x":{"error":"KEY"}}"#.into(),
                "data: {\"x\":{\"error\":\"KEY\"}}\n\ndata: {\"x\":{\"error\":\"KEY\"}}\n\n",
            ),
            (Done, "event: error\r\ndata: bad KEY\r\nid: KEY\r".into(), ""),
            (Done, "data: bad KEY".into(), ": KEY\n\n"),
            (Done, "data: [DONE]".into(), "data: {\"error\":{\"message\":\"KEY\"}}\n\n"),
            (Done, format!("data: {{\"x\":\"{long}\",\"error\":\"bad KEY\"}}"), "data: {\"error\":\"KEY\"}"),
            (
                Messages,
                "event: error\ndata: {\"type\":\"error\",\"error\":{\"message\":\"bad KEY\"}}".into(),
                "event: error\ndata: KEY\n\n",
            ),
            (
                Messages,
                "event: message_stop\ndata: {\"type\":\"message_stop\"}".into(),
                "data: {\"type\":\"error\",\"error\":{\"message\":\"KEY\"}}\n\n",
            ),
            (Messages, format!("event: error\ndata: {{\"x\":\"{long}\",\"error\":\"KEY\"}}"), ""),
            (Plain, r#"data: {"error":"bad KEY"}"#.into(), ""),
            (Responses, r#"data: {"type":"error","message":"bad KEY"}"#.into(), ""),
            (
                Responses,
                "event: response.failed\ndata: {\"response\":{\"error\":{\"message\":\"KEY\"}}}".into(),
                "data: {\"error\":{\"message\":\"KEY\"}}\n\n",
            ),
            (Responses, format!("event: response.failed\ndata: {{\"x\":\"{long}\",\"error\":\"KEY\"}}"), ""),
        ];
        for (format, error, rest) in rows {
            for key in [KEY, "sk-CANARY\\/01234567\\u00389"] {
                let error = format!("{error}\n\n{rest}").replace("KEY", key);
                let text = format!("{CHUNK}{CHUNK}{error}");
                let want = format!("{CHUNK}{CHUNK}{}", error.replace(key, "***"));
                let sizes: &[usize] =
                    if text.len() < 1000 { &[1, 2, 3, 7, 50, 1000] } else { &[999, MAX_HELD, 100_000] };
                for (size, hides) in sizes.iter().flat_map(|size| [(*size, false), (*size, true)]) {
                    let mut stream = EventStream::new(format, hides).without_key(Some(KEY.into()));
                    let mut out = Vec::new();
                    for piece in text.as_bytes().chunks(size) {
                        out.extend_from_slice(&stream.push(Bytes::copy_from_slice(piece)));
                    }
                    out.extend_from_slice(&stream.finish());
                    let want = if hides { want.replace(",\"usage\":null", "") } else { want.clone() };
                    assert!(out == want.as_bytes(), "{size} {hides} {}", String::from_utf8_lossy(&out));
                    assert_eq!(stream.held(), 0);
                }
            }
        }
    }

    /// What a stream says, and what went out before its end.
    fn run(format: StreamFormat, pieces: &[&str]) -> (EventStream, String) {
        let mut stream = EventStream::new(format, false);
        let mut out = Vec::new();
        for piece in pieces {
            out.extend_from_slice(&stream.push(Bytes::copy_from_slice(piece.as_bytes())));
        }
        (stream, String::from_utf8(out).unwrap())
    }

    const ROLE: &str =
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"},\"finish_reason\":null}]}\n\n";
    const TEXT: &str =
        "data: {\"choices\":[{\"delta\":{\"content\":\"an error\"},\"finish_reason\":null}]}\n\n";
    const STOP: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\": \"stop\"}]}\n\n";
    const ERROR: &str = "data: {\"error\":{\"code\":503}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    #[test]
    fn tells_what_a_stream_says() {
        use StreamEnd::{Complete, Error};
        for (pieces, has_content, end, is_whole) in [
            (&[][..], false, None, false),
            (&[ROLE], false, None, false),
            (&[ROLE, TEXT], true, None, false),
            (&[ROLE, TEXT, STOP], true, None, true),
            (&[TEXT, DONE], true, Some(Complete), true),
            (&[DONE], false, Some(Complete), true),
            (&[TEXT, DONE, ERROR], true, Some(Complete), true),
            (&[ROLE, ERROR], false, Some(Error), false),
            (&[TEXT, ERROR, DONE], true, Some(Error), false),
            (&[TEXT, "event: error\ndata: x\n\n"], true, Some(Error), false),
            (&[TEXT, "data: {}\r\rdata: [DONE]\n\n"], true, Some(Complete), true),
            (&["\u{FEFF}data: [DONE]\n\n"], false, Some(Complete), true),
            (&["\n\r\n", TEXT, "data: [DONE]\r\r"], true, Some(Complete), true),
        ] {
            let (stream, out) = run(StreamFormat::Done, pieces);
            assert_eq!(
                (stream.has_content(), stream.end(), stream.is_whole()),
                (has_content, end, is_whole),
                "{pieces:?}"
            );
            assert_eq!(out, pieces.concat());
        }
        let (mut stream, _) = run(StreamFormat::Done, &[ROLE, ERROR]);
        let error = stream.take_early_error().unwrap();
        assert_eq!((error.status, &error.body[..]), (503, &b"{\"error\":{\"code\":503}}"[..]));
        assert_eq!(run(StreamFormat::Done, &[TEXT, ERROR]).0.take_early_error(), None);
    }

    const START: &str = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\",\"type\":\"message\",\"role\":\"assistant\",\"content\":[],\"stop_reason\":null,\"usage\":{\"input_tokens\":25,\"cache_creation_input_tokens\":100,\"cache_read_input_tokens\":300,\"output_tokens\":1}}}\n\n";
    const MESSAGE_STOP: &str = "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";

    fn text_delta(text: &str) -> String {
        format!(
            "event: content_block_delta\ndata: {{\"type\":\"content_block_delta\",\"index\":0,\"delta\":{{\"type\":\"text_delta\",\"text\":\"{text}\"}}}}\n\n"
        )
    }

    fn message_delta(reason: &str, usage: &str) -> String {
        format!(
            "event: message_delta\ndata: {{\"type\":\"message_delta\",\"delta\":{{\"stop_reason\":{reason}}},\"usage\":{usage}}}\n\n"
        )
    }

    #[test]
    fn a_message_tells_its_token_counts_in_parts_and_its_end_in_an_event() {
        use StreamEnd::{Complete, Error};
        let block = "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n";
        let error = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"m\"}}\n\n";
        let usage =
            |input, cached, cache_write, output| Usage { input, cached, cache_write, output, reasoning: 0 };
        let texts: String = ["Hel", "lo", " \\u00e9\\\"", "!"].iter().map(|text| text_delta(text)).collect();
        let last = message_delta("\"end_turn\"", "{\"output_tokens\":7}");
        let all = message_delta(
            "\"end_turn\"",
            "{\"input_tokens\":30,\"cache_read_input_tokens\":null,\"output_tokens\":9}",
        );
        let early = message_delta("null", "{\"output_tokens\":3}");
        for (parts, has_content, end, told, begun) in [
            (vec![START, block], false, None, None, Some(usage(425, 300, 100, 1))),
            (vec![START, block, &texts], true, None, None, Some(usage(425, 300, 100, 1))),
            (vec![START, &texts, &early], true, None, None, Some(usage(425, 300, 100, 3))),
            (vec![START, &texts, &early, &last], true, None, Some(usage(425, 300, 100, 7)), None),
            (
                vec![START, &texts, &all, MESSAGE_STOP],
                true,
                Some(Complete),
                Some(usage(430, 300, 100, 9)),
                None,
            ),
            (vec![START, &last, MESSAGE_STOP], true, Some(Complete), Some(usage(425, 300, 100, 7)), None),
            (vec![START, MESSAGE_STOP], false, Some(Complete), None, Some(usage(425, 300, 100, 1))),
            (vec![START, &texts, error], true, Some(Error), None, Some(usage(425, 300, 100, 1))),
            (vec![&texts, &last, MESSAGE_STOP], true, Some(Complete), Some(usage(0, 0, 0, 7)), None),
        ] {
            let text = parts.concat();
            for size in [1, 2, 7, 64, 1000, text.len()] {
                let pieces: Vec<&str> =
                    text.as_bytes().chunks(size).map(|piece| std::str::from_utf8(piece).unwrap()).collect();
                let (stream, out) = run(StreamFormat::Messages, &pieces);
                assert_eq!(out, text);
                let said = (stream.has_content(), stream.end(), stream.usage());
                assert_eq!(said, (has_content, end, told), "{text} in pieces of {size}");
                assert_eq!(stream.usage_so_far(), told.or(begun));
                assert_eq!(
                    stream.is_whole(),
                    end == Some(Complete),
                    "the message itself says that it is over"
                );
                let length = if text.contains("Hel") { "Hello \u{e9}\"!".len() as u64 } else { 0 };
                assert_eq!(stream.text(), length, "{text}");
            }
        }
    }

    #[test]
    fn a_message_event_that_is_too_long_keeps_its_class_its_counts_and_its_text() {
        let long = "y".repeat(2 * MAX_HELD);
        let start = START.replace("msg_1", &long);
        let (stream, _) = run(StreamFormat::Messages, &[&start[..MAX_HELD + 9], &start[MAX_HELD + 9..]]);
        assert_eq!((stream.has_content(), stream.usage_so_far().unwrap().input), (false, 425));
        let delta = text_delta(&long);
        let (stream, _) = run(StreamFormat::Messages, &[&delta[..MAX_HELD + 9], &delta[MAX_HELD + 9..]]);
        assert!(stream.has_content() && stream.text() >= long.len() as u64);
        let result = "data: {\"type\":\"content_block_start\",\"content_block\":{\"type\":\"web_search_tool_result\",\"x\":\"";
        let (stream, _) = run(StreamFormat::Messages, &[result, &long, "\"}}\n\n"]);
        assert_eq!((stream.has_content(), stream.text()), (true, 0));
    }

    #[test]
    fn an_unfinished_event_is_held_back_until_the_end() {
        let (mut stream, out) = run(StreamFormat::Done, &[TEXT, "data: [DO", "NE]", "\n"]);
        assert_eq!((&*out, stream.held(), stream.end()), (TEXT, 13, None));
        assert_eq!(
            (stream.finish(), stream.end()),
            (Bytes::from("data: [DONE]\n"), Some(StreamEnd::Complete))
        );
    }

    #[test]
    fn an_event_that_is_too_long_goes_out_in_pieces_and_keeps_its_class() {
        for (name, end) in [
            ("event: response.completed\ndata: {", Some(StreamEnd::Complete)),
            ("data: {\"type\":\"response.completed\",", Some(StreamEnd::Complete)),
            ("data: {\"type\":\"response.output_item.done\",", None),
        ] {
            let long = format!("{name}\"x\":\"{}\"}}", "y".repeat(3 * MAX_HELD));
            let (head, tail) = long.split_at(2 * MAX_HELD);
            let (mut stream, out) = run(StreamFormat::Responses, &[head, tail]);
            assert_eq!((out.len(), stream.end(), stream.is_between_events()), (long.len(), None, false));
            assert_eq!(stream.push(Bytes::from_static(b"\n")), "\n");
            assert_eq!(stream.push(Bytes::from_static(b"\n: x")), "\n");
            assert_eq!((stream.end(), stream.has_content(), stream.held()), (end, true, 3), "{name}");
            assert!(stream.partial.capacity() < 100, "the long event is not kept");
        }
    }

    /// A stream of an answer in chunks of random shapes, and the same stream as a provider sends it that was asked for the
    /// token counts.
    fn random_streams(rng: &mut fastrand::Rng) -> (String, String) {
        let (mut plain, mut asked) = (String::new(), String::new());
        let end = ["\n\n", "\r\n\r\n", "\r\r"][rng.usize(..3)];
        let (space, place) = (["", " "][rng.usize(..2)], rng.usize(..3));
        let varies = [rng.bool(), rng.bool()];
        for i in 0..rng.usize(..30) {
            let text: String = (0..rng.usize(..8))
                .map(|_| ["a", "\\\"", "é", "\\n", "{", "usage", "\\\\"][rng.usize(..7)])
                .collect();
            let delta = match rng.usize(..12) {
                0 => "{}".to_owned(),
                1 => format!(
                    "{{\"tool_calls\":[{{\"index\":{},\"function\":{{\"arguments\":\"{text}\"}}}}]}}",
                    rng.u8(..3)
                ),
                _ => format!("{{\"content\":\"{text}\"}}"),
            };
            let id = if varies[0] { i } else { 0 };
            let more = if varies[1] {
                format!(",\"obfuscation\":\"{}\"", "x".repeat(rng.usize(..9)))
            } else {
                String::new()
            };
            let finish = if rng.u8(..20) == 0 { "\"stop\"" } else { "null" };
            let parts = [
                format!("\"id\":\"c{id}\",\"created\":{}", 1000 + i),
                format!("\"choices\":{space}[{{\"delta\":{delta},\"finish_reason\":{finish}}}]"),
                format!("\"model\":\"m\"{more}"),
            ];
            plain += &format!("data: {{{}}}{end}", parts.join(","));
            let null = format!("\"usage\":{space}null");
            let mut asked_parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            asked_parts.insert(place, &null);
            asked += &format!("data: {{{}}}{end}", asked_parts.join(","));
        }
        asked += &format!(
            "data: {{\"id\":\"c\",\"choices\":[],\"usage\":{{\"prompt_tokens\":3,\"completion_tokens\":4}}}}{end}"
        );
        for text in [&mut plain, &mut asked] {
            *text += &format!("data: [DONE]{end}");
        }
        (plain, asked)
    }

    fn pieces(rng: &mut fastrand::Rng, text: &str) -> Vec<Bytes> {
        let (mut rest, mut pieces) = (text.as_bytes(), Vec::new());
        let most = [1, 20, 300, 5000][rng.usize(..4)];
        while !rest.is_empty() {
            let (piece, more) = rest.split_at(rng.usize(1..=most).min(rest.len()));
            pieces.push(Bytes::copy_from_slice(piece));
            rest = more;
        }
        pieces
    }

    #[test]
    fn the_client_gets_the_same_bytes_whether_or_not_zap_asks_for_the_token_counts() {
        let mut rng = fastrand::Rng::with_seed(17);
        for round in 0..10_000 {
            let (plain, asked) = random_streams(&mut rng);
            let said = |text: &str, hides: bool, rng: &mut fastrand::Rng| {
                let mut stream = EventStream::new(StreamFormat::Done, hides);
                let mut out: Vec<u8> =
                    pieces(rng, text).into_iter().flat_map(|piece| stream.push(piece)).collect();
                out.extend_from_slice(&stream.finish());
                let verdict = (stream.has_content(), stream.end(), stream.is_whole(), stream.text());
                (String::from_utf8(out).unwrap(), verdict, stream.usage())
            };
            let (out, verdict, usage) = said(&asked, true, &mut rng);
            assert_eq!(out, plain, "round {round}: {asked}");
            assert_eq!(usage.map(|usage| (usage.input, usage.output)), Some((3, 4)));
            assert_eq!(said(&plain, false, &mut rng), (plain.clone(), verdict, None), "round {round}");
            assert_eq!(said(&asked, false, &mut rng), (asked, verdict, usage), "round {round}");
        }
    }

    #[test]
    fn an_event_of_a_known_shape_counts_its_text_and_any_other_is_parsed() {
        let event = |text: &str| {
            format!("data: {{\"n\":1,\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
        };
        let (stream, _) =
            run(StreamFormat::Done, &[&event("one"), &event("three"), &event("a\\\"b"), &event("")]);
        assert_eq!(stream.text(), 3 + 5 + 3);
        let mut shape = stream.shape;
        let known = event("four").into_bytes();
        assert_eq!(shape.find(&known).map(|found| (found.length, found.text)), Some((known.len(), 4)));
        for other in [
            event("x").replace("\"n\":1", "\"n\":2"),
            event("x").replace("}]", ",\"finish_reason\":\"stop\"}]"),
            event("a\nb"),
            event("x\",\"y\":\""),
            event("x").trim_end().to_owned(),
            STOP.to_owned(),
        ] {
            assert_eq!(shape.find(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn an_event_that_is_too_long_to_be_held_keeps_its_reason_and_its_token_counts() {
        let text = "y".repeat(2 * MAX_HELD);
        let long = format!(
            "data: {{\"choices\":[{{\"message\":{{\"content\":\"{text}\"}},\"finish_reason\":\"stop\"}}]}}\n\n"
        );
        for cut in 0..40 {
            let (head, tail) = long.split_at(long.len() - cut);
            let (mut stream, out) = run(StreamFormat::Done, &[head, tail]);
            assert_eq!((out.len() + stream.finish().len(), stream.is_whole()), (long.len(), true), "{cut}");
        }
        let (stream, _) = run(StreamFormat::Done, &[&long.replace("\"stop\"", "null")]);
        assert!(!stream.is_whole());
        let told = "\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":9}";
        let chat = long.replace("]}\n\n", &format!("],{told}}}\n\n"));
        let image = format!("event: x\ndata: {{\"b64_json\":\"{text}\",{told}}}\n\n");
        let response = format!(
            "event: response.completed\ndata: {{\"type\":\"response.completed\",\"response\":{{\"instructions\":\"{text}\",{told},\"x\":{{}}}},\"y\":1}}\n\n"
        );
        for (format, event) in
            [(StreamFormat::Done, chat), (StreamFormat::Plain, image), (StreamFormat::Responses, response)]
        {
            for cut in [1, 10, 60, 100, MAX_HELD + 10] {
                let (head, tail) = event.split_at(event.len() - cut);
                let usage = run(format, &[head, tail]).0.usage();
                assert_eq!(usage.map(|usage| (usage.input, usage.output)), Some((7, 9)), "{format:?} {cut}");
            }
        }
    }

    #[test]
    fn a_byte_at_a_time_gives_the_same_verdict() {
        for text in
            [[ROLE, TEXT, STOP, DONE].concat(), [ROLE, ERROR].concat(), ["\r\n", TEXT, ": x\r\r"].concat()]
        {
            let bytes: Vec<&str> = (0..text.len()).map(|i| &text[i..=i]).collect();
            let ((one, out), (whole, _)) =
                (run(StreamFormat::Done, &bytes), run(StreamFormat::Done, &[&text]));
            assert_eq!(out, text);
            assert_eq!(
                (one.has_content, one.is_finished, one.end, &one.early_error),
                (whole.has_content, whole.is_finished, whole.end, &whole.early_error)
            );
        }
    }
}
