//! Reads the top-level `usage` of a JSON answer as its bytes pass, in any chunking and without keeping the body.
//!
//! Most of an answer stands before its `usage`. That part is only searched for the key: inside a string the quotes of
//! the key would be escaped, so the key without a backslash before it is a whole string, and a colon after it makes it
//! a key. From the first key on, strings and braces are followed. The depth of a key is known at the end: a valid body
//! ends outside of all objects. Brackets do not matter, since every member of a body that begins with a brace is in an
//! object.
//!
//! The answer is that of serde_json for every valid body that is an object, with these exceptions: a key with escapes
//! (`"us\u0061ge"`) is not found, and a value longer than [`MAX_VALUE`] does not count. The last of several top-level
//! `usage` members counts; if it is `null` there is no usage. A body that is cut has no usage, unless it is cut
//! directly behind an object that has a `usage` of its own: then that may be returned. A body that is no JSON, or no
//! object, may have any usage or none.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use memchr::{memchr2, memchr3};
use serde_json::Value;

use crate::protocol::plain_usage::{plain_parts, skip_space};
use crate::protocol::usage::{Usage, UsageParts};

/// Longest `usage` that is read, in bytes.
pub(crate) const MAX_VALUE: usize = 16 * 1024;

const KEY: &[u8] = b"\"usage\"";

/// [`KEY`] without its first quote.
const KEY_REST: &[u8] = b"usage\"";

/// The ends of a body that have its `usage`: a short one with the three counts of most providers, and a longer one with
/// details. In bytes.
const USUAL_TAILS: [usize; 2] = [240, 640];

static FIND_KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(KEY));

impl Usage {
    /// Reads the top-level `usage` of a JSON body, as [`BodyUsage`] does. The body must be whole: of one that is cut,
    /// the usage of an object within it may be returned.
    pub(crate) fn of_body(body: &[u8]) -> Option<Usage> {
        usual(body).unwrap_or_else(|| {
            let mut reader = BodyUsage::new();
            reader.push(body);
            reader.finish()
        })
    }
}

/// Reads a whole body in which the only brace behind a `usage` ends the body, so that this is the last `usage` of the
/// top level. `None` if the body is another one, or its usage is not written as providers usually do.
fn usual(body: &[u8]) -> Option<Option<Usage>> {
    if body.first() != Some(&b'{') {
        return None;
    }
    // A search of the whole body costs more than all else here.
    let in_tail = |length: usize| {
        let tail = body.len().saturating_sub(length);
        FIND_KEY.find(&body[tail..]).map(|found| tail + found)
    };
    let found = USUAL_TAILS.into_iter().find_map(in_tail).or_else(|| FIND_KEY.find(body));
    let Some(found) = found else { return Some(None) };
    let colon = skip_space(body, found + KEY.len());
    if body[found - 1] == b'\\' || body.get(colon) != Some(&b':') {
        return None;
    }
    let rest = &body[skip_space(body, colon + 1)..];
    let (parts, length) = plain_parts(&rest[..rest.len().min(MAX_VALUE)])?;
    let rest = rest[length..].trim_ascii_end();
    let is_last =
        rest == b"}" || memchr2(b'{', b'}', rest)? + 1 == rest.len() && FIND_KEY.find(rest).is_none();
    is_last.then(|| parts.usage())
}

/// Reads the `usage` of one body. [`push`](BodyUsage::push) the chunks in order, then [`finish`](BodyUsage::finish).
#[derive(Debug)]
pub(crate) struct BodyUsage {
    /// The number of objects that the usage is in.
    objects: i64,
    state: State,
    /// Whether a candidate was found: a key that may be at the top level.
    has_candidate: bool,
    /// The number of open objects, less that at the candidate.
    depth: i64,
    /// The usage of the candidate.
    usage: Option<UsageParts>,
    is_capturing: bool,
    /// The part of the candidate's value in earlier chunks; one byte more than [`MAX_VALUE`] if it is too long.
    value: Vec<u8>,
    /// The last byte of the last chunk.
    last: u8,
}

/// The position in the body. Before the first candidate it is only known near what may be a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first brace.
    Start,
    /// Outside of strings or, before the first candidate, anywhere.
    Outside,
    /// In a string whose first bytes are this many bytes of [`KEY_REST`].
    Key(usize),
    /// In any other string.
    Text,
    /// After a backslash in a string.
    Escape,
    /// After a string that spells the key.
    AfterKey,
    /// After the colon of a candidate.
    Value,
    /// In a body that is no object.
    Ignored,
}

impl BodyUsage {
    /// Starts a body.
    pub(crate) fn new() -> Self {
        Self::at_depth(1)
    }

    /// Starts a body whose `usage` is in so many objects: 1 is the top level, 2 a member of it. No object above may
    /// have a `usage`.
    pub(crate) fn at_depth(objects: i64) -> Self {
        BodyUsage {
            objects,
            state: State::Start,
            has_candidate: false,
            depth: 0,
            usage: None,
            is_capturing: false,
            value: Vec::new(),
            last: b' ',
        }
    }

    /// Reads the next chunk.
    pub(crate) fn push(&mut self, data: &[u8]) {
        let mut at = 0;
        // Where the value that is being captured begins in this chunk.
        let mut value_start = 0;
        while at < data.len() {
            at = match self.state {
                State::Start => self.start(data, at),
                State::Outside if self.has_candidate => self.outside(data, at, value_start),
                State::Outside => self.search(data, at),
                State::Key(matched) => self.key(data[at], at, matched),
                State::Text => self.text(data, at),
                State::Escape => {
                    self.state = State::Text;
                    at + 1
                }
                State::AfterKey => self.after_key(data[at], at),
                State::Value => {
                    value_start = skip_space(data, at);
                    self.value(data, value_start)
                }
                State::Ignored => return,
            };
        }
        if self.is_capturing {
            self.capture(&data[value_start..]);
        }
        self.last = data.last().copied().unwrap_or(self.last);
    }

    /// Ends the body. Returns the usage at the depth that was asked for.
    pub(crate) fn finish(self) -> Option<Usage> {
        self.finish_parts()?.usage()
    }

    /// Ends the body. Returns the counts at the depth that was asked for, if they are a usage.
    pub(crate) fn finish_parts(self) -> Option<UsageParts> {
        // Only the objects that have the candidate were closed after it.
        let is_at_depth = self.has_candidate && self.state == State::Outside && self.depth == -self.objects;
        self.usage.filter(|_| is_at_depth)
    }

    /// Looks for the brace that begins the body.
    fn start(&mut self, data: &[u8], at: usize) -> usize {
        // White space, or a byte of U+FEFF.
        let skipped = |b: &u8| matches!(b, b' ' | b'\t' | b'\r' | b'\n' | 0xEF | 0xBB | 0xBF);
        let found = data[at..].iter().position(|b| !skipped(b));
        match found.map(|found| data[at + found]) {
            Some(b'{') => self.state = State::Outside,
            Some(_) => self.state = State::Ignored,
            None => {}
        }
        found.map_or(data.len(), |found| at + found + 1)
    }

    /// Looks for the key before the first candidate.
    fn search(&mut self, data: &[u8], at: usize) -> usize {
        let before = |at: usize| at.checked_sub(1).map_or(self.last, |before| data[before]);
        if let Some(found) = FIND_KEY.find(&data[at..]) {
            let found = at + found;
            if before(found) == b'\\' {
                return found + 1;
            }
            self.state = State::AfterKey;
            return found + KEY.len();
        }
        // The end of the chunk may be the beginning of a key.
        let tail = data.len().saturating_sub(KEY.len() - 1).max(at);
        let start = (tail..data.len())
            .find(|at| data[*at] == b'"' && KEY.starts_with(&data[*at..]) && before(*at) != b'\\');
        if let Some(start) = start {
            self.state = State::Key(data.len() - start - 1);
        }
        data.len()
    }

    /// Looks for the next brace or string after the first candidate.
    fn outside(&mut self, data: &[u8], mut at: usize, value_start: usize) -> usize {
        if self.depth <= -self.objects && self.usage.is_some() {
            at = skip_space(data, at);
            if at == data.len() {
                return at;
            }
            // The object that has the candidate is not the last to be closed.
            self.usage = None;
        }
        let Some(found) = memchr3(b'"', b'{', b'}', &data[at..]) else { return data.len() };
        at += found;
        match data[at] {
            b'"' => self.state = State::Key(0),
            b'{' => self.depth += 1,
            _ => {
                self.depth -= 1;
                if self.is_capturing && self.depth == 0 {
                    self.end_value(&data[value_start..=at]);
                }
            }
        }
        at + 1
    }

    /// Compares a byte of a string with the key.
    fn key(&mut self, b: u8, at: usize, matched: usize) -> usize {
        if KEY_REST.get(matched) == Some(&b) {
            self.state = match matched + 1 {
                n if n == KEY_REST.len() => State::AfterKey,
                n => State::Key(n),
            };
            return at + 1;
        }
        // Read this byte once more.
        self.state = if self.has_candidate { State::Text } else { State::Outside };
        at
    }

    /// Looks for the end of a string.
    fn text(&mut self, data: &[u8], at: usize) -> usize {
        let Some(found) = memchr2(b'"', b'\\', &data[at..]) else { return data.len() };
        self.state = if data[at + found] == b'"' { State::Outside } else { State::Escape };
        at + found + 1
    }

    /// Looks for the colon that makes a string a key.
    fn after_key(&mut self, b: u8, at: usize) -> usize {
        match b {
            b' ' | b'\t' | b'\r' | b'\n' => at + 1,
            b':' => {
                // A key within the candidate's value, or within another object beside it, is not at the top level.
                let is_candidate = !self.has_candidate || self.depth <= 0;
                self.state = if is_candidate { State::Value } else { State::Outside };
                at + 1
            }
            _ => {
                self.state = State::Outside;
                at
            }
        }
    }

    /// Begins the value of a candidate, which replaces the candidate before it.
    fn value(&mut self, data: &[u8], at: usize) -> usize {
        let Some(b) = data.get(at) else { return at };
        self.state = State::Outside;
        self.has_candidate = true;
        self.depth = 0;
        self.usage = None;
        if *b != b'{' {
            return at;
        }
        let end = data.len().min(at + MAX_VALUE);
        if let Some((parts, length)) = plain_parts(&data[at..end]) {
            self.usage = parts.if_usage();
            return at + length;
        }
        self.is_capturing = true;
        at
    }

    /// Ends the value that is captured. `rest` is its part in this chunk.
    fn end_value(&mut self, rest: &[u8]) {
        self.capture(rest);
        self.is_capturing = false;
        if self.value.len() <= MAX_VALUE {
            let value: Option<Value> = serde_json::from_slice(&self.value).ok();
            self.usage = value.and_then(|value| UsageParts::of_usage(&value));
        }
        self.value.clear();
    }

    fn capture(&mut self, part: &[u8]) {
        let room = MAX_VALUE + 1 - self.value.len();
        self.value.extend_from_slice(&part[..part.len().min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The usage of `body`, which must be the same for any chunking.
    fn of(body: &str) -> Option<Usage> {
        let mut reader = BodyUsage::new();
        reader.push(body.as_bytes());
        let whole = reader.finish();
        if serde_json::from_str::<Value>(body).is_ok() {
            assert_eq!(Usage::of_body(body.as_bytes()), whole, "{body}");
        }
        for length in 1..body.len().min(40) {
            let mut reader = BodyUsage::new();
            body.as_bytes().chunks(length).for_each(|chunk| reader.push(chunk));
            assert_eq!(reader.finish(), whole, "{body} in chunks of {length}");
        }
        for cut in 0..body.len().min(400) {
            let mut reader = BodyUsage::new();
            [&body.as_bytes()[..cut], b"", &body.as_bytes()[cut..]].iter().for_each(|part| reader.push(part));
            assert_eq!(reader.finish(), whole, "{body} cut at {cut}");
        }
        whole
    }

    fn input(input: u64) -> Option<Usage> {
        Some(Usage { input, ..Usage::default() })
    }

    #[test]
    fn only_the_last_usage_of_the_top_level_counts() {
        for (body, want) in [
            (r#"{"usage":{"prompt_tokens":1}}"#, Some(1)),
            (" \r\n{\t\"usage\" \n: \r{ \"prompt_tokens\" :\t1 , \"x\" : null } } \n", Some(1)),
            ("\u{FEFF}{\"usage\":{\"prompt_tokens\":1}}", Some(1)),
            (r#"{"a":[1,{"b":{}}],"usage":{"prompt_tokens":1},"c":{"d":["}"]}}"#, Some(1)),
            (r#"{"usage":{"prompt_tokens":1},"usage":{"prompt_tokens":2}}"#, Some(2)),
            (r#"{"usage":{"prompt_tokens":1},"usage":null}"#, None),
            (r#"{"usage":null,"usage":{"prompt_tokens":1}}"#, Some(1)),
            (r#"{"x_groq":{"usage":{"prompt_tokens":2}},"usage":{"prompt_tokens":1}}"#, Some(1)),
            (r#"{"usage":{"prompt_tokens":1},"x_groq":{"usage":{"prompt_tokens":2}}}"#, Some(1)),
            (r#"{"a":[{"usage":{"prompt_tokens":2}},[{"usage":3}]],"usage":{"prompt_tokens":1}}"#, Some(1)),
            (r#"{"x_groq":{"usage":{"prompt_tokens":2}}}"#, None),
            (r#"{"x_groq":{"usage":{"prompt_tokens":2}},"a":1}"#, None),
            (r#"{"a":[{"usage":{"prompt_tokens":2}}]}"#, None),
            (r#"{"usage":{"usage":{"prompt_tokens":2},"prompt_tokens":1}}"#, Some(1)),
            (r#"[{"usage":{"prompt_tokens":2}}]"#, None),
            (r#"{"a":"usage","usage":{"prompt_tokens":1},"b":["usage","usage"]}"#, Some(1)),
            (r#"{"a":"\"usage\":{\"prompt_tokens\":2}","usage":{"prompt_tokens":1}}"#, Some(1)),
            (r#"{"usage":{"prompt_tokens":1},"a":"}\"usage\":{\"prompt_tokens\":2}\\"}"#, Some(1)),
            (r#"{"a":"\\","usage":{"prompt_tokens":1},"usages":{},"usag":{},"":{}}"#, Some(1)),
            (r#"{"usage":"usage"}"#, None),
            (r#"{"usage":["usage",{"prompt_tokens":2}]}"#, None),
            (r#"{"usage":7}"#, None),
            (r#"{"usage":{}}"#, None),
            (r#"{}"#, None),
            ("", None),
        ] {
            assert_eq!(of(body), want.and_then(input), "{body}");
        }
    }

    #[test]
    fn a_usage_in_any_spelling_is_read() {
        for usage in [
            r#"{"prompt_tokens":1,"prompt_tokens":2}"#,
            r#"{"prompt_tokens":1,"prompt_tokens":null,"completion_tokens":3}"#,
            r#"{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":5},"prompt_tokens_details":null}"#,
            r#"{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":5,"a":1},"prompt_tokens_details":{"a":{}}}"#,
            r#"{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":5,"cached_tokens":{}}}"#,
            r#"{"prompt_tokens":9,"prompt_tokens_details":5,"completion_tokens_details":"a"}"#,
            r#"{"prompt_tokens":9,"details":{"cached_tokens":5,"prompt_tokens":3},"cached_tokens":4}"#,
            r#"{"prompt\u005ftokens":9,"a\"":"\\","completion_tokens":3}"#,
            r#"{"a\":1}":2,"prompt_tokens":9}"#,
            r#"{"prompt_tokens":{"prompt_tokens":4},"total_tokens":5,"a":[1,"}",{"b":[]}]}"#,
            r#"{"prompt_tokens":1.0,"completion_tokens":-2,"total_tokens":1e1,"a":0.25,"b":true}"#,
            r#"{"prompt_tokens":18446744073709551615,"completion_tokens":18446744073709551616}"#,
            r#"{"prompt_tokens":-0,"completion_tokens":0,"a":"b}","service_tier":"default"}"#,
        ] {
            let want = Usage::of_json(&serde_json::from_str(usage).unwrap());
            assert_eq!(of(&format!(r#"{{"usage":{usage}}}"#)), want, "{usage}");
        }
    }

    #[test]
    fn a_long_body_is_usually_read_from_its_end() {
        let text = "a".repeat(USUAL_TAILS[1]);
        for (body, is_usual, want) in [
            (format!(r#"{{"a":"{text}","usage":{{"prompt_tokens":1}},"b":["}}"]}}"#), false, Some(1)),
            (format!(r#"{{"a":"{text}","usage":{{"prompt_tokens":1}},"b":["c"]}} "#), true, Some(1)),
            (format!(r#"{{"usage":{{"prompt_tokens":1}},"b":["{text}"]}}"#), true, Some(1)),
            (
                format!(r#"{{"usage":{{"prompt_tokens":1}},"b":"{text}","c":"\"usage\":{{}}"}}"#),
                false,
                Some(1),
            ),
            (format!(r#"{{"usage":{{"prompt_tokens":1}},"b":"{text}","usage":null}}"#), false, None),
            (format!(r#"{{"usage":{{"prompt_tokens":1}},"b":"{text}","c":["usage"]}}"#), false, Some(1)),
            (format!(r#"{{"b":"{text}","c":{{"usage":{{"prompt_tokens":1}}}}}}"#), false, None),
            (format!(r#"{{"b":"{text}"}}"#), true, None),
        ] {
            assert_eq!(of(&body), want.and_then(input), "{body}");
            assert_eq!(usual(body.as_bytes()).is_some(), is_usual, "{body}");
        }
    }

    #[test]
    fn a_value_that_is_too_long_does_not_count() {
        let body = |length: usize| {
            let padding = " ".repeat(length - r#"{"prompt_tokens":1}"#.len());
            format!(r#"{{"usage":{{"prompt_tokens":1{padding}}}}}"#)
        };
        assert_eq!(of(&body(MAX_VALUE)), input(1));
        assert_eq!(of(&body(MAX_VALUE + 1)), None);
        let body = body(3 * MAX_VALUE);
        assert_eq!(of(&body), None);
        let twice = format!(r#"{},"usage":{{"prompt_tokens":2}}}}"#, &body[..body.len() - 1]);
        assert_eq!(of(&twice), input(2));
    }

    #[test]
    fn a_body_that_is_cut_has_no_usage() {
        let body = r#"{"a":"}","usage":{"prompt_tokens":1},"b":{"c":[1,{}],"d":"e\\"},"f":[{}],"g":1}"#;
        for cut in 0..body.len() {
            assert_eq!(of(&body[..cut]), None, "{}", &body[..cut]);
        }
        assert_eq!(of(body), input(1));
        // This is the exception: the body up to here could be whole.
        let nested = r#"{"a":{"usage":{"prompt_tokens":1}},"b":[1]}"#;
        for cut in 0..nested.len() {
            let want = if nested[..cut].ends_with("}}") { input(1) } else { None };
            assert_eq!(of(&nested[..cut]), want, "{}", &nested[..cut]);
        }
    }
}
