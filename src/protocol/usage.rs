//! Token counts, as providers report them.
//!
//! | dialect | input | cached input | output |
//! |---|---|---|---|
//! | OpenAI chat, completions, embeddings | `prompt_tokens` | `prompt_tokens_details.cached_tokens` | `completion_tokens` |
//! | OpenAI responses, images | `input_tokens` | `input_tokens_details.cached_tokens` | `output_tokens` |
//! | DeepSeek | `prompt_tokens` | `prompt_cache_hit_tokens` | `completion_tokens` |
//! | Anthropic | `input_tokens` and both cache counts | `cache_read_input_tokens` | `output_tokens` |
//! | rerank | `total_tokens` | | |
//!
//! A count is an integer from 0 to 2^40. Anything else in its place, such as `null`, `-1`, `1.0` or `"1"`, is
//! ignored.

use serde_json::Value;

/// The token counts of one answer, in any dialect.
///
/// `cached + cache_write <= input` and `reasoning <= output`: a larger part is reduced to what the whole leaves.
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
    /// Reads a `usage` object; `None` if it has neither an input, an output nor a total count.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn of_json(usage: &Value) -> Option<Usage> {
        UsageParts::of_json(usage).usage()
    }

    /// The input and the output tokens.
    pub(crate) fn total(&self) -> u64 {
        self.input.saturating_add(self.output)
    }
}

/// Largest count that is believed. Providers have sent negative numbers as huge ones.
const MAX_COUNT: u64 = 1 << 40;

/// A count that a `usage` object may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    Prompt,
    Completion,
    Input,
    Output,
    Total,
    CacheHit,
    CacheRead,
    CacheCreation,
    PromptCached,
    InputCached,
    CompletionReasoning,
    OutputReasoning,
}

impl Count {
    const ALL: [Count; 12] = [
        Count::Prompt,
        Count::Completion,
        Count::Input,
        Count::Output,
        Count::Total,
        Count::CacheHit,
        Count::CacheRead,
        Count::CacheCreation,
        Count::PromptCached,
        Count::InputCached,
        Count::CompletionReasoning,
        Count::OutputReasoning,
    ];

    /// The key of the count in its object.
    #[inline]
    pub(crate) fn key(self) -> &'static str {
        match self {
            Count::Prompt => "prompt_tokens",
            Count::Completion => "completion_tokens",
            Count::Input => "input_tokens",
            Count::Output => "output_tokens",
            Count::Total => "total_tokens",
            Count::CacheHit => "prompt_cache_hit_tokens",
            Count::CacheRead => "cache_read_input_tokens",
            Count::CacheCreation => "cache_creation_input_tokens",
            Count::PromptCached | Count::InputCached => "cached_tokens",
            Count::CompletionReasoning | Count::OutputReasoning => "reasoning_tokens",
        }
    }
}

/// A member of a `usage` object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Member {
    Count(Count),
    /// An object that may have this count.
    Details(Count),
}

impl Member {
    /// The member with this key; `None` if it says nothing of the counts.
    pub(crate) fn of(key: &[u8]) -> Option<Member> {
        Some(match key {
            b"prompt_tokens" => Member::Count(Count::Prompt),
            b"completion_tokens" => Member::Count(Count::Completion),
            b"input_tokens" => Member::Count(Count::Input),
            b"output_tokens" => Member::Count(Count::Output),
            b"total_tokens" => Member::Count(Count::Total),
            b"prompt_cache_hit_tokens" => Member::Count(Count::CacheHit),
            b"cache_read_input_tokens" => Member::Count(Count::CacheRead),
            b"cache_creation_input_tokens" => Member::Count(Count::CacheCreation),
            b"prompt_tokens_details" => Member::Details(Count::PromptCached),
            b"input_tokens_details" => Member::Details(Count::InputCached),
            b"completion_tokens_details" => Member::Details(Count::CompletionReasoning),
            b"output_tokens_details" => Member::Details(Count::OutputReasoning),
            _ => return None,
        })
    }
}

/// The counts of one `usage` object as they are written. Unlike a [`Usage`], they say which counts are present.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UsageParts {
    counts: [Option<u64>; Count::ALL.len()],
}

impl UsageParts {
    /// Reads a `usage` object. Any other value has no counts.
    pub(crate) fn of_json(usage: &Value) -> UsageParts {
        let mut parts = UsageParts::default();
        for (key, value) in usage.as_object().into_iter().flatten() {
            match Member::of(key.as_bytes()) {
                Some(Member::Count(count)) => parts.set(count, value.as_u64()),
                Some(Member::Details(count)) => parts.set(count, value[count.key()].as_u64()),
                None => {}
            }
        }
        parts
    }

    /// Reads a `usage` object; `None` if it has neither an input, an output nor a total count.
    pub(crate) fn of_usage(usage: &Value) -> Option<UsageParts> {
        // Most events have none.
        usage.as_object()?;
        Self::of_json(usage).if_usage()
    }

    /// The counts, if they are a [usage](Self::usage).
    pub(crate) fn if_usage(self) -> Option<UsageParts> {
        self.usage().is_some().then_some(self)
    }

    /// The counts as a [`Usage`]; `None` if there is neither an input, an output nor a total count.
    pub(crate) fn usage(&self) -> Option<Usage> {
        let count = |count| self.get(count);
        let output = count(Count::Completion).or(count(Count::Output));
        let prompt = count(Count::Prompt);
        let (read, written) = (count(Count::CacheRead), count(Count::CacheCreation));
        let cached = count(Count::PromptCached)
            .or(count(Count::InputCached))
            .or(count(Count::CacheHit))
            .or(read)
            .unwrap_or(0);
        let written = written.unwrap_or(0);
        let input = match (prompt, count(Count::Input)) {
            (None, None) if output.is_none() => {
                return Some(Usage { input: count(Count::Total)?, ..Usage::default() });
            }
            (Some(prompt), _) => prompt,
            // OpenAI's `input_tokens` has the cached tokens of its details.
            (None, Some(input)) if count(Count::InputCached).is_some() => input,
            // Anthropic's has not, nor those that are written to the cache. `prompt_tokens` has both: proxies that
            // translate an Anthropic answer add them up and leave Anthropic's counts beside the sum.
            (None, input) => input.unwrap_or(0).saturating_add(read.unwrap_or(0)).saturating_add(written),
        };
        let output = output.unwrap_or(0);
        let reasoning = count(Count::CompletionReasoning).or(count(Count::OutputReasoning)).unwrap_or(0);
        let cached = cached.min(input);
        Some(Usage {
            input,
            cached,
            cache_write: written.min(input - cached),
            output,
            reasoning: reasoning.min(output),
        })
    }

    /// Takes the counts that `later`, a later object of the same answer, has. Its counts are those of the whole answer.
    pub(crate) fn update(&mut self, later: &UsageParts) {
        for count in Count::ALL {
            if let Some(value) = later.get(count) {
                self.set(count, Some(value));
            }
        }
    }

    /// Sets or clears a count.
    pub(crate) fn set(&mut self, count: Count, value: Option<u64>) {
        self.counts[count as usize] = value;
    }

    fn get(&self, count: Count) -> Option<u64> {
        self.counts[count as usize].filter(|count| *count <= MAX_COUNT)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn usage(input: u64, cached: u64, cache_write: u64, output: u64, reasoning: u64) -> Option<Usage> {
        Some(Usage { input, cached, cache_write, output, reasoning })
    }

    #[test]
    fn every_dialect_becomes_one_record() {
        for (name, json, want) in [
            (
                "OpenAI chat",
                json!({
                    "prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29,
                    "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
                    "completion_tokens_details": {"reasoning_tokens": 4, "accepted_prediction_tokens": 0},
                }),
                usage(19, 8, 0, 10, 4),
            ),
            ("embeddings", json!({"prompt_tokens": 8, "total_tokens": 8}), usage(8, 0, 0, 0, 0)),
            (
                "OpenAI responses",
                json!({
                    "input_tokens": 36, "input_tokens_details": {"cached_tokens": 6},
                    "output_tokens": 87, "output_tokens_details": {"reasoning_tokens": 80}, "total_tokens": 123,
                }),
                usage(36, 6, 0, 87, 80),
            ),
            (
                "images",
                json!({
                    "total_tokens": 100, "input_tokens": 50, "output_tokens": 50,
                    "input_tokens_details": {"text_tokens": 10, "image_tokens": 40},
                }),
                usage(50, 0, 0, 50, 0),
            ),
            (
                "DeepSeek",
                json!({
                    "prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25,
                    "prompt_cache_hit_tokens": 12, "prompt_cache_miss_tokens": 8,
                }),
                usage(20, 12, 0, 5, 0),
            ),
            (
                "Anthropic",
                json!({
                    "input_tokens": 10, "cache_creation_input_tokens": 200, "cache_read_input_tokens": 3000,
                    "cache_creation": {"ephemeral_5m_input_tokens": 200}, "output_tokens": 7,
                    "service_tier": "standard",
                }),
                usage(3210, 3000, 200, 7, 0),
            ),
            (
                "Anthropic without a cache",
                json!({"input_tokens": 10, "output_tokens": 7}),
                usage(10, 0, 0, 7, 0),
            ),
            (
                "Anthropic behind a proxy that speaks chat",
                json!({
                    "prompt_tokens": 3210, "completion_tokens": 7, "input_tokens": 10,
                    "cache_creation_input_tokens": 200, "cache_read_input_tokens": 3000,
                }),
                usage(3210, 3000, 200, 7, 0),
            ),
            (
                "Anthropic behind a proxy that speaks responses",
                json!({
                    "input_tokens": 3210, "input_tokens_details": {"cached_tokens": 3000}, "output_tokens": 7,
                    "cache_creation_input_tokens": 200, "cache_read_input_tokens": 3000,
                }),
                usage(3210, 3000, 200, 7, 0),
            ),
            ("rerank", json!({"total_tokens": 815}), usage(815, 0, 0, 0, 0)),
            ("output only", json!({"completion_tokens": 3, "total_tokens": 9}), usage(0, 0, 0, 3, 0)),
        ] {
            assert_eq!(Usage::of_json(&json), want, "{name}");
        }
    }

    #[test]
    fn a_later_object_replaces_the_counts_that_it_has() {
        let started = json!({"input_tokens": 10, "cache_read_input_tokens": 30, "output_tokens": 1});
        for (later, want) in [
            (json!({"output_tokens": 7}), usage(40, 30, 0, 7, 0)),
            (
                json!({"input_tokens": 12, "cache_read_input_tokens": null, "output_tokens": 7}),
                usage(42, 30, 0, 7, 0),
            ),
            (json!({"cache_read_input_tokens": 0, "cache_creation_input_tokens": 5}), usage(15, 0, 5, 1, 0)),
            (json!({"output_tokens": u64::MAX}), usage(40, 30, 0, 1, 0)),
            (json!({}), usage(40, 30, 0, 1, 0)),
        ] {
            let mut parts = UsageParts::of_json(&started);
            parts.update(&UsageParts::of_json(&later));
            assert_eq!(parts.usage(), want, "{later}");
        }
    }

    #[test]
    fn what_is_no_count_is_ignored() {
        for (json, want) in [
            (
                json!({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": null}),
                usage(5, 0, 0, 2, 0),
            ),
            (
                json!({"prompt_tokens": 5, "prompt_tokens_details": [1], "cached_tokens": 9}),
                usage(5, 0, 0, 0, 0),
            ),
            (json!({"prompt_tokens": null, "input_tokens": 5}), usage(5, 0, 0, 0, 0)),
            (json!({"prompt_tokens": -1, "completion_tokens": 2}), usage(0, 0, 0, 2, 0)),
            (json!({"prompt_tokens": 1.0, "completion_tokens": "2"}), None),
            (json!({"prompt_tokens": 1e30, "total_tokens": {}}), None),
            (json!({"cache_read_input_tokens": 7}), None),
            (json!({}), None),
            (json!([1]), None),
            (json!("prompt_tokens"), None),
            (json!(null), None),
        ] {
            assert_eq!(Usage::of_json(&json), want, "{json}");
        }
    }

    #[test]
    fn a_count_that_cannot_be_is_ignored_and_a_part_is_at_most_the_whole() {
        let max = u64::MAX;
        for (json, want) in [
            (
                json!({"input_tokens": max, "cache_read_input_tokens": max, "cache_creation_input_tokens": max}),
                None,
            ),
            (json!({"prompt_tokens": 7, "completion_tokens": MAX_COUNT + 1}), usage(7, 0, 0, 0, 0)),
            (json!({"prompt_tokens": MAX_COUNT}), usage(MAX_COUNT, 0, 0, 0, 0)),
            (
                json!({"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 9},
                       "completion_tokens_details": {"reasoning_tokens": 9}}),
                usage(3, 3, 0, 1, 1),
            ),
            (
                json!({"prompt_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 9}),
                usage(5, 3, 2, 0, 0),
            ),
        ] {
            assert_eq!(Usage::of_json(&json), want, "{json}");
        }
    }
}
