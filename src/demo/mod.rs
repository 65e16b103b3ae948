//! `zap demo`: built-in mock providers, and a configuration that balances them.
//!
//! A good provider answers chat completions and responses with a text that contains its name, at once or as a stream of
//! tokens, and embeddings with a few numbers. It tells the token counts as OpenAI does. Each provider has prices.
//! [`chaos`] is a provider that fails; [`mock`] is the HTTP side of both.

mod answers;
mod chaos;
mod mock;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};

use crate::config::Config;
use crate::demo::mock::{Answer, Events, event_response, json_response};

/// A mock provider that serves every chat.
#[derive(Clone, Copy, Debug)]
struct Provider {
    /// Name of the provider; every response contains it.
    name: &'static str,
    /// Time between two tokens of a stream, and before a response that is not a stream.
    pace: Duration,
}

impl Provider {
    /// Starts the provider.
    ///
    /// # Errors
    /// Returns the error of the system if no port or no thread is available.
    fn start(self) -> io::Result<SocketAddr> {
        mock::start(self.name, move |path, request| self.answer(path, request))
    }

    async fn answer(self, path: String, request: Value) -> Answer {
        let model = request["model"].as_str().unwrap_or("mock");
        let words = self.words();
        let is_stream = request["stream"] == json!(true);
        let json = match () {
            () if path.ends_with("/embeddings") => answers::embeddings(model, &request),
            () if path.ends_with("/responses") && is_stream => {
                let events = answers::response_events(model, &request, &words);
                return Ok(event_response(Events::new(events, self.pace, false)));
            }
            () if path.ends_with("/responses") => answers::response(model, &request, &words),
            () => return self.chat(model, &request, words).await,
        };
        tokio::time::sleep(self.pace).await;
        Ok(json_response(StatusCode::OK, json.to_string()))
    }

    async fn chat(self, model: &str, chat: &Value, words: Vec<String>) -> Answer {
        let usage = usage(chat, words.len());
        if chat["stream"] == json!(true) {
            let asked = (chat["stream_options"]["include_usage"] == json!(true)).then_some(usage);
            return Ok(event_response(Events::new(events(model, words, asked), self.pace, false)));
        }
        tokio::time::sleep(self.pace).await;
        let answer = json!({
            "id": "chatcmpl-mock", "object": "chat.completion", "created": 1_700_000_000, "model": model,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": words.concat()}, "finish_reason": "stop"}],
            "usage": usage,
        });
        Ok(json_response(StatusCode::OK, answer.to_string()))
    }

    fn words(&self) -> Vec<String> {
        let text = format!(
            "Hello from the mock provider {}: every word of this line is one token of its answer.",
            self.name
        );
        text.split_inclusive(' ').map(str::to_owned).collect()
    }
}

/// The token counts of an answer: four bytes of the messages are a token, and each word of the answer.
fn usage(chat: &Value, words: usize) -> Value {
    let prompt = answers::tokens(&chat["messages"]);
    json!({"prompt_tokens": prompt, "completion_tokens": words, "total_tokens": prompt + words})
}

/// The events of a stream. With `usage`, all chunks have the member: the last one with the counts, the others with
/// null.
fn events(model: &str, words: Vec<String>, usage: Option<Value>) -> Vec<Bytes> {
    let chunk = |choices: Value, counts: &Value| {
        let mut chunk = json!({
            "id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": model,
            "choices": choices,
        });
        if usage.is_some() {
            chunk["usage"] = counts.clone();
        }
        Bytes::from(format!("data: {chunk}\n\n"))
    };
    let part = |delta: Value, finish: Value| {
        chunk(json!([{"index": 0, "delta": delta, "finish_reason": finish}]), &Value::Null)
    };
    let mut events = vec![part(json!({"role": "assistant", "content": ""}), Value::Null)];
    events.extend(words.into_iter().map(|word| part(json!({"content": word}), Value::Null)));
    events.push(part(json!({}), json!("stop")));
    events.extend(usage.iter().map(|counts| chunk(json!([]), counts)));
    events.push(Bytes::from_static(b"data: [DONE]\n\n"));
    events
}

/// The table of a backend. `name` also names the backend's model; `prices` are those of all its models.
fn backend(name: &str, address: SocketAddr, weight: u32, prices: &str) -> String {
    format!(
        "\n[[backends]]\nname = \"{name}\"\nurl = \"http://{address}\"\nweight = {weight}\ndefault_model = \"mock-{name}\"\nprices = {{ \"*\" = {{ {prices} }} }}\n"
    )
}

/// Starts the providers of `zap demo`, round robin 2:1 between two good ones. With `is_chaos` a third one fails, and
/// all weights are equal. Returns the configuration and the text to print: commands to try.
///
/// # Errors
/// Returns the error of the system if a provider cannot be started.
pub(crate) fn start(port: u16, is_chaos: bool) -> io::Result<(Config, String)> {
    // Chaos is tried with loops of curl, so the others answer soon.
    let (weight, paces) = if is_chaos { (1, [5, 5]) } else { (2, [20, 25]) };
    let [alpha, beta] = paces.map(Duration::from_millis);
    let alpha = Provider { name: "alpha", pace: alpha }.start()?;
    let beta = Provider { name: "beta", pace: beta }.start()?;
    let mut text = format!("[server]\nhost = \"127.0.0.1\"\nport = {port}\n");
    if is_chaos {
        text.push_str(chaos::SETTINGS);
        text.push_str(&backend("chaos", chaos::start(chaos::STALL)?, 1, "input = 1, output = 1"));
    }
    text.push_str(&backend("alpha", alpha, weight, "input = 0.50, cached = 0.25, output = 1.50"));
    text.push_str(&backend("beta", beta, 1, "input = 0.10, output = 0.40"));
    let config = Config::parse(&text, "demo", Path::new(""), &|_| None).map_err(io::Error::other)?;
    Ok((config, if is_chaos { chaos::introduction(port) } else { introduction(port) }))
}

fn introduction(port: u16) -> String {
    format!(
        "The page: http://127.0.0.1:{port}/\n\nZap balances two mock providers, alpha and beta, 2:1. Try:\n\n\
         \x20 curl -s http://127.0.0.1:{port}/v1/chat/completions -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"Hi\"}}]}}'\n\
         \x20 curl -sN http://127.0.0.1:{port}/v1/chat/completions -d '{{\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Hi\"}}]}}'\n\
         \x20 curl -s http://127.0.0.1:{port}/status\n\
         \x20 curl -s http://127.0.0.1:{port}/metrics\n\n\
         Tokens and cost are zap_tokens_total and zap_cost_usd_total in /metrics, and in the log below.\n\
         Press Ctrl-C to stop.\n\n"
    )
}
