//! Reads a `usage` object that is written as providers usually write it, in a fraction of the instructions of a JSON
//! parser.
//!
//! If the object is written in another way, the caller must parse it. Whether the text is valid JSON is not checked.

use crate::protocol::usage::{Count, Member, UsageParts};

/// Reads the object at the start of `text`, if there is one, and returns its length too. `None` if the object is not
/// whole, or is none that providers usually write: it has an escape, an array, or an object within the details.
pub(crate) fn plain_parts(text: &[u8]) -> Option<(UsageParts, usize)> {
    if *text.first()? != b'{' {
        return None;
    }
    let (mut parts, mut at) = (UsageParts::default(), 1);
    loop {
        let key = match next(text, at)? {
            Next::Key(start) => start,
            Next::End(end) => return Some((parts, end)),
        };
        let (member, value_start) = member(text, key)?;
        let (value, end) = match text.get(value_start)? {
            b'{' => plain_details(text, value_start, member)?,
            _ => {
                let (value, end) = scalar(text, value_start)?;
                (value.filter(|_| matches!(member, Some(Member::Count(_)))), end)
            }
        };
        at = end;
        // The last of several values counts, even if it is no number.
        if let Some(Member::Count(count) | Member::Details(count)) = member {
            parts.set(count, value);
        }
    }
}

/// Reads the object at `at`, which is the value of `member`. Returns the count that the object has for it, and its end.
fn plain_details(text: &[u8], at: usize, member: Option<Member>) -> Option<(Option<u64>, usize)> {
    let wanted = match member {
        Some(Member::Details(count)) => Some(count.key().as_bytes()),
        _ => None,
    };
    let (mut count, mut at) = (None, at + 1);
    loop {
        let start = match next(text, at)? {
            Next::Key(start) => start,
            Next::End(end) => return Some((count, end)),
        };
        let key = string(&text[start..])?;
        let (value, end) = scalar(text, value_start(text, start + key.len() + 1)?)?;
        at = end;
        if Some(key) == wanted {
            count = value;
        }
    }
}

/// What comes next in an object.
enum Next {
    /// A member, whose key begins here, behind its quote.
    Key(usize),
    /// The brace that ends the object, before this index.
    End(usize),
}

/// Returns what comes after a brace, or after a value that ends at `at`.
#[inline(always)]
fn next(text: &[u8], mut at: usize) -> Option<Next> {
    loop {
        match text.get(at)? {
            b'"' => return Some(Next::Key(at + 1)),
            b'}' => return Some(Next::End(at + 1)),
            b',' | b' ' | b'\t' | b'\r' | b'\n' => at += 1,
            _ => return None,
        }
    }
}

/// Returns the member with the key at `at`, behind its quote, and the index of the member's value. The commonest keys
/// are compared without a search for their end.
#[inline(always)]
fn member(text: &[u8], at: usize) -> Option<(Option<Member>, usize)> {
    let rest = text.get(at..)?;
    let is = |key: &[u8]| rest.starts_with(key);
    let (count, length) = match rest.first()? {
        b'p' if is(b"prompt_tokens\"") => (Count::Prompt, 13),
        b'c' if is(b"completion_tokens\"") => (Count::Completion, 17),
        b't' if is(b"total_tokens\"") => (Count::Total, 12),
        b'i' if is(b"input_tokens\"") => (Count::Input, 12),
        b'o' if is(b"output_tokens\"") => (Count::Output, 13),
        _ => {
            let key = string(rest)?;
            return Some((Member::of(key), value_start(text, at + key.len() + 1)?));
        }
    };
    Some((Some(Member::Count(count)), value_start(text, at + length + 1)?))
}

/// Returns the index of the value that follows a key, whose closing quote is before `at`.
#[inline(always)]
fn value_start(text: &[u8], at: usize) -> Option<usize> {
    let colon = skip_space(text, at);
    (*text.get(colon)? == b':').then(|| skip_space(text, colon + 1))
}

/// Returns the string at the start of `text`, behind its first quote; `None` if it has an escape or does not end.
#[inline(always)]
fn string(text: &[u8]) -> Option<&[u8]> {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    // The lowest bit that is set belongs to the first byte that is `b`.
    let bytes = |word: u64, b: u8| {
        let other = word ^ (ONES * u64::from(b));
        other.wrapping_sub(ONES) & !other & (ONES << 7)
    };
    let mut at = 0;
    // Most strings are so short that a call of `memchr2` takes longer.
    let end = loop {
        let Some(word) = text.get(at..)?.first_chunk() else {
            break at + text[at..].iter().position(|b| matches!(b, b'"' | b'\\'))?;
        };
        let word = u64::from_le_bytes(*word);
        match bytes(word, b'"') | bytes(word, b'\\') {
            0 => at += 8,
            found => break at + found.trailing_zeros() as usize / 8,
        }
    };
    (text[end] == b'"').then(|| &text[..end])
}

/// Returns the value at `at`, if it is a count, and its end. `None` if the value is an array or an object, is not
/// whole, or has so many digits that it may be too large.
#[inline(always)]
fn scalar(text: &[u8], at: usize) -> Option<(Option<u64>, usize)> {
    let (mut count, mut end) = (0_u64, at);
    loop {
        let b = *text.get(end)?;
        let digit = b.wrapping_sub(b'0');
        if digit > 9 {
            break;
        }
        count = count.wrapping_mul(10).wrapping_add(u64::from(digit));
        end += 1;
    }
    match text[end] {
        b',' | b'}' | b' ' | b'\t' | b'\r' | b'\n' if (1..20).contains(&(end - at)) => {
            Some((Some(count), end))
        }
        b'"' => Some((None, end + 2 + string(&text[end + 1..])?.len())),
        b'[' | b'{' => None,
        // A fraction, an exponent, a sign, or a word.
        _ => {
            let is_end = |b: &u8| matches!(b, b',' | b'}' | b' ' | b'\t' | b'\r' | b'\n');
            let length = text[end..].iter().position(is_end)?;
            if length == 0 { None } else { Some((None, end + length)) }
        }
    }
}

/// Returns the index, from `at` on, of the first byte that is no white space.
#[inline(always)]
pub(crate) fn skip_space(text: &[u8], mut at: usize) -> usize {
    while let Some(b) = text.get(at)
        && *b <= b' '
        && matches!(b, b' ' | b'\t' | b'\r' | b'\n')
    {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_providers_write_is_read_without_a_parser() {
        let usage = json!({
            "prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29, "total_time": 0.25,
            "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 4, "audio_tokens": null},
            "cache_creation": {"ephemeral_5m_input_tokens": 0}, "service_tier": "standard",
            "output_tokens_details": null,
        });
        for text in [usage.to_string(), format!("{usage:#}")] {
            let (parts, length) = plain_parts(format!("{text},").as_bytes()).unwrap();
            assert_eq!((parts, length), (UsageParts::of_json(&usage), text.len()));
            for cut in 1..text.len() {
                assert_eq!(plain_parts(&text.as_bytes()[..cut]), None, "{}", &text[..cut]);
            }
        }
    }

    #[test]
    fn what_needs_a_parser_is_left_to_one() {
        for text in [
            r#"{"prompt\u005ftokens":1}"#,
            r#"{"a":"\\","prompt_tokens":1}"#,
            r#"{"prompt_tokens":1,"a":[]}"#,
            r#"{"prompt_tokens":1,"prompt_tokens_details":{"a":{}}}"#,
            r#"{"prompt_tokens":18446744073709551615}"#,
            r#"{"prompt_tokens":}"#,
            r#"{"prompt_tokens"}"#,
            "[]",
            "null",
        ] {
            assert_eq!(plain_parts(text.as_bytes()), None, "{text}");
        }
    }
}
