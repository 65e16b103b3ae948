//! Finds a member of a JSON object whose value is null, and measures strings.

use std::ops::Range;

/// Where a member whose value is null stands, in bytes from the beginning of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NullMember {
    /// The value.
    pub value: Range<usize>,
    /// The whole member, with the comma before it, or without one before it, the comma behind it.
    pub member: Range<usize>,
}

/// Finds the member `name` of the object that begins in `text` at `from` or later. The object is valid JSON; the key is
/// known by its plain spelling. `None` if there is no such member, or its value is not null.
pub(crate) fn find_null(text: &[u8], from: usize, name: &[u8]) -> Option<NullMember> {
    let skip_space = |at: usize| at + text[at..].iter().take_while(|b| b.is_ascii_whitespace()).count();
    let (mut at, mut depth, mut comma) = (from, 0u32, None);
    loop {
        match text.get(at)? {
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth == 1 => return None,
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' if depth == 1 => comma = Some(at),
            b'"' => {
                let (start, length) = (at, measure_string(&text[at + 1..])?.0);
                at += length + 1;
                let colon = skip_space(at + 1);
                if depth == 1 && &text[start + 1..at] == name && text.get(colon) == Some(&b':') {
                    let value = skip_space(colon + 1);
                    if !text[value..].starts_with(b"null") {
                        return None;
                    }
                    let value = value..value + b"null".len();
                    let next = skip_space(value.end);
                    let member = match comma {
                        Some(comma) => comma..value.end,
                        None if text.get(next) == Some(&b',') => start..next + 1,
                        None => start..value.end,
                    };
                    return Some(NullMember { value, member });
                }
            }
            _ => {}
        }
        at += 1;
    }
}

/// The length of a string up to its closing quote, as it is spelled and as it is decoded to UTF-8, in bytes; `None` if
/// it has no end, or a control character. The escapes are valid.
pub(crate) fn measure_string(text: &[u8]) -> Option<(usize, usize)> {
    let (mut at, mut saved) = (0, 0);
    loop {
        match text.get(at)? {
            b'"' => return Some((at, at - saved)),
            b'\\' => {
                let (spelled, decoded) = measure_escape(&text[at + 1..]);
                (at, saved) = (at + spelled, saved + spelled - decoded);
            }
            0..0x20 => return None,
            _ => at += 1,
        }
    }
}

/// The length of an escape, whose text behind the backslash is given, and that of its character in UTF-8. A surrogate
/// is half of a character of four bytes.
fn measure_escape(text: &[u8]) -> (usize, usize) {
    match text {
        [b'u', b'0', b'0', b'0'..=b'7', ..] => (6, 1),
        [b'u', b'0', b'0'..=b'7', ..] => (6, 2),
        [b'u', b'd' | b'D', b'8'..=b'9' | b'a'..=b'f' | b'A'..=b'F', ..] => (6, 2),
        [b'u', ..] => (6, 3),
        _ => (2, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_member_that_is_null_with_the_comma_that_goes_with_it() {
        for (text, want) in [
            (r#"{"usage":null}"#, Some(r#"{}"#)),
            (r#"{"usage":null,"a":1}"#, Some(r#"{"a":1}"#)),
            (r#"{"usage" : null , "a":1}"#, Some(r#"{ "a":1}"#)),
            (r#"{"a":1,"usage":null}"#, Some(r#"{"a":1}"#)),
            (
                r#"data: {"a":[{"usage":null}], "usage": null,"b":2}"#,
                Some(r#"data: {"a":[{"usage":null}],"b":2}"#),
            ),
            (r#"{"a":"usage","b":"\"usage\":null"}"#, None),
            (r#"{"usage":{"a":null}}"#, None),
            (r#"{"a":{"usage":null}}"#, None),
            (r#"{"usages":null}"#, None),
            (r#"{"a":1}{"usage":null}"#, None),
            (r#"{"usage""#, None),
            ("", None),
        ] {
            let found = find_null(text.as_bytes(), 0, b"usage");
            let left = found.map(|found| {
                assert_eq!(&text[found.value], "null");
                [&text[..found.member.start], &text[found.member.end..]].concat()
            });
            assert_eq!(left.as_deref(), want, "{text}");
        }
    }

    #[test]
    fn a_string_is_measured_as_json_decodes_it() {
        for text in [
            "",
            "plain",
            "é中😀",
            r#"a\"b\\\n\/"#,
            r"\u0041\u007f\u0080\u00e9\u07ff\u0800\u4f60\ud7ff\uE000\uffff",
            r"\ud83d\ude00\uD83D\uDE00",
        ] {
            let spelled = format!("{text}\"rest");
            let decoded: String = serde_json::from_str(&format!("\"{text}\"")).unwrap();
            assert_eq!(measure_string(spelled.as_bytes()), Some((text.len(), decoded.len())), "{text}");
        }
        for text in ["no end", "a\nb\"", "\\\"", "\\", "\\u00"] {
            assert_eq!(measure_string(text.as_bytes()), None, "{text}");
        }
    }
}
