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

use bytes::Bytes;

use crate::protocol::answer_notes::AnswerNotes;
use crate::protocol::edits::{Edit, Edits, edited};
use crate::protocol::endpoint::StreamFormat;
use crate::protocol::event_class::{Class, Said, error_body, event_json, mentions_error, read_event};
use crate::protocol::event_lines::{LOOK_BACK, end_of_event, end_of_last_event, is_line_end};
use crate::protocol::event_shape::{Shape, null_usage};
use crate::protocol::oversized_event::OversizedEvent;
use crate::protocol::redact::Redactor;
use crate::protocol::usage::{Usage, UsageParts};

/// Longest unfinished event that is held back, in bytes. A longer one goes out in pieces.
pub(crate) const MAX_HELD: usize = 64 * 1024;

/// U+FEFF, which may begin a stream.
const BOM: &[u8] = b"\xEF\xBB\xBF";

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
    /// What the answer says of itself; `None`: the request is not traced.
    notes: Option<Box<AnswerNotes>>,
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
            notes: None,
        }
    }

    /// Takes `key` out of error events.
    pub(crate) fn without_key(self, key: Option<Arc<str>>) -> Self {
        EventStream { redactor: key.and_then(Redactor::new), ..self }
    }

    /// Notes what the answer says of itself, if `is_wanted`.
    pub(crate) fn noting(self, is_wanted: bool) -> Self {
        EventStream { notes: is_wanted.then(Box::default), ..self }
    }

    /// What the answer has said of itself so far.
    pub(crate) fn notes(&self) -> Option<&AnswerNotes> {
        self.notes.as_deref()
    }

    /// Reads the next chunk. Returns what may go out: the bytes up to the end of the last whole event, without the
    /// token counts that Zap has asked for, and without the key in an error.
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

    /// The token counts that have come so far. Unless they are [those of the answer](Self::usage), only the input
    /// counts.
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

    /// The unfinished event that is held back.
    pub(crate) fn unfinished(&self) -> &[u8] {
        &self.partial
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
        edited(events, edits)
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
        if let Some(notes) = &mut self.notes
            && let Some(json) = event_json(event)
        {
            notes.read_event(self.format, &json);
        }
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
mod tests;
