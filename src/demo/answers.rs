//! The answers of a good provider to embeddings and to the Responses API, with the token counts that OpenAI tells.

use bytes::Bytes;
use data_encoding::BASE64;
use serde_json::{Value, json};

/// The numbers of an embedding.
const DIMENSIONS: usize = 8;

/// Tokens of a text of the request: four bytes each.
pub(super) fn tokens(text: &Value) -> usize {
    text.to_string().len().div_ceil(4)
}

/// The answer to a request for embeddings: one for each text.
pub(super) fn embeddings(model: &str, request: &Value) -> Value {
    let input = &request["input"];
    let texts = match input {
        Value::Array(texts) if texts.iter().all(|text| !text.is_number()) => texts.clone(),
        text => vec![text.clone()],
    };
    let is_base64 = request["encoding_format"] == json!("base64");
    let data: Vec<Value> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| {
            let numbers = embedding(&text.to_string());
            let embedding = match is_base64 {
                // The Python and Node SDKs ask for the bytes of the numbers, unless they are told otherwise.
                true => {
                    json!(BASE64.encode(&numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>()))
                }
                false => json!(numbers),
            };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    let prompt = tokens(input);
    json!({
        "object": "list", "data": data, "model": model,
        "usage": {"prompt_tokens": prompt, "total_tokens": prompt},
    })
}

/// Numbers of length 1 that depend on the text.
fn embedding(text: &str) -> [f32; DIMENSIONS] {
    let mut numbers = [0.0; DIMENSIONS];
    for (i, byte) in text.bytes().enumerate() {
        numbers[i % DIMENSIONS] += f32::from(byte) - 96.0;
    }
    let length = numbers.iter().map(|n| n * n).sum::<f32>().sqrt().max(1.0);
    numbers.map(|n| n / length)
}

/// The answer of the Responses API with this text.
pub(super) fn response(model: &str, request: &Value, words: &[String]) -> Value {
    let (input, output) = (tokens(&request["input"]), words.len());
    json!({
        "id": "resp_mock", "object": "response", "created_at": 1_700_000_000, "status": "completed", "model": model,
        "error": null, "incomplete_details": null, "instructions": null, "metadata": {}, "tools": [],
        "tool_choice": "auto", "parallel_tool_calls": true,
        "output": [message(&words.concat(), "completed")],
        "usage": {
            "input_tokens": input, "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": input + output,
        },
    })
}

fn message(text: &str, status: &str) -> Value {
    let content = if text.is_empty() { json!([]) } else { json!([part(text)]) };
    json!({"id": "msg_mock", "type": "message", "role": "assistant", "status": status, "content": content})
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": []})
}

/// The same as a stream: an event for each word, between those that begin and end the response.
pub(super) fn response_events(model: &str, request: &Value, words: &[String]) -> Vec<Bytes> {
    let whole = response(model, request, words);
    let mut begun = whole.clone();
    begun["status"] = json!("in_progress");
    begun["output"] = json!([]);
    begun["usage"] = Value::Null;
    let text = words.concat();
    let place = json!({"item_id": "msg_mock", "output_index": 0, "content_index": 0});
    let at = |mut more: Value| {
        for (key, value) in place.as_object().into_iter().flatten() {
            more[key] = value.clone();
        }
        more
    };
    let mut events = vec![
        ("response.created", json!({"response": begun})),
        ("response.output_item.added", json!({"output_index": 0, "item": message("", "in_progress")})),
        ("response.content_part.added", at(json!({"part": part("")}))),
    ];
    events.extend(words.iter().map(|word| ("response.output_text.delta", at(json!({"delta": word})))));
    events.extend([
        ("response.output_text.done", at(json!({"text": text}))),
        ("response.content_part.done", at(json!({"part": part(&text)}))),
        ("response.output_item.done", json!({"output_index": 0, "item": message(&text, "completed")})),
        ("response.completed", json!({"response": whole})),
    ]);
    let numbered = events.into_iter().enumerate().map(|(number, (kind, mut event))| {
        event["type"] = json!(kind);
        event["sequence_number"] = json!(number);
        Bytes::from(format!("event: {kind}\ndata: {event}\n\n"))
    });
    numbered.collect()
}
