//! Token counts, as providers report them.

use std::sync::LazyLock;

use memchr::memchr2_iter;
use memchr::memmem::Finder;
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

/// The members of an answer that hold text of the model.
static TEXTS: LazyLock<[Finder<'static>; 4]> = LazyLock::new(|| {
    ["\"content\":", "\"reasoning_content\":", "\"text\":", "\"arguments\":"].map(Finder::new)
});

/// The length of the text of the model in the body of an answer, in bytes as it is spelled: of all strings that are members
/// with the usual names, wherever they stand.
pub(crate) fn answer_text(body: &[u8]) -> u64 {
    let length = |finder: &Finder<'_>, at: usize| {
        let value = body[at + finder.needle().len()..].trim_ascii_start().strip_prefix(b"\"")?;
        let mut ends = memchr2_iter(b'"', b'\\', value);
        let mut escaped = None;
        ends.find(|at| {
            let is_escaped = escaped == Some(*at);
            escaped = Some(at + 1).filter(|_| value[*at] == b'\\' && !is_escaped);
            value[*at] == b'"' && !is_escaped
        })
    };
    let of_member =
        |finder: &Finder<'_>| -> usize { finder.find_iter(body).filter_map(|at| length(finder, at)).sum() };
    TEXTS.iter().map(of_member).sum::<usize>() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_the_text_of_an_answer() {
        for (body, want) in [
            (r#"{"choices":[{"message":{"role":"assistant","content":"four"}}]}"#, 4),
            (
                r#"{"choices":[{"message":{"content": "a\"b\\", "refusal":null}},{"message":{"content":"x"}}]}"#,
                7,
            ),
            (r#"{"output":[{"content":[{"type":"output_text","text":"abc"}]}]}"#, 3),
            (
                r#"{"choices":[{"message":{"content":null,"tool_calls":[{"function":{"arguments":"{\"a\":1}"}}]}}]}"#,
                9,
            ),
            (r#"{"content":"no end"#, 0),
            ("", 0),
        ] {
            assert_eq!(answer_text(body.as_bytes()), want, "{body}");
        }
    }
}
