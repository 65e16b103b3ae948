//! What an answer says of itself, for traces: the model that made it, and why it has ended. Never its content.

use serde_json::Value;

use crate::protocol::endpoint::StreamFormat;

/// Longest name or reason that is kept, in bytes.
const MAX_TEXT: usize = 128;

/// Most reasons: an answer may have several choices.
const MAX_REASONS: usize = 8;

/// Longest body that is read, in bytes.
pub(crate) const MAX_BODY: usize = 64 * 1024;

/// What an answer says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AnswerNotes {
    /// The model that made the answer, as the provider calls it.
    pub model: Option<Box<str>>,
    /// Why the model has stopped, once for each choice.
    pub finish_reasons: Vec<Box<str>>,
}

impl AnswerNotes {
    /// Reads a whole JSON body, in any dialect. A body longer than [`MAX_BODY`] says nothing.
    pub(crate) fn of_body(body: &[u8]) -> Self {
        let mut notes = AnswerNotes::default();
        if body.len() <= MAX_BODY
            && let Ok(json) = serde_json::from_slice::<Value>(body)
        {
            notes.read(&json);
        }
        notes
    }

    /// Reads the data of an event.
    pub(crate) fn read_event(&mut self, format: StreamFormat, json: &Value) {
        match format {
            StreamFormat::Done | StreamFormat::Plain => self.read(json),
            StreamFormat::Messages if json["message"].is_object() => self.read(&json["message"]),
            StreamFormat::Messages => self.read(&json["delta"]),
            StreamFormat::Responses => self.read(&json["response"]),
        }
    }

    /// Reads an answer, or the part of it that an event has.
    fn read(&mut self, json: &Value) {
        if self.model.is_none() {
            self.model =
                json["model"].as_str().filter(|model| !model.is_empty()).map(|model| cut(model).into());
        }
        let choices = json["choices"].as_array().into_iter().flatten().map(|choice| &choice["finish_reason"]);
        let of_response = match json["status"].as_str() {
            // `/v1/responses` names a reason only if the answer is not whole.
            Some("incomplete") => &json["incomplete_details"]["reason"],
            Some("completed" | "failed" | "cancelled") => &json["status"],
            _ => &Value::Null,
        };
        for reason in choices.chain([&json["stop_reason"], of_response]) {
            if let Some(reason) = reason.as_str().filter(|reason| !reason.is_empty())
                && self.finish_reasons.len() < MAX_REASONS
            {
                self.finish_reasons.push(cut(reason).into());
            }
        }
    }
}

fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MAX_TEXT)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(notes: &AnswerNotes) -> (Option<&str>, Vec<&str>) {
        (notes.model.as_deref(), notes.finish_reasons.iter().map(|reason| &**reason).collect())
    }

    #[test]
    fn a_body_of_each_dialect_is_read() {
        for (body, model, reasons) in [
            (
                json!({"model": "m", "choices": [{"finish_reason": "stop"}, {"finish_reason": "length"}]}),
                Some("m"),
                &["stop", "length"][..],
            ),
            (json!({"model": "m", "stop_reason": "end_turn", "content": []}), Some("m"), &["end_turn"]),
            (json!({"model": "m", "status": "completed"}), Some("m"), &["completed"]),
            (
                json!({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}),
                None,
                &["max_output_tokens"],
            ),
            (json!({"choices": [{"finish_reason": null}], "model": ""}), None, &[]),
            (json!([1]), None, &[]),
            (json!({"choices": 1, "model": 1, "stop_reason": {}}), None, &[]),
        ] {
            let notes = AnswerNotes::of_body(body.to_string().as_bytes());
            assert_eq!(found(&notes), (model, reasons.to_vec()), "{body}");
        }
        assert_eq!(AnswerNotes::of_body(b"{"), AnswerNotes::default());
        let long = json!({"model": "m", "x": "y".repeat(MAX_BODY)}).to_string();
        assert_eq!(AnswerNotes::of_body(long.as_bytes()), AnswerNotes::default());
    }

    #[test]
    fn the_events_of_a_stream_add_up_and_are_bounded() {
        let mut notes = AnswerNotes::default();
        for event in [
            json!({"type": "message_start", "message": {"model": "m", "stop_reason": null}}),
            json!({"delta": {"stop_reason": "end_turn"}}),
        ] {
            notes.read_event(StreamFormat::Messages, &event);
        }
        assert_eq!(found(&notes), (Some("m"), vec!["end_turn"]));
        let mut notes = AnswerNotes::default();
        let event =
            json!({"model": "\u{e9}".repeat(MAX_TEXT), "choices": [{"finish_reason": "x".repeat(1000)}]});
        (0..100).for_each(|_| notes.read_event(StreamFormat::Done, &event));
        assert_eq!(notes.model.unwrap().len(), MAX_TEXT);
        assert_eq!((notes.finish_reasons.len(), notes.finish_reasons[0].len()), (MAX_REASONS, MAX_TEXT));
    }
}
