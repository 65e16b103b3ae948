//! Reads the ids that a provider gives an answer of the Responses API, as its bytes pass, in any chunking.
//!
//! These are the ids by which a later request may refer to what the provider has stored: of the response, of the items
//! in `output`, and of the conversation. In a stream they stand in `response` and `item` of an event. What a client has
//! chosen, such as an id within `metadata`, is not read.

use memchr::memchr2;

/// Longest id that is read, in bytes.
pub(crate) const MAX_ID: usize = 256;

/// Most ids that are read of one answer.
const MAX_IDS: usize = 1024;

/// Longest key that is told from others, in bytes.
const MAX_KEY: usize = 12;

/// Deepest place that has an id: `response.output[].id`.
const MAX_PATH: usize = 4;

/// A step from an object to a member, or from an array to an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Conversation,
    Element,
    Id,
    Item,
    Other,
    Output,
    Response,
}

impl Step {
    fn of(key: &[u8]) -> Self {
        match key {
            b"conversation" => Step::Conversation,
            b"id" => Step::Id,
            b"item" => Step::Item,
            b"output" => Step::Output,
            b"response" => Step::Response,
            _ => Step::Other,
        }
    }
}

/// What a string is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Text {
    Id,
    Key,
    Other,
}

/// The position in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// After a backslash in a string.
    Escape(Text),
    /// Between strings.
    Outside,
    /// In a string.
    Within(Text),
}

/// Reads the ids of one answer. [`push`](AnswerIds::push) the chunks in order.
#[derive(Debug)]
pub(crate) struct AnswerIds {
    /// Whether each line is a text of its own, as in an event stream.
    is_lines: bool,
    state: State,
    /// The number of open containers.
    depth: usize,
    /// Which of the outer containers are objects.
    objects: [bool; MAX_PATH],
    /// The steps to the present place.
    path: [Step; MAX_PATH],
    /// Whether a string in an object is a key.
    is_key: bool,
    /// The text of the string, if it is a key or an id. One byte more than the longest means that it is too long.
    text: Vec<u8>,
    /// The ids that have been read.
    count: usize,
}

impl AnswerIds {
    /// Starts an answer. `is_stream`: it is an event stream.
    pub(crate) fn new(is_stream: bool) -> Self {
        AnswerIds {
            is_lines: is_stream,
            state: State::Outside,
            depth: 0,
            objects: [false; MAX_PATH],
            path: [Step::Other; MAX_PATH],
            is_key: false,
            text: Vec::new(),
            count: 0,
        }
    }

    /// Reads the next chunk, and calls `found` with each id that ends in it.
    pub(crate) fn push(&mut self, data: &[u8], mut found: impl FnMut(&[u8])) {
        let mut at = 0;
        while at < data.len() && self.count < MAX_IDS {
            at = match self.state {
                State::Outside => self.outside(data, at),
                State::Within(text) => self.within(data, at, text, &mut found),
                State::Escape(text) => {
                    // A key or an id with an escape is not read.
                    self.text.clear();
                    self.state = State::Within(if text == Text::Key { Text::Key } else { Text::Other });
                    at + 1
                }
            };
        }
    }

    fn outside(&mut self, data: &[u8], at: usize) -> usize {
        match data[at] {
            b'"' if self.depth > 0 => {
                self.text.clear();
                self.state = State::Within(match () {
                    () if self.is_key && self.is_in_object() => Text::Key,
                    () if self.is_id() => Text::Id,
                    () => Text::Other,
                });
            }
            b'{' => self.open(true),
            b'[' if self.depth > 0 => self.open(false),
            b'}' | b']' if self.depth > 0 => {
                self.depth -= 1;
                self.is_key = false;
            }
            b',' => self.is_key = true,
            b':' => self.is_key = false,
            b'\n' | b'\r' if self.is_lines => self.restart(),
            _ => {}
        }
        at + 1
    }

    fn within(&mut self, data: &[u8], at: usize, text: Text, found: &mut impl FnMut(&[u8])) -> usize {
        let rest = &data[at..];
        let end = match self.is_lines {
            true => rest.iter().position(|b| matches!(b, b'"' | b'\\' | b'\n' | b'\r')),
            false => memchr2(b'"', b'\\', rest),
        };
        let part = &rest[..end.unwrap_or(rest.len())];
        let room = (if text == Text::Key { MAX_KEY } else { MAX_ID } + 1).saturating_sub(self.text.len());
        if text != Text::Other {
            self.text.extend_from_slice(&part[..part.len().min(room)]);
        }
        let Some(end) = end else { return data.len() };
        match rest[end] {
            b'\\' => self.state = State::Escape(text),
            b'"' => {
                self.state = State::Outside;
                match text {
                    Text::Key => self.set(Step::of(&self.text)),
                    Text::Id if (1..=MAX_ID).contains(&self.text.len()) => {
                        self.count += 1;
                        found(&self.text);
                    }
                    Text::Id | Text::Other => {}
                }
            }
            _ => self.restart(),
        }
        at + end + 1
    }

    fn open(&mut self, is_object: bool) {
        self.depth += 1;
        if let Some(innermost) = self.objects.get_mut(self.depth - 1) {
            *innermost = is_object;
        }
        self.set(if is_object { Step::Other } else { Step::Element });
        self.is_key = is_object;
    }

    fn is_in_object(&self) -> bool {
        self.objects.get(self.depth.wrapping_sub(1)) == Some(&true)
    }

    /// Sets the step to the present member or element.
    fn set(&mut self, step: Step) {
        if let Some(last) = self.path.get_mut(self.depth.wrapping_sub(1)) {
            *last = step;
        }
    }

    /// Whether a string at the present place is an id.
    fn is_id(&self) -> bool {
        let Some(path) = self.path.get(..self.depth) else { return false };
        let path = path.strip_prefix(&[Step::Response]).unwrap_or(path);
        matches!(
            path,
            [Step::Id]
                | [Step::Conversation | Step::Item, Step::Id]
                | [Step::Output, Step::Element, Step::Id]
        )
    }

    /// Begins another text.
    fn restart(&mut self) {
        *self = AnswerIds { text: std::mem::take(&mut self.text), count: self.count, ..Self::new(true) };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn read(is_stream: bool, text: &str, size: usize) -> Vec<String> {
        let (mut ids, mut found) = (AnswerIds::new(is_stream), Vec::new());
        for chunk in text.as_bytes().chunks(size.max(1)) {
            ids.push(chunk, |id| found.push(String::from_utf8_lossy(id).into_owned()));
        }
        found
    }

    const BODY: &str = r#"{"id":"resp_1","object":"response","output":[{"type":"message","id":"msg_1","content":
        [{"id":"no","text":"\"id\":\"no\"}"}]},{"id":"fc_1","call_id":"no"}],"conversation":{"id":"conv_1"},
        "metadata":{"id":"no"},"tools":[{"id":"no","output":[{"id":"no"}]}],"previous_response_id":"no"}"#;

    #[test]
    fn the_ids_of_an_answer_are_those_that_the_provider_has_given() {
        for size in [1, 2, 3, 7, 1000] {
            assert_eq!(read(false, BODY, size), ["resp_1", "msg_1", "fc_1", "conv_1"], "{size}");
        }
    }

    #[test]
    fn a_stream_has_its_ids_in_its_events_and_a_broken_line_hides_no_other() {
        let body = BODY.replace(['\n', '\r'], "");
        let text = format!(
            "event: response.created\r\ndata: {{\"type\":\"response.created\",\"response\":{{\"id\":\"resp_1\"}}}}\r\n\r\n\
             : {{\"comment\ndata: {{\"item\":{{\"id\":\"msg_1\"}},\"item_id\":\"no\"}}\n\n\
             data: {{\"delta\":\"{{\\\"id\\\":\"}}\n\ndata: [\"id\",{{\"id\":\"no\"}}]\n\n\
             data: {{\"type\":\"response.completed\",\"response\":{body}}}\n\n"
        );
        let all = ["resp_1", "msg_1", "no", "resp_1", "msg_1", "fc_1", "conv_1"];
        for size in [1, 2, 5, 1000] {
            assert_eq!(read(true, &text, size), all.map(str::to_owned), "{size}");
        }
    }

    #[test]
    fn long_ids_and_too_many_are_not_read_and_deep_texts_do_no_harm() {
        let long = "x".repeat(MAX_ID);
        assert_eq!(read(false, &format!("{{\"id\":\"{long}\"}}"), 9), [&*long]);
        assert!(read(false, &format!("{{\"id\":\"{long}x\"}}"), 9).is_empty());
        assert!(read(false, r#"{"id":"a\u0062"}"#, 1).is_empty());
        let deep = ["[".repeat(100), "]".repeat(100)].concat();
        assert_eq!(read(false, &format!("{{\"x\":{deep},\"id\":\"a\"}}"), 9).len(), 1);
        let many = "{\"id\":\"a\"},".repeat(2 * MAX_IDS);
        assert_eq!(read(false, &format!("{{\"output\":[{many}]}}"), 999).len(), MAX_IDS);
    }

    /// The ids by a parser, in any order.
    fn naive(value: &Value) -> Vec<String> {
        let text = |value: &Value| value.as_str().filter(|s| !s.is_empty()).map(str::to_owned);
        let of = |object: &Value| -> Vec<String> {
            let output = object["output"].as_array().into_iter().flatten().map(|item| text(&item["id"]));
            let own = [&object["id"], &object["conversation"]["id"], &object["item"]["id"]];
            own.into_iter().map(text).chain(output).flatten().collect()
        };
        [of(value), of(&value["response"])].concat()
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let key = || prop::sample::select(vec!["id", "item", "output", "response", "conversation", "x\"\\"]);
        let leaf = prop_oneof![
            any::<i8>().prop_map(Value::from),
            "[a-c{}\":\\\\]{0,4}".prop_map(Value::from),
            Just(Value::Null)
        ];
        leaf.prop_recursive(6, 64, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(key(), inner, 0..5).prop_map(|members| {
                    Value::Object(members.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn finds_what_a_parser_finds(value in any_value(), size in 1usize..40, is_stream: bool) {
            prop_assume!(value.is_object());
            let text = value.to_string();
            let text = if is_stream { format!("data: {text}\n\n") } else { text };
            let mut found = read(is_stream, &text, size);
            let mut want: Vec<_> = naive(&value).into_iter().filter(|id| !id.contains(['"', '\\'])).collect();
            found.sort();
            want.sort();
            prop_assert_eq!(found, want);
        }
    }
}
