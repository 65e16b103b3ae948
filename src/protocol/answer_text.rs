//! The text in the JSON body of an answer.

use std::sync::LazyLock;

use memchr::memchr2_iter;
use memchr::memmem::Finder;

/// The members of an answer that hold text of the model.
static TEXTS: LazyLock<[Finder<'static>; 4]> = LazyLock::new(|| {
    ["\"content\":", "\"text\":", "\"arguments\":", "\"reasoning_content\":"].map(Finder::new)
});

/// The length of the text of the model in the body of an answer, in bytes as it is spelled: of all strings that are
/// members with the first of the usual names that has text, wherever they stand.
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
    // Most answers have one of them only.
    TEXTS.iter().map(of_member).find(|length| *length > 0).unwrap_or(0) as u64
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
