//! Fuzzes the search for the token counts of a JSON answer.

use memchr::memmem;
use serde_json::Value;

use crate::protocol::body_usage::{BodyUsage, MAX_VALUE};
use crate::protocol::usage::Usage;

/// Fuzzes [`BodyUsage`]: in any chunking it finds the usage that serde_json finds. The first eight bytes are the
/// lengths of the chunks; the rest is the body.
///
/// A body that does not begin with `{` is also tried as the value of `usage`.
pub fn usage(data: &[u8]) {
    let Some((lengths, body)) = data.split_first_chunk() else { return };
    answer(lengths, body);
    if body.first() != Some(&b'{') {
        answer(lengths, &[b"{\"usage\":", body, b"}"].concat());
    }
}

fn answer(lengths: &[u8; 8], body: &[u8]) {
    let found = chunked(lengths, body);
    let whole = Usage::of_body(body);
    let Ok(json) = serde_json::from_slice::<Value>(body) else { return };
    // Only such an escape can spell a letter of the key.
    let has_escaped_letters = memmem::find(body, b"\\u00").is_some();
    if has_escaped_letters || body.len() > MAX_VALUE {
        return;
    }
    let want = json.get("usage").and_then(Usage::of_json);
    assert_eq!((whole, found), (want, want), "of the whole body, and of its chunks");
    // A body that is cut has no usage, or that of an object in it.
    let cut = usize::from(u16::from_le_bytes([lengths[0], lengths[1]])) % body.trim_ascii_end().len();
    let of_cut = chunked(lengths, &body[..cut]);
    assert!(of_cut.is_none() || written(&body[..cut]).contains(&of_cut), "cut at {cut}: {of_cut:?}");
}

/// The usage of `body` in chunks of these lengths, in turn.
fn chunked(lengths: &[u8], mut body: &[u8]) -> Option<Usage> {
    let (mut reader, mut lengths) = (BodyUsage::new(), lengths.iter().cycle());
    while !body.is_empty() {
        let length = lengths.next().map_or(1, |n| usize::from(*n)).min(body.len());
        // A length of 0 is an empty chunk, and then a chunk of one byte.
        reader.push(&body[..length]);
        let (chunk, rest) = body[length..].split_at(usize::from(length == 0));
        reader.push(chunk);
        body = rest;
    }
    reader.finish()
}

/// All values with the key `usage`, at any depth.
fn written(body: &[u8]) -> Vec<Option<Usage>> {
    let values = memmem::find_iter(body, "\"usage\"").filter_map(|at| {
        let value = body[at + 7..].trim_ascii_start().strip_prefix(b":")?;
        serde_json::Deserializer::from_slice(value).into_iter::<Value>().next()?.ok()
    });
    values.map(|value| Usage::of_json(&value)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;
    use proptest::strategy::ValueTree;

    use super::*;

    /// A string, which is often the key or has the key in its text.
    fn string() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => Just("\"usage\"".to_owned()),
            4 => select(vec![
                r#""""#, r#""x_groq""#, r#""usag""#, r#""usages""#, r#""\\""#, r#""a\\\"""#, r#""\"usage\":""#,
                r#""\"usage\\""#, r#""{""#, r#""}""#, r#""\\\"usage\":{\"prompt_tokens\":9}}""#, r#""é\n""#,
            ]).prop_map(str::to_owned),
            1 => any::<String>().prop_map(|text| Value::from(text).to_string()),
        ]
    }

    fn space() -> impl Strategy<Value = &'static str> {
        prop_oneof![6 => Just(""), 1 => select(vec![" ", "\n", "\t ", "\r\n"])]
    }

    /// A usage, with all that may stand in one.
    fn counts() -> impl Strategy<Value = String> {
        let key = select(vec![
            "prompt_tokens",
            "prompt_tokens",
            "completion_tokens",
            "completion_tokens",
            "input_tokens",
            "output_tokens",
            "total_tokens",
            "cached_tokens",
            "prompt_cache_hit_tokens",
            "cache_read_input_tokens",
            "cache_creation_input_tokens",
            "reasoning_tokens",
            "prompt_tokens_details",
            "input_tokens_details",
            "completion_tokens_details",
            "output_tokens_details",
            "usage",
            "a",
            "b\\\"",
            "\\\\",
        ]);
        let value = prop_oneof![
            6 => (0u64..100).prop_map(|n| n.to_string()),
            1 => any::<u64>().prop_map(|n| n.to_string()),
            2 => select(vec!["null", "-1", "-0", "0.5", "1e3", "18446744073709551616", "\"1\"", "true", "[]", "[1,{}]"])
                .prop_map(str::to_owned),
        ];
        let members = |value: BoxedStrategy<String>| {
            let member = (space(), key.clone(), space(), space(), value, space())
                .prop_map(|(a, key, b, c, value, d)| format!("{a}\"{key}\"{b}:{c}{value}{d}"));
            prop::collection::vec(member, 0..8).prop_map(|members| format!("{{{}}}", members.join(",")))
        };
        let details = members(value.clone().boxed()).boxed();
        members(prop_oneof![3 => value, 1 => details.clone(), 1 => members(details)].boxed())
    }

    /// An object with `usage` at any place: as a key, a value, an element or text, at any depth and repeatedly.
    fn body() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            2 => string(),
            3 => counts(),
            1 => select(vec!["null", "0", "-1.5e3", "{}", "[]", "false"]).prop_map(str::to_owned),
        ];
        let members = |value: BoxedStrategy<String>| {
            let member = (space(), string(), space(), space(), value, space())
                .prop_map(|(a, key, b, c, value, d)| format!("{a}{key}{b}:{c}{value}{d}"));
            prop::collection::vec(member, 0..4)
        };
        let object = |members: Vec<String>| format!("{{{}}}", members.join(","));
        let value = leaf
            .prop_recursive(4, 24, 4, move |inner| {
                let array = prop::collection::vec((space(), inner.clone(), space()), 0..4);
                let array = array.prop_map(|elements| {
                    let elements: Vec<_> =
                        elements.iter().map(|(a, value, b)| format!("{a}{value}{b}")).collect();
                    format!("[{}]", elements.join(","))
                });
                prop_oneof![array, members(inner.boxed()).prop_map(object)]
            })
            .boxed();
        // Most bodies have a usage among the other members of the top level.
        let answer = (members(value.clone()), counts(), any::<prop::sample::Index>());
        let answer = answer.prop_map(move |(mut members, counts, place)| {
            members
                .insert(place.index(2 * members.len() + 2).min(members.len()), format!("\"usage\":{counts}"));
            object(members)
        });
        let top = prop_oneof![6 => answer, 2 => members(value.clone()).prop_map(object), 1 => value];
        (space(), top, space()).prop_map(|(a, top, b)| format!("{a}{top}{b}"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn usage_is_found_where_serde_json_finds_it(
            lengths in prop_oneof![prop::array::uniform8(0u8..12), any::<[u8; 8]>()],
            body in body(),
        ) {
            prop_assert!(serde_json::from_str::<Value>(&body).is_ok(), "{body}");
            usage(&[&lengths[..], body.as_bytes()].concat());
        }
    }

    #[test]
    fn the_generated_bodies_have_a_usage_in_many_cases() {
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let mut found = 0;
        for _ in 0..300 {
            let body = body().new_tree(&mut runner).unwrap().current();
            found += usize::from(Usage::of_body(body.as_bytes()).is_some());
        }
        assert!((50..250).contains(&found), "{found} of 300");
    }
}
