//! The endpoints whose tokens are counted: a request, an answer and its token counts in the dialect of each.

use super::{Counts, DONE, Seen, has};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    Chat,
    Completions,
    Responses,
    Embeddings,
    Rerank,
    Messages,
    Images,
    Transcriptions,
}

/// An endpoint, and whether its answer is streamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ask {
    pub api: Api,
    pub is_stream: bool,
}

pub(super) const fn ask(api: Api, is_stream: bool) -> Ask {
    Ask { api, is_stream }
}

pub(super) const STREAMS: [Ask; 4] =
    [ask(Api::Chat, true), ask(Api::Completions, true), ask(Api::Responses, true), ask(Api::Messages, true)];

/// All answers. An image and the text of a form come last: without token counts nothing is known of them.
pub(super) const ALL: [Ask; 12] = [
    ask(Api::Chat, false),
    STREAMS[0],
    ask(Api::Completions, false),
    STREAMS[1],
    ask(Api::Responses, false),
    STREAMS[2],
    ask(Api::Embeddings, false),
    ask(Api::Rerank, false),
    ask(Api::Messages, false),
    STREAMS[3],
    ask(Api::Images, false),
    ask(Api::Transcriptions, false),
];

/// How many of [`ALL`] can be estimated.
pub(super) const ESTIMATED: usize = ALL.len() - 2;

/// The setting of a backend that serves [`ALL`].
pub(super) const BOTH: &str = "protocols = [\"openai\", \"anthropic\"]\n";

impl Ask {
    /// Recognizes a request that a provider got.
    pub(super) fn of(seen: &Seen) -> Ask {
        let path = seen.line.split(' ').nth(1).unwrap();
        let of_path = |ask: &&Ask| path == ask.path();
        let api = ALL.iter().find(of_path).unwrap().api;
        ask(api, ["\"stream\":true", "\"stream\" : true"].iter().any(|member| has(&seen.body, member)))
    }

    pub(super) fn path(self) -> &'static str {
        match self.api {
            Api::Chat => "/v1/chat/completions",
            Api::Completions => "/v1/completions",
            Api::Responses => "/v1/responses",
            Api::Embeddings => "/v1/embeddings",
            Api::Rerank => "/v1/rerank",
            Api::Messages => "/v1/messages",
            Api::Images => "/v1/images/generations",
            Api::Transcriptions => "/v1/audio/transcriptions",
        }
    }

    /// The header lines of a request.
    pub(super) fn headers(self) -> &'static str {
        match self.api {
            Api::Transcriptions => "content-type: multipart/form-data; boundary=b\r\n",
            _ => "",
        }
    }

    /// Whether the client decides whether it gets the token counts.
    pub(super) fn has_options(self) -> bool {
        self.is_stream && matches!(self.api, Api::Chat | Api::Completions)
    }

    /// The body of a request for `model`, with the members `more`, which begin with a comma.
    pub(super) fn body(self, model: &str, more: &str) -> String {
        let stream = self.is_stream;
        let content = match self.api {
            Api::Transcriptions => {
                let part = "content-disposition: form-data; name=\"model\"";
                return format!("--b\r\n{part}\r\n\r\n{model}\r\n--b--\r\n");
            }
            Api::Chat | Api::Messages => r#""messages":[{"role":"user","content":"hi"}]"#,
            Api::Completions | Api::Images => r#""prompt":"hi""#,
            Api::Responses | Api::Embeddings => r#""input":"hi""#,
            Api::Rerank => r#""query":"hi","documents":["a"]"#,
        };
        format!("{{\"model\":\"{model}\",\"stream\":{stream},{content}{more}}}")
    }

    /// The counts that an answer of this kind can tell.
    pub(super) fn told(self, [input, cached, output, reasoning]: Counts) -> Counts {
        match self.api {
            Api::Embeddings | Api::Rerank => [input, 0, 0, 0],
            Api::Images | Api::Transcriptions => [input, 0, output, 0],
            Api::Messages => [input, cached, output, 0],
            Api::Chat | Api::Completions | Api::Responses => [input, cached, output, reasoning],
        }
    }

    pub(super) fn usage(self, [input, cached, output, reasoning]: Counts) -> String {
        let total = input + output;
        match self.api {
            Api::Chat | Api::Completions => format!(
                "{{\"prompt_tokens\":{input},\"completion_tokens\":{output},\"total_tokens\":{total},\"prompt_tokens_details\":{{\"cached_tokens\":{cached}}},\"completion_tokens_details\":{{\"reasoning_tokens\":{reasoning}}}}}"
            ),
            Api::Responses => format!(
                "{{\"input_tokens\":{input},\"input_tokens_details\":{{\"cached_tokens\":{cached}}},\"output_tokens\":{output},\"output_tokens_details\":{{\"reasoning_tokens\":{reasoning}}},\"total_tokens\":{total}}}"
            ),
            Api::Embeddings => format!("{{\"prompt_tokens\":{input},\"total_tokens\":{input}}}"),
            Api::Rerank => format!("{{\"total_tokens\":{input}}}"),
            Api::Messages => format!(
                "{{\"input_tokens\":{},\"cache_read_input_tokens\":{cached},\"output_tokens\":{output}}}",
                input - cached
            ),
            Api::Images | Api::Transcriptions => {
                format!("{{\"input_tokens\":{input},\"output_tokens\":{output},\"total_tokens\":{total}}}")
            }
        }
    }

    /// An answer that is not streamed.
    pub(super) fn json(self, text: &str, counts: Option<Counts>) -> String {
        let usage = counts.map(|counts| format!(",\"usage\":{}", self.usage(counts))).unwrap_or_default();
        let content = match self.api {
            Api::Chat => format!(
                "\"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":\"{text}\"}},\"finish_reason\":\"stop\"}}]"
            ),
            Api::Completions => {
                format!("\"choices\":[{{\"text\":\"{text}\",\"index\":0,\"finish_reason\":\"stop\"}}]")
            }
            Api::Responses => format!(
                "\"output\":[{{\"type\":\"message\",\"content\":[{{\"type\":\"output_text\",\"text\":\"{text}\"}}]}}]"
            ),
            Api::Embeddings => "\"data\":[{\"embedding\":[0.5]}]".to_owned(),
            Api::Rerank => "\"results\":[{\"index\":0,\"relevance_score\":0.5}]".to_owned(),
            Api::Messages => {
                format!("\"type\":\"message\",\"content\":[{{\"type\":\"text\",\"text\":\"{text}\"}}]")
            }
            Api::Images => "\"data\":[{\"b64_json\":\"AAAA\"}]".to_owned(),
            Api::Transcriptions => format!("\"text\":\"{text}\""),
        };
        format!("{{\"id\":\"x\",{content}{usage}}}")
    }

    /// The events of a streamed answer, up to its last content and behind it. `asked`: a chunk without token counts
    /// says so, as OpenAI's do.
    pub(super) fn events(self, text: &str, asked: bool, counts: Option<Counts>) -> (String, String) {
        let null = if asked { ",\"usage\":null" } else { "" };
        let usage = counts.map(|counts| self.usage(counts));
        let words = || text.split_inclusive(' ');
        if self.api == Api::Messages {
            return self.message(text, counts);
        }
        if self.api == Api::Responses {
            let usage = usage.map(|usage| format!(",\"usage\":{usage}")).unwrap_or_default();
            let event = |kind: &str, more: &str| {
                format!("event: response.{kind}\ndata: {{\"type\":\"response.{kind}\"{more}}}\n\n")
            };
            let delta = |word: &str| event("output_text.delta", &format!(",\"delta\":\"{word}\""));
            let begin = event("created", ",\"response\":{\"id\":\"r\",\"usage\":null}");
            let response = format!(",\"response\":{{\"id\":\"r\",\"status\":\"completed\"{usage}}}");
            return (begin + &words().map(delta).collect::<String>(), event("completed", &response));
        }
        let event = |choice: &str, finish: &str| {
            format!(
                "data: {{\"id\":\"x\",\"choices\":[{{\"index\":0,{choice},\"finish_reason\":{finish}}}]{null}}}\n\n"
            )
        };
        let word = |word: &str| match self.api {
            Api::Chat => event(&format!("\"delta\":{{\"content\":\"{word}\"}}"), "null"),
            _ => event(&format!("\"text\":\"{word}\""), "null"),
        };
        let (begin, end) = match self.api {
            Api::Chat => {
                (event("\"delta\":{\"role\":\"assistant\",\"content\":\"\"}", "null"), "\"delta\":{}")
            }
            _ => (word(""), "\"text\":\"\""),
        };
        let usage = usage.map(|usage| format!("data: {{\"id\":\"x\",\"choices\":[],\"usage\":{usage}}}\n\n"));
        let behind = [event(end, "\"stop\""), usage.unwrap_or_default(), DONE.to_owned()].concat();
        (begin + &words().map(word).collect::<String>(), behind)
    }

    /// The events of a message: its start tells the input, its end the output.
    fn message(self, text: &str, counts: Option<Counts>) -> (String, String) {
        let event =
            |kind: &str, more: &str| format!("event: {kind}\ndata: {{\"type\":\"{kind}\"{more}}}\n\n");
        let usage = |counts: Counts| format!(",\"usage\":{}", self.usage(counts));
        let first = counts.map(|[input, cached, ..]| usage([input, cached, 1, 0])).unwrap_or_default();
        let start = format!(",\"message\":{{\"id\":\"x\",\"type\":\"message\",\"content\":[]{first}}}");
        let word = |word: &str| {
            let delta = format!("\"delta\":{{\"type\":\"text_delta\",\"text\":\"{word}\"}}");
            event("content_block_delta", &format!(",\"index\":0,{delta}"))
        };
        let words: String = text.split_inclusive(' ').map(word).collect();
        let output = counts.map(|counts| format!(",\"usage\":{{\"output_tokens\":{}}}", counts[2]));
        let end = format!(",\"delta\":{{\"stop_reason\":\"end_turn\"}}{}", output.unwrap_or_default());
        (event("message_start", &start) + &words, event("message_delta", &end) + &event("message_stop", ""))
    }

    /// The body of an answer. `asked`: the receiver has asked for the token counts of a stream.
    pub(super) fn answer(self, text: &str, asked: bool, counts: Option<Counts>) -> String {
        match self.is_stream {
            false => self.json(text, counts),
            true => {
                let asked = self.has_options() && asked;
                let counts = counts.filter(|_| asked || !self.has_options());
                let (content, behind) = self.events(text, asked, counts);
                content + &behind
            }
        }
    }
}
