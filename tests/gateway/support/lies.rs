//! The ways in which a provider lies, stalls or breaks before the first content of its answer, and the right answers.
//! The soak uses this file too.

/// An endpoint, and whether its answer is streamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ask {
    pub api: Api,
    pub is_stream: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Api {
    Chat,
    Completions,
    Messages,
    Responses,
}

/// What a provider sends in place of an answer.
#[derive(Debug)]
pub(crate) struct Lie {
    pub name: &'static str,
    /// The `reason` of `zap_prelude_failovers_total`; `None` if no success was announced.
    pub prelude: Option<&'static str>,
    /// The `reason` of `zap_retries_total`.
    pub retry: &'static str,
    sent: Sent,
    pub end: End,
}

/// What happens to the connection of a lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Close,
    Keep,
    Reset,
    /// The connection stays open, and nothing more comes.
    Stall,
}

#[derive(Debug)]
enum Sent {
    /// These bytes.
    Bytes(&'static str),
    /// The head of an event stream and these pieces, each a chunk. A last chunk follows if the connection is kept.
    Events(&'static [&'static str]),
    /// A whole JSON response with this status, these further headers and this body.
    Json(&'static str, &'static str, &'static str),
}

impl Lie {
    /// The bytes on the wire.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        match self.sent {
            Sent::Bytes(bytes) => bytes.as_bytes().to_vec(),
            Sent::Events(pieces) => events(pieces, self.end == End::Keep),
            Sent::Json(status, headers, body) => json(status, headers, body),
        }
    }
}

fn events(pieces: &[&str], is_whole: bool) -> Vec<u8> {
    let mut out =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    for piece in pieces {
        out += &format!("{:x}\r\n{piece}\r\n", piece.len());
    }
    if is_whole {
        out += "0\r\n\r\n";
    }
    out.into_bytes()
}

fn json(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    )
    .into_bytes()
}

const fn status(line: &'static str) -> Lie {
    let sent = Sent::Json(line, "", r#"{"error":{"message":"no","type":"server_error"}}"#);
    Lie { name: line, prelude: None, retry: "upstream_error", sent, end: End::Keep }
}

const fn bytes(name: &'static str, retry: &'static str, bytes: &'static str, end: End) -> Lie {
    Lie { name, prelude: None, retry, sent: Sent::Bytes(bytes), end }
}

/// A JSON error in a 200.
const fn json_error(name: &'static str, body: &'static str) -> Lie {
    let sent = Sent::Json("200 OK", "", body);
    Lie { name, prelude: Some("json_error"), retry: "upstream_error_event", sent, end: End::Keep }
}

const fn empty_json(name: &'static str, body: &'static str) -> Lie {
    let sent = Sent::Json("200 OK", "", body);
    Lie { name, prelude: Some("empty"), retry: "upstream_empty", sent, end: End::Keep }
}

/// A JSON response of 200 that is cut.
const fn cut_json(name: &'static str, bytes: &'static str, end: End) -> Lie {
    Lie { name, prelude: Some("cut"), retry: "stream_interrupted", sent: Sent::Bytes(bytes), end }
}

const fn error_event(name: &'static str, pieces: &'static [&'static str]) -> Lie {
    let sent = Sent::Events(pieces);
    Lie { name, prelude: Some("error_event"), retry: "upstream_error_event", sent, end: End::Keep }
}

const fn empty_stream(name: &'static str, pieces: &'static [&'static str]) -> Lie {
    let sent = Sent::Events(pieces);
    Lie { name, prelude: Some("empty"), retry: "upstream_empty", sent, end: End::Keep }
}

const fn cut_stream(name: &'static str, pieces: &'static [&'static str], end: End) -> Lie {
    let sent = Sent::Events(pieces);
    Lie { name, prelude: Some("cut"), retry: "stream_interrupted", sent, end }
}

const fn mute_stream(name: &'static str, pieces: &'static [&'static str]) -> Lie {
    let sent = Sent::Events(pieces);
    Lie { name, prelude: Some("timeout"), retry: "upstream_timeout", sent, end: End::Stall }
}

const ROLE: &str = "data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
const NO_CHOICES: &str = "data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"choices\":[]}\n\n";
const NO_TEXT: &str =
    "data: {\"id\":\"c\",\"choices\":[{\"text\":\"\",\"index\":0,\"finish_reason\":null}]}\n\n";
const CREATED: &str = "event: response.created\ndata: {\"type\":\"response.created\",\"sequence_number\":0,\"response\":{\"id\":\"resp_1\",\"object\":\"response\",\"created_at\":7,\"model\":\"m\",\"output\":[],\"status\":\"in_progress\"}}\n\n";
const ITEM: &str = "event: response.output_item.added\ndata: {\"type\":\"response.output_item.added\",\"sequence_number\":1,\"output_index\":0,\"item\":{\"type\":\"message\",\"id\":\"msg_1\",\"content\":[]}}\n\n";
const FAILED: &str = "event: response.failed\ndata: {\"type\":\"response.failed\",\"sequence_number\":1,\"response\":{\"id\":\"resp_1\",\"status\":\"failed\",\"error\":{\"code\":\"server_error\",\"message\":\"no\"}}}\n\n";
const ERROR: &str = "data: {\"error\":{\"message\":\"no\",\"type\":\"server_error\",\"code\":500}}\n\n";
/// As OpenRouter sends it: beside `choices`.
const ERROR_BESIDE: &str = "data: {\"error\":{\"code\":502,\"message\":\"no\"},\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\"},\"finish_reason\":\"error\"}]}\n\n";
const MESSAGE: &str = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\",\"type\":\"message\",\"role\":\"assistant\",\"model\":\"m\",\"content\":[],\"usage\":{\"input_tokens\":5,\"output_tokens\":1}}}\n\n";
const PING: &str = "event: ping\ndata: {\"type\":\"ping\"}\n\n";
const BLOCK: &str = "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n";
const MESSAGE_STOP: &str = "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
const OVERLOADED: &str = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}\n\n";
const NAMED_ERROR: &str = "event: error\ndata: not JSON\n\n";
const DONE: &str = "data: [DONE]\n\n";

/// What every endpoint may answer, streamed or not.
const ANY: [Lie; 15] = [
    status("500 Internal Server Error"),
    status("502 Bad Gateway"),
    status("503 Service Unavailable"),
    status("504 Gateway Timeout"),
    status("529 Overloaded"),
    status("408 Request Timeout"),
    bytes("closed before the head", "upstream_unreachable", "", End::Close),
    bytes("closed in the head", "upstream_unreachable", "HTTP/1.1 200 OK\r\ncontent-ty", End::Close),
    bytes("reset before the head", "upstream_unreachable", "", End::Reset),
    bytes("not HTTP", "upstream_invalid_response", "SSH-2.0-x\r\n\r\n", End::Close),
    bytes(
        "two lengths",
        "upstream_invalid_response",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        End::Close,
    ),
    json_error("an error in a 200", r#"{"error":{"message":"no","type":"server_error","code":500}}"#),
    json_error("an error in a 200 that is a text", r#"{"error":"CUDA out of memory","choices":[]}"#),
    empty_json("an empty 200", ""),
    cut_json(
        "a 200 that is cut before its body",
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n",
        End::Close,
    ),
];

const PLAIN: [Lie; 2] = [
    cut_json(
        "a 200 that is cut within its body",
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{\"id\":\"c\",\"choi",
        End::Close,
    ),
    cut_json(
        "a 200 that is reset within its body",
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\"id\"\r\n",
        End::Reset,
    ),
];

/// What chats and completions may answer, besides.
const PLAIN_CHOICES: [Lie; 1] = [empty_json("no choices", r#"{"id":"c","choices":[],"usage":null}"#)];

const CHAT_STREAM: [Lie; 15] = [
    error_event("an error event first", &[ERROR]),
    error_event("an error event beside choices", &[ERROR_BESIDE]),
    error_event("an error event by name", &[NAMED_ERROR]),
    error_event("an error event after the role", &[ROLE, ERROR, DONE]),
    error_event("an error event after a comment", &[": wait\n\n", ERROR]),
    cut_stream("the role, then a cut", &[ROLE], End::Close),
    cut_stream("the role, then a reset", &[ROLE], End::Reset),
    cut_stream("a cut before the first event", &[], End::Close),
    cut_stream("half of an event", &[ROLE, "data: {\"choices\":[{\"del"], End::Close),
    empty_stream("a stream without events", &[]),
    empty_stream("comments alone", &[": wait\n\n", ": wait\n\n"]),
    empty_stream("the role and the end", &[ROLE, DONE]),
    empty_stream("the role and no end", &[ROLE]),
    empty_stream("the end alone", &[DONE]),
    empty_stream("events without choices", &[NO_CHOICES, NO_CHOICES, DONE]),
];

const COMPLETIONS_STREAM: [Lie; 5] = [
    error_event("an error event first", &[ERROR]),
    error_event("an error event after an empty text", &[NO_TEXT, ERROR]),
    cut_stream("an empty text, then a cut", &[NO_TEXT], End::Close),
    empty_stream("empty texts alone", &[NO_TEXT, NO_TEXT, DONE]),
    empty_stream("a stream without events", &[]),
];

const MESSAGES_STREAM: [Lie; 8] = [
    error_event("an error event first", &[OVERLOADED]),
    error_event("an error event after message_start", &[MESSAGE, PING, BLOCK, OVERLOADED]),
    error_event("an error event by name", &[MESSAGE, NAMED_ERROR]),
    cut_stream("message_start, then a cut", &[MESSAGE, PING, BLOCK], End::Close),
    cut_stream("message_start, then a reset", &[MESSAGE], End::Reset),
    empty_stream("message_start and no more", &[MESSAGE]),
    empty_stream("message_start and message_stop", &[MESSAGE, MESSAGE_STOP]),
    empty_stream("a stream without events", &[]),
];

const RESPONSES_STREAM: [Lie; 7] = [
    error_event("an error event first", &[ERROR]),
    error_event("response.failed after response.created", &[CREATED, FAILED]),
    error_event("an error event by name", &[CREATED, NAMED_ERROR]),
    cut_stream("response.created, then a cut", &[CREATED, ITEM], End::Close),
    cut_stream("response.created, then a reset", &[CREATED], End::Reset),
    empty_stream("response.created and no more", &[CREATED]),
    empty_stream("a stream without events", &[]),
];

/// Streams that stall before their content.
pub(crate) const STALLS: [Lie; 4] = [
    bytes("stalled before the head", "upstream_timeout", "", End::Stall),
    mute_stream("stalled after the head", &[]),
    mute_stream("stalled after the role", &[ROLE]),
    mute_stream("stalled within an event", &[ROLE, "data: {\"choices\":[{\"delta\":{\"content\":"]),
];

/// What a provider without room answers, without a word about when it will have room.
pub(crate) const BUSY: [Lie; 3] = [
    Lie {
        name: "429 without a wait",
        prelude: None,
        retry: "upstream_rate_limited",
        sent: Sent::Json("429 Too Many Requests", "", "{\"error\":{\"message\":\"busy\"}}"),
        end: End::Keep,
    },
    status("503 Service Unavailable"),
    status("529 Overloaded"),
];

impl Ask {
    pub(crate) const ALL: [Ask; 8] = [
        Ask { api: Api::Chat, is_stream: false },
        Ask { api: Api::Chat, is_stream: true },
        Ask { api: Api::Completions, is_stream: false },
        Ask { api: Api::Completions, is_stream: true },
        Ask { api: Api::Responses, is_stream: false },
        Ask { api: Api::Responses, is_stream: true },
        Ask { api: Api::Messages, is_stream: false },
        Ask { api: Api::Messages, is_stream: true },
    ];

    /// Recognizes a request by the path and the body that a provider gets.
    pub(crate) fn of(path: &str, body: &[u8]) -> Ask {
        let api = match path {
            _ if path.ends_with("/chat/completions") => Api::Chat,
            _ if path.ends_with("/completions") => Api::Completions,
            _ if path.ends_with("/messages") => Api::Messages,
            _ => Api::Responses,
        };
        Ask { api, is_stream: memchr::memmem::find(body, b"\"stream\":true").is_some() }
    }

    pub(crate) fn path(self) -> &'static str {
        match self.api {
            Api::Chat => "/v1/chat/completions",
            Api::Completions => "/v1/completions",
            Api::Messages => "/v1/messages",
            Api::Responses => "/v1/responses",
        }
    }

    /// The body of a request for `model`.
    pub(crate) fn body(self, model: &str) -> String {
        let stream = self.is_stream;
        let content = match self.api {
            Api::Chat => r#""messages":[{"role":"user","content":"hi"}]"#,
            Api::Completions => r#""prompt":"hi""#,
            Api::Messages => r#""max_tokens":9,"messages":[{"role":"user","content":"hi"}]"#,
            Api::Responses => r#""input":"hi""#,
        };
        format!("{{\"model\":\"{model}\",\"stream\":{stream},{content}}}")
    }

    /// The lies that a provider may tell.
    pub(crate) fn lies(self) -> impl Iterator<Item = &'static Lie> {
        let more: [&'static [Lie]; 2] = match (self.api, self.is_stream) {
            (Api::Chat, true) => [&CHAT_STREAM, &[]],
            (Api::Completions, true) => [&COMPLETIONS_STREAM, &[]],
            (Api::Messages, true) => [&MESSAGES_STREAM, &[]],
            (Api::Responses, true) => [&RESPONSES_STREAM, &[]],
            (Api::Chat | Api::Completions, false) => [&PLAIN, &PLAIN_CHOICES],
            (Api::Messages | Api::Responses, false) => [&PLAIN, &[]],
        };
        ANY.iter().chain(more.into_iter().flatten())
    }

    /// The events of a right answer.
    fn pieces(self) -> &'static [&'static str] {
        match self.api {
            Api::Chat => &[
                ROLE,
                "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"good\"},\"finish_reason\":null}]}\n\n",
                "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
                DONE,
            ],
            Api::Completions => &[
                NO_TEXT,
                "data: {\"choices\":[{\"text\":\"good\",\"index\":0,\"finish_reason\":null}]}\n\n",
                "data: {\"choices\":[{\"text\":\"\",\"index\":0,\"finish_reason\":\"stop\"}]}\n\n",
                DONE,
            ],
            Api::Messages => &[
                MESSAGE,
                PING,
                BLOCK,
                "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"good\"}}\n\n",
                "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n",
                "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":2}}\n\n",
                MESSAGE_STOP,
            ],
            Api::Responses => &[
                CREATED,
                ITEM,
                "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"sequence_number\":2,\"delta\":\"good\"}\n\n",
                "event: response.completed\ndata: {\"type\":\"response.completed\",\"sequence_number\":3,\"response\":{\"id\":\"resp_1\",\"status\":\"completed\"}}\n\n",
            ],
        }
    }

    /// The body of a right answer.
    pub(crate) fn answer(self) -> String {
        match (self.is_stream, self.api) {
            (true, _) => self.pieces().concat(),
            (false, Api::Chat) => {
                r#"{"id":"c","choices":[{"index":0,"message":{"role":"assistant","content":"good"},"finish_reason":"stop"}]}"#.to_owned()
            }
            (false, Api::Completions) => {
                r#"{"id":"c","choices":[{"text":"good","index":0,"finish_reason":"stop"}]}"#.to_owned()
            }
            (false, Api::Messages) => {
                r#"{"id":"m","type":"message","role":"assistant","content":[{"type":"text","text":"good"}],"stop_reason":"end_turn"}"#.to_owned()
            }
            (false, Api::Responses) => {
                r#"{"id":"r","output":[{"type":"message","content":[{"type":"output_text","text":"good"}]}]}"#.to_owned()
            }
        }
    }

    /// A right answer on the wire. The connection stays open.
    pub(crate) fn answer_bytes(self) -> Vec<u8> {
        let (before, content, behind) = self.parts();
        match self.is_stream {
            true => events(&[&before, content, &behind], true),
            false => json("200 OK", "", &self.answer()),
        }
    }

    /// The events of a right stream: before its content, its content, and behind it.
    pub(crate) fn parts(self) -> (String, &'static str, String) {
        let pieces = self.pieces();
        let content = match self.api {
            Api::Chat | Api::Completions => 1,
            Api::Messages => 3,
            Api::Responses => 2,
        };
        (pieces[..content].concat(), pieces[content], pieces[content + 1..].concat())
    }

    /// The beginning of a streamed answer on the wire, up to and with its first content.
    pub(crate) fn begun_bytes(self) -> Vec<u8> {
        let (before, content, _) = self.parts();
        events(&[&before, content], false)
    }
}
