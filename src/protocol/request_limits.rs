//! How many output tokens a request allows.

use serde_json::{Map, Value};

/// The members that limit the output tokens of one choice, in any dialect.
const LIMITS: [&str; 3] = ["max_tokens", "max_completion_tokens", "max_output_tokens"];

/// The members that say how many choices are generated.
const CHOICES: [&str; 2] = ["n", "best_of"];

/// Longest member that is read, in bytes. A longer one counts as not set.
const MAX_MEMBER: usize = 128;

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

#[cfg(test)]
mod tests {
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
}
