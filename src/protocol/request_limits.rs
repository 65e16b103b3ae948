//! How many output tokens a request allows, and how much text its body has.

use memchr::{memchr3, memrchr3};
use serde_json::{Map, Value};

/// The members that limit the output tokens of one choice, in any dialect.
const LIMITS: [&str; 3] = ["max_tokens", "max_completion_tokens", "max_output_tokens"];

/// The members that say how many choices are generated.
const CHOICES: [&str; 2] = ["n", "best_of"];

/// Longest member that is read, in bytes. A longer one counts as not set.
const MAX_MEMBER: usize = 128;

/// A run of so many bytes without a space, a quote or a backslash is data, such as an image in base64, and no text.
const RUN: usize = 2048;

/// A shorter body is text as a whole: it has no room for much data.
const SHORT: u64 = 16 * 1024;

/// All members that [`most_output`] reads.
pub(crate) fn members() -> impl Iterator<Item = &'static str> {
    LIMITS.into_iter().chain(CHOICES)
}

/// Whether a member limits the output tokens or says how many choices are generated.
pub(crate) fn is_member(name: &str) -> bool {
    members().any(|member| member == name)
}

/// Whether a member limits the output tokens of one choice.
pub(crate) fn is_limit(name: &str) -> bool {
    LIMITS.contains(&name)
}

/// The most output tokens of a request with these members, each from its key to its value: the smallest limit times the
/// number of choices. `None`: the request has no limit.
pub(crate) fn most_output<'a>(members: impl Iterator<Item = &'a [u8]>) -> Option<u64> {
    let (mut limit, mut choices) = (None::<u64>, 1);
    for member in members.filter(|member| member.len() <= MAX_MEMBER) {
        let object = [b"{", member, b"}"].concat();
        let Ok(object) = serde_json::from_slice::<Map<String, Value>>(&object) else { continue };
        for (name, value) in object {
            let Some(n) = count(&value) else { continue };
            if LIMITS.contains(&&*name) {
                limit = Some(limit.map_or(n, |limit| limit.min(n)));
            } else if CHOICES.contains(&&*name) {
                choices = choices.max(n);
            }
        }
    }
    limit.map(|limit| limit.saturating_mul(choices))
}

/// Reads a count. A provider may accept `1e3` and `16.0`; `null` and negative numbers set nothing.
fn count(value: &Value) -> Option<u64> {
    // A float above the range becomes the largest integer.
    value.as_u64().or_else(|| value.as_f64().filter(|n| *n >= 0.0).map(|n| n as u64))
}

/// The length of a body's text in bytes. Of each run of data, the first [`RUN`] bytes count. The search for a delimiter
/// begins at the end of a block, so that most blocks of text are not read.
pub(crate) fn text_length<'a>(length: u64, chunks: impl Iterator<Item = &'a [u8]>) -> u64 {
    if length < SHORT {
        return length;
    }
    // `run`: the bytes since the last delimiter.
    let (mut data, mut run) = (0, 0);
    let beyond = |run: usize| run.saturating_sub(RUN) as u64;
    for mut rest in chunks {
        while !rest.is_empty() {
            let block = rest.get(..RUN).unwrap_or(rest);
            let Some(last) = memrchr3(b' ', b'"', b'\\', block) else {
                run += block.len();
                rest = &rest[block.len()..];
                continue;
            };
            if run > 0 {
                data += beyond(run + memchr3(b' ', b'"', b'\\', block).unwrap_or(0));
                run = 0;
            }
            rest = &rest[last + 1..];
        }
    }
    length.saturating_sub(data + beyond(run))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_smallest_limit_counts_once_for_each_choice() {
        for (members, want) in [
            (&[][..], None),
            (&["\"max_tokens\": 10"], Some(10)),
            (&["\"max_tokens\":10", "\"max_completion_tokens\" : 7"], Some(7)),
            (&["\"max_output_tokens\":9", "\"n\":3"], Some(27)),
            (&["\"max_tokens\":9", "\"n\":2", "\"best_of\":5"], Some(45)),
            (&["\"max_tokens\":9", "\"n\":0"], Some(9)),
            (&["\"n\":3"], None),
            (&["\"max_tokens\":null"], None),
            (&["\"max_tokens\":\"9\"", "\"max_completion_tokens\":8"], Some(8)),
            (&["\"max_tokens\":-9"], None),
            (&["\"max_tokens\":1e3"], Some(1000)),
            (&["\"max_tokens\":1e300", "\"n\":2"], Some(u64::MAX)),
            (&["\"max_\\u0074okens\":5"], Some(5)),
            (&["\"max_tokens\":0"], Some(0)),
        ] {
            let read = most_output(members.iter().map(|member| member.as_bytes()));
            assert_eq!(read, want, "{members:?}");
        }
        let long = format!("\"max_tokens\":{}5", " ".repeat(MAX_MEMBER));
        assert_eq!(most_output([long.as_bytes()].into_iter()), None);
    }

    fn is_delimiter(byte: &u8) -> bool {
        matches!(byte, b' ' | b'"' | b'\\')
    }

    /// [`text_length`] of a whole body, byte by byte.
    fn naive(body: &[u8]) -> u64 {
        if (body.len() as u64) < SHORT {
            return body.len() as u64;
        }
        let runs = body.split(is_delimiter).map(|run| run.len().min(RUN) as u64).sum::<u64>();
        runs + body.iter().filter(|byte| is_delimiter(byte)).count() as u64
    }

    #[test]
    fn an_image_in_base64_is_no_text() {
        let image = "iVBORw0KGgo".repeat(100_000);
        let body =
            format!("{{\"messages\":[{{\"content\":\"what is this? data:image/png;base64,{image}\"}}]}}");
        let length = text_length(body.len() as u64, [body.as_bytes()].into_iter());
        assert!((RUN as u64..RUN as u64 + 100).contains(&length), "{length}");
        let words = "plain words ".repeat(10_000);
        assert_eq!(text_length(words.len() as u64, [words.as_bytes()].into_iter()), words.len() as u64);
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_count_in_any_chunks(
            runs in prop::collection::vec((0usize..6000, prop::sample::select(vec![b' ', b'"', b'\\'])), 0..30),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        ) {
            let mut body = Vec::new();
            for (run, delimiter) in runs {
                body.resize(body.len() + run, b'x');
                body.push(delimiter);
            }
            let length = body.len() as u64;
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
            at.extend([0, body.len()]);
            at.sort_unstable();
            let chunks = at.windows(2).map(|w| &body[w[0]..w[1]]);
            prop_assert_eq!(text_length(length, chunks), naive(&body));
        }
    }
}
