//! Tracks a `/v1/responses` stream, so that Zap can end it with a valid `response.failed` event if it is cut.
//!
//! Every event has a `sequence_number`; the first event, `response.created`, has the response object. Memory is
//! bounded, and the result does not depend on the chunking. Sequence numbers are found by a search for their key. The
//! search is safe: inside a JSON string the quotes of the key would be escaped. The response object is parsed once, as
//! JSON.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde_json::{Value, json};

/// Longest id or model that is kept, in bytes of its JSON spelling.
const MAX_TEXT: usize = 256;

/// Bytes of the stream in which the response object is searched.
const MAX_SEARCH: usize = 1 << 20;

const KEY: &[u8] = b"\"sequence_number\"";

static FIND_KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(KEY));

/// What is known of a stream so far.
#[derive(Debug, Default)]
pub(crate) struct StreamState {
    sequence: Sequence,
    created: Created,
}

impl StreamState {
    /// Reads the next chunk of the stream.
    pub(crate) fn feed(&mut self, data: &[u8]) {
        self.sequence.feed(data);
        self.created.feed(data);
    }

    /// Returns the `response.failed` event. `request_id` replaces the response's id if that is unknown. `error` is the
    /// OpenAI error object.
    pub(crate) fn failed(&self, request_id: &str, error: &Value) -> String {
        let id = text(&self.created.id).unwrap_or_else(|| format!("resp_{request_id}"));
        let data = json!({
            "type": "response.failed",
            "sequence_number": self.sequence.last.map_or(0, |n| n.saturating_add(1)),
            "response": {
                "id": id,
                "object": "response",
                "created_at": self.created.created_at.unwrap_or(0),
                "model": text(&self.created.model).unwrap_or_default(),
                "output": [],
                "status": "failed",
                "error": { "code": error["code"], "message": error["message"] },
            },
            "error": error,
        });
        format!("event: response.failed\ndata: {data}\n\n")
    }
}

/// Decodes the content of a JSON string; `None` if it is invalid.
fn text(spelled: &Option<Vec<u8>>) -> Option<String> {
    let spelled = spelled.as_ref()?;
    serde_json::from_slice(&[b"\"", &**spelled, b"\""].concat()).ok()
}

/// Finds the last `"sequence_number":N`.
#[derive(Debug, Default)]
struct Sequence {
    last: Option<u64>,
    state: KeyState,
    /// The end of the last chunk, if it may be the beginning of [`KEY`].
    kept: [u8; KEY.len() - 1],
    kept_len: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum KeyState {
    /// Before the key.
    #[default]
    Text,
    /// After the key.
    Key,
    /// After the colon.
    Colon,
    /// Inside the number, with its value so far.
    Number(u64),
}

impl Sequence {
    fn feed(&mut self, data: &[u8]) {
        let mut at = self.across(data);
        while at < data.len() {
            if self.state == KeyState::Text {
                match FIND_KEY.find(&data[at..]) {
                    Some(found) => at += found + KEY.len(),
                    None => return self.keep(&data[at..]),
                }
                self.state = KeyState::Key;
                continue;
            }
            let b = data[at];
            self.state = match (self.state, b) {
                (KeyState::Key | KeyState::Colon, b' ' | b'\t') => self.state,
                (KeyState::Key, b':') => KeyState::Colon,
                (KeyState::Colon, b'0'..=b'9') => KeyState::Number(u64::from(b - b'0')),
                (KeyState::Number(n), b'0'..=b'9') => {
                    KeyState::Number(n.saturating_mul(10).saturating_add(u64::from(b - b'0')))
                }
                (KeyState::Number(n), b',' | b'}' | b' ' | b'\t' | b'\r' | b'\n') => {
                    self.last = Some(n);
                    KeyState::Text
                }
                // This byte may begin a key: read it once more.
                _ => {
                    self.state = KeyState::Text;
                    continue;
                }
            };
            at += 1;
        }
    }

    /// Looks for a key that began in an earlier chunk. Returns the index in `data` at which to continue.
    fn across(&mut self, data: &[u8]) -> usize {
        let (kept, mut both) = (std::mem::take(&mut self.kept_len), [0; 2 * KEY.len()]);
        if kept == 0 {
            return 0;
        }
        let head = data.len().min(KEY.len() - 1);
        both[..kept].copy_from_slice(&self.kept[..kept]);
        both[kept..kept + head].copy_from_slice(&data[..head]);
        match FIND_KEY.find(&both[..kept + head]) {
            Some(found) => {
                self.state = KeyState::Key;
                found + KEY.len() - kept
            }
            None if head == data.len() => {
                self.keep(&both[..kept + head]);
                data.len()
            }
            None => 0,
        }
    }

    /// Keeps the end of `text` if it may be the beginning of a key.
    fn keep(&mut self, text: &[u8]) {
        let from = text.len().saturating_sub(KEY.len() - 1);
        // Most chunks end with an event, without the beginning of a key.
        let start = memchr::memchr_iter(b'"', &text[from..])
            .map(|at| from + at)
            .find(|at| KEY.starts_with(&text[*at..]));
        if let Some(start) = start {
            self.kept_len = text.len() - start;
            self.kept[..self.kept_len].copy_from_slice(&text[start..]);
        }
    }
}

/// Reads the first event that has a `response`.
#[derive(Debug, Default)]
struct Created {
    id: Option<Vec<u8>>,
    model: Option<Vec<u8>>,
    created_at: Option<u64>,
    /// Whether the search is over.
    done: bool,
    bytes_read: usize,
    line: Line,
    json: Json,
}

/// The position in a line of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// This many bytes of `data:` were read.
    Begun(usize),
    /// In the data of a `data:` line.
    Data,
    /// In any other line.
    Other,
}

impl Default for Line {
    fn default() -> Self {
        Line::Begun(0)
    }
}

#[derive(Debug, Default)]
struct Json {
    depth: u32,
    in_string: bool,
    is_escaped: bool,
    /// Whether a value is expected or being read.
    is_value: bool,
    in_response: bool,
    key: Key,
    /// The string or number being read, in its JSON spelling.
    text: Vec<u8>,
    /// Whether `text` is only the beginning, since the value is too long.
    is_truncated: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Key {
    CreatedAt,
    Id,
    Model,
    #[default]
    Other,
    Response,
}

impl Created {
    fn feed(&mut self, data: &[u8]) {
        for b in data {
            if self.done {
                return;
            }
            self.bytes_read += 1;
            self.done = self.bytes_read >= MAX_SEARCH;
            self.line = match (self.line, b) {
                (_, b'\n' | b'\r') => {
                    self.json = Json::default();
                    Line::default()
                }
                (Line::Begun(n), b) if *b == b"data:"[n] => match n {
                    4 => Line::Data,
                    _ => Line::Begun(n + 1),
                },
                (Line::Data, b) => {
                    self.read(*b);
                    Line::Data
                }
                _ => Line::Other,
            };
        }
    }

    /// Reads one byte of JSON.
    fn read(&mut self, b: u8) {
        if self.json.in_string {
            return self.read_text(b);
        }
        match b {
            b'"' => {
                self.json.in_string = true;
                self.json.text.clear();
                self.json.is_truncated = false;
            }
            b'{' | b'[' => {
                let json = &mut self.json;
                json.in_response |=
                    json.depth == 1 && json.key == Key::Response && json.is_value && b == b'{';
                json.depth = json.depth.saturating_add(1);
                json.key = Key::Other;
                json.is_value = false;
                json.text.clear();
            }
            b':' => self.json.is_value = true,
            b',' | b'}' | b']' => {
                self.end_number();
                self.json.key = Key::Other;
                self.json.is_value = false;
                if b != b',' {
                    // The response object is complete: stop, even if a member is missing.
                    self.done |= self.json.in_response && self.json.depth == 2;
                    self.json.depth = self.json.depth.saturating_sub(1);
                }
            }
            _ if self.json.key == Key::CreatedAt && self.json.is_value => self.json.push(b),
            _ => {}
        }
    }

    fn read_text(&mut self, b: u8) {
        let json = &mut self.json;
        match b {
            _ if json.is_escaped => json.is_escaped = false,
            b'\\' => json.is_escaped = true,
            b'"' => {
                json.in_string = false;
                return self.end_text();
            }
            _ => {}
        }
        json.push(b);
    }

    /// Ends a string: a key or a value.
    fn end_text(&mut self) {
        let json = &mut self.json;
        if !json.is_value {
            json.key = match (json.depth, json.in_response, &*json.text) {
                (1, _, b"response") => Key::Response,
                (2, true, b"created_at") => Key::CreatedAt,
                (2, true, b"id") => Key::Id,
                (2, true, b"model") => Key::Model,
                _ => Key::Other,
            };
        } else if !json.is_truncated && json.depth == 2 {
            match json.key {
                Key::Id => self.id = Some(json.text.clone()),
                Key::Model => self.model = Some(json.text.clone()),
                _ => {}
            }
        }
        json.text.clear();
    }

    /// Ends a value that may be a number. Some providers write `created_at` as a float.
    fn end_number(&mut self) {
        if self.json.key == Key::CreatedAt && self.json.depth == 2 {
            let text = std::str::from_utf8(&self.json.text).unwrap_or_default();
            let whole = text.trim().split('.').next().unwrap_or_default();
            self.created_at = whole.parse().ok();
        }
        self.json.text.clear();
    }
}

impl Json {
    fn push(&mut self, b: u8) {
        if self.depth > 2 {
            return;
        }
        if self.text.len() < MAX_TEXT {
            self.text.push(b);
        } else {
            self.is_truncated = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seen(pieces: &[&[u8]]) -> StreamState {
        let mut seen = StreamState::default();
        pieces.iter().for_each(|p| seen.feed(p));
        seen
    }

    fn event(seen: &StreamState) -> Value {
        let event = seen.failed("r", &json!({ "message": "m", "type": "t", "param": null, "code": "c" }));
        let data = event.strip_prefix("event: response.failed\ndata: ").unwrap();
        serde_json::from_str(data.strip_suffix("\n\n").unwrap()).unwrap()
    }

    fn known(stream: &str) -> Value {
        let event = event(&seen(&[stream.as_bytes()]));
        let response = &event["response"];
        json!([event["sequence_number"], response["id"], response["created_at"], response["model"]])
    }

    const CREATED: &str = "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"id\":\"resp_1\",\"tools\":[{\"id\":\"x\",\"model\":\"y\"}],\"created_at\": 17.0,\"metadata\":{\"model\":\"no\"},\"model\":\"g\\u0070t\"},\"sequence_number\":0}\n\n";

    #[test]
    fn reads_the_members_of_the_response() {
        let long = format!("data: {{\"response\":{{\"id\":\"{}\",\"model\":\"m\"}}}}\n", "x".repeat(300));
        for (stream, want) in [
            ("", json!([0, "resp_r", 0, ""])),
            (CREATED, json!([1, "resp_1", 17, "gpt"])),
            (&CREATED.replace('\n', "\r\n"), json!([1, "resp_1", 17, "gpt"])),
            (
                ": hi\n\ndata: {\"sequence_number\" : 7 }\n\ndata: {\"sequence_number\":8",
                json!([8, "resp_r", 0, ""]),
            ),
            (
                "data: {\"delta\":\"\\\"sequence_number\\\":9\",\"sequence_number\":3}",
                json!([4, "resp_r", 0, ""]),
            ),
            ("data: {\"sequence_number\":{\"sequence_number\":\"9\"}}", json!([0, "resp_r", 0, ""])),
            ("data: {\"sequence_number\":99999999999999999999999}", json!([u64::MAX, "resp_r", 0, ""])),
            (
                "data: {\"id\":\"no\",\"response\":null}\n\ndata: {\"response\":{\"id\":\"a\"}}\n\ndata: {\"response\":{\"id\":\"b\",\"model\":\"c\"}}\n",
                json!([0, "a", 0, ""]),
            ),
            (
                "data: {\"response\":{\"id\":\"a\\q\",\"created_at\":null,\"model\":\"a\u{7}\"}}\n",
                json!([0, "resp_r", 0, ""]),
            ),
            ("id: {\"response\":{\"id\":\"a\"}}\n", json!([0, "resp_r", 0, ""])),
            (&long, json!([0, "resp_r", 0, "m"])),
        ] {
            assert_eq!(known(stream), want, "{stream}");
        }
    }

    #[test]
    fn an_endless_string_takes_bounded_memory() {
        let mut seen = StreamState::default();
        seen.feed(b"data: {\"response\":{\"id\":\"");
        (0..2048).for_each(|_| seen.feed(&[b'x'; 1024]));
        assert!(seen.created.done && seen.created.json.text.capacity() <= 2 * MAX_TEXT);
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_chunking(
            parts in prop::collection::vec(prop::sample::select(vec![
                CREATED, "\"sequence_number\":", "\"sequence_number", "\"sequence_number\" : 4", "1", "2,", "}", "\"", "\n",
                "data: {\"response\":{", "\"id\":\"i\",", "\"model\":\"\\\"", "\"created_at\":3", "\\", "data", ": ",
                "\r\n",
            ]), 0..14),
            cuts in prop::collection::vec(1usize..30, 1..6),
        ) {
            let text = parts.concat();
            let (mut rest, mut cut, mut cuts) = (text.as_bytes(), StreamState::default(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                cut.feed(piece);
                rest = more;
            }
            let whole = seen(&[text.as_bytes()]);
            prop_assert_eq!(event(&cut), event(&whole), "{:?}", text);
        }
    }
}
