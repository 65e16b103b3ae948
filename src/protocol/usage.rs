//! Token counts, as providers report them.

use serde_json::Value;

/// The token counts of one answer, in any dialect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// All input tokens.
    pub input: u64,
    /// Of `input`: those that the provider read from its cache.
    pub cached: u64,
    /// Of `input`: those that the provider wrote to its cache.
    pub cache_write: u64,
    /// All output tokens.
    pub output: u64,
    /// Of `output`: those of reasoning.
    pub reasoning: u64,
}

impl Usage {
    /// Reads a `usage` object; `None` if it has no token count.
    pub(crate) fn of_json(usage: &Value) -> Option<Usage> {
        let number = |keys: &[&str]| keys.iter().find_map(|key| usage[*key].as_u64());
        let detail =
            |parents: [&str; 2], key: &str| parents.iter().find_map(|parent| usage[*parent][key].as_u64());
        let (read, written) =
            (number(&["cache_read_input_tokens"]), number(&["cache_creation_input_tokens"]));
        let input = number(&["prompt_tokens", "input_tokens"]);
        let output = number(&["completion_tokens", "output_tokens"]);
        if input.is_none() && output.is_none() {
            let total = number(&["total_tokens"])?;
            return Some(Usage { input: total, ..Usage::default() });
        }
        let cached = detail(["prompt_tokens_details", "input_tokens_details"], "cached_tokens")
            .or_else(|| number(&["prompt_cache_hit_tokens"]))
            .or(read)
            .unwrap_or(0);
        // Anthropic's `input_tokens` leaves out what was read from the cache and what was written to it.
        let beside = read.unwrap_or(0).saturating_add(written.unwrap_or(0));
        let input = input.unwrap_or(0).saturating_add(beside);
        let output = output.unwrap_or(0);
        let reasoning = detail(["completion_tokens_details", "output_tokens_details"], "reasoning_tokens");
        Some(Usage {
            input,
            cached: cached.min(input),
            cache_write: written.unwrap_or(0),
            output,
            reasoning: reasoning.unwrap_or(0).min(output),
        })
    }
}

/// The length of the text of the model in the body of an answer, in bytes; 0 if it is not JSON.
pub(crate) fn answer_text(body: &[u8]) -> u64 {
    fn sum(json: &Value, is_text: bool) -> u64 {
        const TEXTS: [&str; 7] =
            ["arguments", "content", "reasoning", "reasoning_content", "refusal", "text", "thinking"];
        match json {
            Value::String(text) if is_text => text.len() as u64,
            Value::Array(list) => list.iter().map(|value| sum(value, is_text)).sum(),
            Value::Object(members) => {
                members.iter().map(|(key, value)| sum(value, TEXTS.contains(&key.as_str()))).sum()
            }
            _ => 0,
        }
    }
    serde_json::from_slice(body).map_or(0, |json| sum(&json, false))
}
