//! The shape of a stream's events: what all of them have in common, and where they differ.
//!
//! The events of one answer are nearly equal: the text of the delta differs, sometimes a number or an id, and nothing
//! else. Once two events have shown where they differ, a third of the same shape needs no parser: its other bytes are
//! compared, and what may differ is skipped. Such an event means what the first one meant, because only values differ
//! that the [class](crate::protocol::event_class) of an event behind the first content does not depend on. Parsing each
//! event costs ten times as much.

use std::ops::Range;

use memchr::memmem;
use serde_json::Value;
use smallvec::SmallVec;

use crate::protocol::endpoint::StreamFormat;
use crate::protocol::null_member::{find_null, measure_string};

/// Longest event whose shape is kept, in bytes.
const MAX_EVENT: usize = 4096;

/// Deepest value of an event whose shape is kept.
const MAX_DEPTH: usize = 16;

/// Events in a row of another shape, after which no more shapes are learnt in this stream.
const MAX_MISSES: u8 = 32;

/// The strings and numbers of an event.
type Leaves = SmallVec<[Leaf; 20]>;

/// Whether the value of a member may differ between two events, besides the text.
fn may_vary(key: &[u8]) -> bool {
    matches!(
        key,
        b"content_index"
            | b"created"
            | b"created_at"
            | b"id"
            | b"index"
            | b"item_id"
            | b"obfuscation"
            | b"output_index"
            | b"sequence_number"
            | b"timestamp"
    )
}

/// Whether a member of a `delta` holds text of the model.
fn is_text(key: &[u8]) -> bool {
    matches!(
        key,
        b"arguments"
            | b"content"
            | b"partial_json"
            | b"reasoning"
            | b"reasoning_content"
            | b"refusal"
            | b"text"
            | b"thinking"
    )
}

/// A string or a number in an event.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Leaf {
    /// Where it begins in the event: behind the quote of a string.
    start: u32,
    /// Where it ends, without the quote.
    end: u32,
    is_text: bool,
    is_number: bool,
    may_vary: bool,
}

impl Leaf {
    fn span(&self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

/// The strings and numbers of an event, in their order; empty if the event has not exactly one line of data, or is
/// nested too deeply. The data is valid JSON.
fn leaves(format: StreamFormat, event: &[u8]) -> Leaves {
    let Some(start) = data_start(event).filter(|_| event.len() < u32::MAX as usize) else {
        return Leaves::new();
    };
    let mut walk = Walk { format, event, at: start, path: SmallVec::new(), leaves: Leaves::new() };
    walk.run();
    walk.leaves
}

/// The length of the text of the model in the JSON of an event, in bytes.
pub(crate) fn text_length(format: StreamFormat, json: &Value) -> u64 {
    sum_of_texts(format, json, Level { key: b"", is_object: false, is_in_delta: false })
}

fn sum_of_texts(format: StreamFormat, json: &Value, level: Level<'_>) -> u64 {
    match json {
        Value::String(text) if level.holds_text(format) => text.len() as u64,
        Value::Array(list) => list.iter().map(|value| sum_of_texts(format, value, level)).sum(),
        Value::Object(members) => members
            .iter()
            .map(|(key, value)| sum_of_texts(format, value, Level { key: key.as_bytes(), ..level.below() }))
            .sum(),
        _ => 0,
    }
}

/// Where the data of an event begins; `None` if it has not exactly one line of data.
fn data_start(event: &[u8]) -> Option<usize> {
    let starts_line = |at: usize| at == 0 || matches!(event[at - 1], b'\n' | b'\r');
    let mut starts = memmem::find_iter(event, b"data:").filter(|at| starts_line(*at));
    let start = starts.next()?;
    if starts.next().is_some() { None } else { Some(start + b"data:".len()) }
}

/// One step into a value.
#[derive(Clone, Copy, Debug)]
struct Level<'e> {
    is_object: bool,
    /// The key of the member that is being read; in an array the key of the array.
    key: &'e [u8],
    is_in_delta: bool,
}

impl<'e> Level<'e> {
    /// The level of the values in a value at this level.
    fn below(self) -> Level<'e> {
        Level { is_in_delta: self.is_in_delta || self.key == b"delta", ..self }
    }

    /// Whether a string at this level is text of the model.
    fn holds_text(self, format: StreamFormat) -> bool {
        match format {
            StreamFormat::Done => self.is_in_delta && is_text(self.key) || self.key == b"text",
            StreamFormat::Messages => self.is_in_delta && is_text(self.key),
            StreamFormat::Plain | StreamFormat::Responses => self.key == b"delta",
        }
    }
}

/// A walk over the JSON of an event.
struct Walk<'e> {
    format: StreamFormat,
    event: &'e [u8],
    at: usize,
    path: SmallVec<[Level<'e>; MAX_DEPTH]>,
    leaves: Leaves,
}

impl<'e> Walk<'e> {
    fn run(&mut self) {
        let mut expects_key = false;
        while let Some(b) = self.event.get(self.at) {
            self.at += 1;
            match b {
                b'{' | b'[' => {
                    if self.path.len() == MAX_DEPTH {
                        return self.leaves.clear();
                    }
                    let top = Level { key: b"", is_object: false, is_in_delta: false };
                    let level = self.path.last().map_or(top, |level| level.below());
                    self.path.push(Level { is_object: *b == b'{', ..level });
                    expects_key = *b == b'{';
                }
                b'}' | b']' => {
                    self.path.pop();
                    expects_key = false;
                }
                b',' => expects_key = self.path.last().is_some_and(|level| level.is_object),
                b'"' => {
                    let start = self.at;
                    let Some((length, _)) = measure_string(&self.event[start..]) else {
                        return self.leaves.clear();
                    };
                    self.at = start + length + 1;
                    match self.path.last_mut() {
                        Some(level) if expects_key => level.key = &self.event[start..start + length],
                        _ => self.leaf(start..start + length, false),
                    }
                    expects_key = false;
                }
                b'0'..=b'9' => {
                    let start = self.at - 1;
                    self.at += digits(&self.event[self.at..]);
                    self.leaf(start..self.at, true);
                }
                _ => {}
            }
        }
    }

    fn leaf(&mut self, span: Range<usize>, is_number: bool) {
        let Some(level) = self.path.last() else { return };
        let is_text = !is_number && level.holds_text(self.format);
        let may_vary = is_text || may_vary(level.key);
        let (start, end) = (span.start as u32, span.end as u32);
        self.leaves.push(Leaf { start, end, is_text, is_number, may_vary });
    }
}

/// Where the top-level member `usage` stands in an event whose data is JSON, with its comma, if its value is null;
/// `None` if there is no such member.
pub(crate) fn null_usage(event: &[u8]) -> Option<Range<usize>> {
    Some(find_null(event, data_start(event)?, b"usage")?.member)
}

fn digits(text: &[u8]) -> usize {
    text.iter().take_while(|b| b.is_ascii_digit()).count()
}

/// The length of a leaf at the beginning of `text`, and of the text of the model in it; `None` if there is no such
/// leaf.
fn measure(leaf: &Leaf, text: &[u8]) -> Option<(usize, u64)> {
    if leaf.is_number {
        return Some((digits(text), 0)).filter(|(length, _)| *length > 0);
    }
    let (length, decoded) = measure_string(text)?;
    Some((length, if leaf.is_text { decoded as u64 } else { 0 }))
}

/// An event of a known shape.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Match {
    /// The length of the event, in bytes.
    pub length: usize,
    /// The length of its text, in bytes.
    pub text: u64,
    /// Where the part stands that must not go out.
    pub cut: Option<Range<usize>>,
}

/// The shape of a stream's events.
#[derive(Debug, Default)]
pub(crate) struct Shape {
    /// The last event that was parsed.
    event: Vec<u8>,
    /// The leaves that may differ from event to event.
    holes: SmallVec<[Leaf; 4]>,
    /// The length of the text outside the holes.
    fixed_text: u64,
    /// The part of the event that must not go out. It has no hole in it.
    cut: Option<Range<usize>>,
    misses: u8,
}

impl Shape {
    /// Finds an event of this shape at the beginning of `text`.
    pub(crate) fn find(&mut self, text: &[u8]) -> Option<Match> {
        if self.event.is_empty() {
            return None;
        }
        let (mut at, mut from) = (0, 0);
        let mut found = Match { length: 0, text: self.fixed_text, cut: None };
        for hole in &self.holes {
            let span = hole.span();
            self.follow(text, &mut found, from..span.start, at)?;
            at += span.start - from;
            let (length, of_text) = measure(hole, &text[at..])?;
            found.text += of_text;
            (at, from) = (at + length, span.end);
        }
        self.follow(text, &mut found, from..self.event.len(), at)?;
        found.length = at + self.event.len() - from;
        self.misses = 0;
        Some(found)
    }

    /// Compares a part of the event without a hole with `text` at `at`.
    fn follow(&self, text: &[u8], found: &mut Match, part: Range<usize>, at: usize) -> Option<()> {
        if !text.get(at..)?.starts_with(&self.event[part.clone()]) {
            return None;
        }
        if let Some(cut) = self.cut.as_ref().filter(|cut| part.start <= cut.start && cut.end <= part.end) {
            found.cut = Some(at + cut.start - part.start..at + cut.end - part.start);
        }
        Some(())
    }

    /// Learns from an event that has nothing but content, and JSON for data. `text`: the length of its text. `cut`: the
    /// part of it that must not go out.
    pub(crate) fn learn(&mut self, format: StreamFormat, event: &[u8], text: u64, cut: Option<Range<usize>>) {
        self.misses = self.misses.saturating_add(1);
        if event.len() > MAX_EVENT || !event.ends_with(b"\n") || self.misses > MAX_MISSES {
            self.event = Vec::new();
            return;
        }
        self.holes = self.common_holes(format, event).unwrap_or_default();
        let of_holes =
            self.holes.iter().filter_map(|hole| Some(measure(hole, &event[hole.span().start..])?.1));
        self.fixed_text = text.saturating_sub(of_holes.sum());
        self.event.clear();
        self.event.extend_from_slice(event);
        self.cut = cut;
    }

    /// The leaves of this event that may differ from event to event, as far as it and the last event show it; `None` if
    /// the two have different shapes.
    fn common_holes(&self, format: StreamFormat, event: &[u8]) -> Option<SmallVec<[Leaf; 4]>> {
        if self.event.is_empty() {
            return None;
        }
        let mut holes = SmallVec::new();
        let (mut before, mut from) = (0, 0);
        let mut known = self.holes.iter().peekable();
        for leaf in leaves(format, event) {
            let span = leaf.span();
            let last = self.event.get(before..)?.strip_prefix(&event[from..span.start])?;
            before = self.event.len() - last.len();
            let is_hole = known.next_if(|hole| hole.start as usize == before).is_some();
            let (length, _) = measure(&leaf, last)?;
            let differs = last[..length] != event[span.clone()];
            if differs && !leaf.may_vary {
                return None;
            }
            if differs || is_hole {
                holes.push(leaf);
            }
            (before, from) = (before + length, span.end);
        }
        (self.event[before..] == event[from..]).then_some(holes)
    }
}
