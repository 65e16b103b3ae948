//! What must be known of a stream of `/v1/responses` to end it in its own shape, should it be cut.
//!
//! Every event carries a `sequence_number`, and the first, `response.created`, the response itself. Memory is bounded and
//! any chunking gives the same. Numbers are found by a search for their key, which escapes keep from standing inside of a
//! string; the response is read as JSON, once.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde_json::{Value, json};

/// Longest id or model that is kept, as it is spelled.
const MAX_TEXT: usize = 256;

/// Bytes in which the response must have come; behind them nobody looks any more.
const MAX_LOOK: usize = 1 << 20;

const KEY: &[u8] = b"\"sequence_number\"";

static FIND_KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(KEY));

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    sequence: Sequence,
    created: Created,
    terminal: Terminal,
}

impl Seen {
    /// Takes the next piece of the stream.
    pub(crate) fn feed(&mut self, data: &[u8]) {
        self.sequence.feed(data);
        self.created.feed(data);
        self.terminal.feed(data);
    }

    /// The event that ends a response has come whole: `response.completed`, `.failed` or `.incomplete`.
    pub(crate) fn is_over(&self) -> bool {
        self.terminal.at == TerminalAt::Behind
    }

    /// The event that says that the response failed. `request_id` stands in for an id that never came, `error` is the
    /// error as every endpoint has it.
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

/// What a JSON string spells, if it is one.
fn text(spelled: &Option<Vec<u8>>) -> Option<String> {
    let spelled = spelled.as_ref()?;
    serde_json::from_slice(&[b"\"", &**spelled, b"\""].concat()).ok()
}

/// Longest beginning of a line that tells a terminal event.
const MAX_LINE: usize = 48;

/// Beginnings of lines that tell a terminal event, spaces left out.
const TERMINAL: [&[u8]; 6] = [
    b"event:response.completed",
    b"event:response.failed",
    b"event:response.incomplete",
    b"data:{\"type\":\"response.completed\"",
    b"data:{\"type\":\"response.failed\"",
    b"data:{\"type\":\"response.incomplete\"",
];

/// Looks for the event that ends a response, by the beginnings of lines.
#[derive(Debug, Default)]
struct Terminal {
    at: TerminalAt,
    /// The beginning of the present line, spaces left out.
    line: Vec<u8>,
    /// Whether the present line has had a byte.
    has_bytes: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum TerminalAt {
    #[default]
    Before,
    Inside,
    Behind,
}

impl Terminal {
    fn feed(&mut self, data: &[u8]) {
        let mut rest = data;
        while !rest.is_empty() && self.at != TerminalAt::Behind {
            let end = memchr::memchr(b'\n', rest);
            let part = &rest[..end.unwrap_or(rest.len())];
            self.has_bytes |= part.iter().any(|b| *b != b'\r');
            let room = MAX_LINE - self.line.len();
            self.line.extend(part.iter().filter(|b| !matches!(b, b' ' | b'\r')).take(room));
            let Some(end) = end else { return };
            self.end_line();
            rest = &rest[end + 1..];
        }
    }

    fn end_line(&mut self) {
        if TERMINAL.iter().any(|known| self.line.starts_with(known)) {
            self.at = TerminalAt::Inside;
        } else if !self.has_bytes && self.at == TerminalAt::Inside {
            self.at = TerminalAt::Behind;
        }
        self.line.clear();
        self.has_bytes = false;
    }
}

/// The last `"sequence_number":N`.
#[derive(Debug, Default)]
struct Sequence {
    last: Option<u64>,
    at: KeyState,
    /// The end of the last piece, which may be the beginning of [`KEY`].
    kept: [u8; KEY.len() - 1],
    kept_len: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum KeyState {
    /// Anywhere.
    #[default]
    Text,
    /// Behind the key.
    Key,
    /// Behind the colon.
    Colon,
    /// In the number.
    Number(u64),
}

impl Sequence {
    fn feed(&mut self, data: &[u8]) {
        let mut at = self.across(data);
        while at < data.len() {
            if self.at == KeyState::Text {
                match FIND_KEY.find(&data[at..]) {
                    Some(found) => at += found + KEY.len(),
                    None => return self.keep(&data[at..]),
                }
                self.at = KeyState::Key;
                continue;
            }
            let b = data[at];
            self.at = match (self.at, b) {
                (KeyState::Key | KeyState::Colon, b' ' | b'\t') => self.at,
                (KeyState::Key, b':') => KeyState::Colon,
                (KeyState::Colon, b'0'..=b'9') => KeyState::Number(u64::from(b - b'0')),
                (KeyState::Number(n), b'0'..=b'9') => {
                    KeyState::Number(n.saturating_mul(10).saturating_add(u64::from(b - b'0')))
                }
                (KeyState::Number(n), b',' | b'}' | b' ' | b'\t' | b'\r' | b'\n') => {
                    self.last = Some(n);
                    KeyState::Text
                }
                // It is looked at once more: it may begin a key.
                _ => {
                    self.at = KeyState::Text;
                    continue;
                }
            };
            at += 1;
        }
    }

    /// Looks for a key that began in an earlier piece; returns where to go on.
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
                self.at = KeyState::Key;
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
        // Most pieces end with an event.
        let start = memchr::memchr_iter(b'"', &text[from..])
            .map(|at| from + at)
            .find(|at| KEY.starts_with(&text[*at..]));
        if let Some(start) = start {
            self.kept_len = text.len() - start;
            self.kept[..self.kept_len].copy_from_slice(&text[start..]);
        }
    }
}

/// The reader of the first event that has a `response`.
#[derive(Debug, Default)]
struct Created {
    id: Option<Vec<u8>>,
    model: Option<Vec<u8>>,
    created_at: Option<u64>,
    /// Nothing more is looked for.
    done: bool,
    looked_at: usize,
    line: Line,
    json: Json,
}

/// Where in a line of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// So many bytes of `data:` have come.
    Begun(usize),
    /// In a line of data.
    Data,
    /// In another line.
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
    escaped: bool,
    /// A value comes, or is read.
    is_value: bool,
    in_response: bool,
    key: Key,
    /// The string or number that is read, as it is spelled; `cut`: it is longer.
    text: Vec<u8>,
    cut: bool,
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
            self.looked_at += 1;
            self.done = self.looked_at >= MAX_LOOK;
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
                self.json.cut = false;
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
                    // The response is over: what it did not say is not there.
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
            _ if json.escaped => json.escaped = false,
            b'\\' => json.escaped = true,
            b'"' => {
                json.in_string = false;
                return self.end_text();
            }
            _ => {}
        }
        json.push(b);
    }

    /// A string is whole: a key, or a value.
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
        } else if !json.cut && json.depth == 2 {
            match json.key {
                Key::Id => self.id = Some(json.text.clone()),
                Key::Model => self.model = Some(json.text.clone()),
                _ => {}
            }
        }
        json.text.clear();
    }

    /// A value that may be a number is over. Some providers write the time as a float.
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
            self.cut = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seen(pieces: &[&[u8]]) -> Seen {
        let mut seen = Seen::default();
        pieces.iter().for_each(|p| seen.feed(p));
        seen
    }

    fn event(seen: &Seen) -> Value {
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
    fn what_a_stream_says_of_its_response_is_known() {
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
    fn what_never_ends_takes_no_memory() {
        let mut seen = Seen::default();
        seen.feed(b"data: {\"response\":{\"id\":\"");
        (0..2048).for_each(|_| seen.feed(&[b'x'; 1024]));
        assert!(seen.created.done && seen.created.json.text.capacity() <= 2 * MAX_TEXT);
    }

    #[test]
    fn the_event_that_ends_a_response_is_known() {
        for (stream, over) in [
            ("", false),
            (CREATED, false),
            ("event: response.completed\ndata: {}\n\n", true),
            ("event:response.failed\r\ndata: {}\r\n\r\n", true),
            ("data: {\"type\": \"response.incomplete\",\"response\":{}}\n\n", true),
            ("event: response.completed\ndata: {}\n", false),
            ("event: response.completed\ndata: {\"resp", false),
            (
                "data: {\"type\":\"response.output_text.delta\",\"delta\":\"event: response.completed\"}\n\n",
                false,
            ),
            ("event: response.completed\ndata: {}\n\n: more\n\nevent: x", true),
        ] {
            assert_eq!(seen(&[stream.as_bytes()]).is_over(), over, "{stream}");
        }
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same(
            parts in prop::collection::vec(prop::sample::select(vec![
                CREATED, "\"sequence_number\":", "\"sequence_number", "\"sequence_number\" : 4", "1", "2,", "}", "\"", "\n",
                "data: {\"response\":{", "\"id\":\"i\",", "\"model\":\"\\\"", "\"created_at\":3", "\\", "data", ": ",
                "event: response.completed", "\r\n", "data:{\"type\" :\"response.failed\"",
            ]), 0..14),
            cuts in prop::collection::vec(1usize..30, 1..6),
        ) {
            let text = parts.concat();
            let (mut rest, mut cut, mut cuts) = (text.as_bytes(), Seen::default(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                cut.feed(piece);
                rest = more;
            }
            let whole = seen(&[text.as_bytes()]);
            prop_assert_eq!((event(&cut), cut.is_over()), (event(&whole), whole.is_over()), "{:?}", text);
        }
    }
}
