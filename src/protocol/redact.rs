//! Replaces a backend's key with `***` in the backend's responses.
//!
//! The key is found verbatim and in every JSON spelling (RFC 8259, section 7), with any chunking. Valid JSON stays
//! valid: an escape is replaced as a whole, quotes stay, and digits outside a string become other digits.

use std::sync::Arc;

use bytes::Bytes;
use memchr::{memchr2_iter, memchr3};

/// Shortest key that is redacted. A shorter key is a dummy (`1`, `null`); to replace it would only damage the response.
const MIN_KEY: usize = 8;

/// Replaces one key in a byte stream. Holds back at most six bytes per byte of the key, plus one escape.
#[derive(Debug)]
pub(crate) struct Redactor {
    key: Arc<str>,
    /// Bytes held back: a possible beginning of the key.
    held: Vec<u8>,
    /// Whether `held` begins inside a JSON string, if the text is JSON.
    in_string: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Match {
    No,
    /// More bytes are needed.
    Perhaps,
    /// The key. Its spelling has this many bytes.
    Key(usize),
}

impl Redactor {
    /// Creates a redactor for `key`; `None` if the key is too short to be a secret.
    pub(crate) fn new(key: impl Into<Arc<str>> + AsRef<str>) -> Option<Self> {
        let is_secret = key.as_ref().len() >= MIN_KEY;
        is_secret.then(|| Redactor { key: key.into(), held: Vec::new(), in_string: false })
    }

    /// Whether `text` contains the key.
    pub(crate) fn is_in(&self, text: &[u8]) -> bool {
        holds_key(self.key.as_bytes(), text)
    }

    /// Reads the next chunk and returns the bytes that can be sent.
    pub(crate) fn push(&mut self, piece: &[u8]) -> Bytes {
        self.held.extend_from_slice(piece);
        self.pass(false)
    }

    /// Returns `text` without the key.
    pub(crate) fn text(mut self, text: &str) -> String {
        let begin = self.push(text.as_bytes());
        String::from_utf8_lossy(&[begin, self.finish()].concat()).into_owned()
    }

    /// Ends the stream and returns the bytes held back.
    pub(crate) fn finish(mut self) -> Bytes {
        self.flush()
    }

    /// Ends a text and returns the bytes held back. Another text may follow.
    pub(crate) fn flush(&mut self) -> Bytes {
        let rest = self.pass(true);
        self.in_string = false;
        rest
    }

    /// Bytes that are held back.
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// Returns the bytes up to a possible beginning of the key. `end`: no more bytes will follow.
    fn pass(&mut self, end: bool) -> Bytes {
        let text = std::mem::take(&mut self.held);
        let mut out = Vec::with_capacity(text.len());
        let mut at = 0;
        loop {
            // No key begins before one of these bytes, and no unit of more than one byte.
            let plain = memchr3(self.key.as_bytes()[0], b'\\', b'"', &text[at..]).unwrap_or(text.len() - at);
            out.extend_from_slice(&text[at..at + plain]);
            at += plain;
            let rest = &text[at..];
            let Some(unit) = unit(rest, self.in_string, end).filter(|_| !rest.is_empty()) else { break };
            match self.find(rest, unit, end) {
                Match::Perhaps => break,
                Match::No => {
                    self.in_string ^= rest[0] == b'"';
                    out.extend_from_slice(&rest[..unit]);
                    at += unit;
                }
                Match::Key(length) => {
                    self.mask(&rest[..length], &mut out);
                    at += length;
                }
            }
        }
        self.held = text[at..].to_vec();
        Bytes::from(out)
    }

    /// Looks for a key that begins in the first `unit_len` bytes of `text`. A match consists of whole units, since half
    /// an escape is invalid JSON.
    fn find(&self, text: &[u8], unit_len: usize, end: bool) -> Match {
        for skip in 0..unit_len {
            let key_end = match find_at(self.key.as_bytes(), &text[skip..]) {
                Match::Key(length) => skip + length,
                Match::Perhaps if !end => return Match::Perhaps,
                _ => continue,
            };
            let (mut length, mut in_string) = (0, self.in_string);
            while length < key_end {
                let Some(next) = unit(&text[length..], in_string, end) else { return Match::Perhaps };
                in_string ^= text[length] == b'"';
                length += next;
            }
            return Match::Key(length);
        }
        Match::No
    }

    /// Writes the replacement of `span`, which consists of whole units.
    fn mask(&mut self, span: &[u8], out: &mut Vec<u8>) {
        let (mut at, mut from) = (0, 0);
        while at < span.len() {
            let length = unit(&span[at..], self.in_string, true).unwrap_or(1);
            if span[at] == b'"' {
                mask_run(&span[from..at], self.in_string, out);
                out.push(b'"');
                self.in_string = !self.in_string;
                from = at + 1;
            }
            at += length;
        }
        mask_run(&span[from..], self.in_string, out);
    }
}

/// Whether a header's `value` contains `key`; false if the key is a dummy.
pub(crate) fn holds_key(key: &[u8], value: &[u8]) -> bool {
    if key.len() < MIN_KEY {
        return false;
    }
    memchr2_iter(key[0], b'\\', value).any(|at| matches!(find_at(key, &value[at..]), Match::Key(_)))
}

/// Writes the replacement of a part of a key that has no quote.
fn mask_run(run: &[u8], in_string: bool, out: &mut Vec<u8>) {
    let is_structure = |b: &u8| b.is_ascii_digit() || b"+-.eE{}[],:".contains(b);
    let exponents = run.iter().filter(|b| b.eq_ignore_ascii_case(&b'e')).count();
    if run.is_empty() {
        return;
    }
    if in_string || exponents > 1 || !run.iter().all(is_structure) {
        out.extend_from_slice(b"***");
        return;
    }
    // A number or a part of one: stars would make the JSON invalid.
    let digit = if run.iter().any(|b| (b'2'..=b'9').contains(b) || *b == b'0') { b'1' } else { b'2' };
    out.extend(run.iter().map(|b| if b.is_ascii_digit() { digit } else { *b }));
}

/// Length of the first unit of `text`: an escape in a JSON string, or one byte. `None` if more bytes are needed.
fn unit(text: &[u8], in_string: bool, end: bool) -> Option<usize> {
    let length = match (text.first(), text.get(1)) {
        (Some(b'\\'), Some(b'u')) if in_string => 6,
        (Some(b'\\'), _) if in_string => 2,
        _ => 1,
    };
    match length <= text.len() {
        true => Some(length),
        false => end.then_some(text.len()),
    }
}

/// Whether `text` begins with the key, verbatim or in a JSON spelling.
fn find_at(key: &[u8], text: &[u8]) -> Match {
    // Most texts differ in their first byte.
    if text.first().is_some_and(|b| *b != key[0] && *b != b'\\') {
        return Match::No;
    }
    let known = text.len().min(key.len());
    match (key[..known] == text[..known], spelled_at(key, text)) {
        (true, _) if known == key.len() => Match::Key(known),
        (true, Match::No) => Match::Perhaps,
        (_, spelled) => spelled,
    }
}

/// Whether `text` begins with a JSON spelling of the key.
fn spelled_at(key: &[u8], text: &[u8]) -> Match {
    let mut at = 0;
    for b in key {
        match (text.get(at), text.get(at + 1)) {
            (None, _) | (Some(b'\\'), None) => return Match::Perhaps,
            (Some(b'\\'), Some(b'u')) => {
                let hex = [
                    b'0',
                    b'0',
                    b"0123456789abcdef"[usize::from(b >> 4)],
                    b"0123456789abcdef"[usize::from(b & 15)],
                ];
                let hex_digits = &text[at + 2..text.len().min(at + 6)];
                if !hex_digits.eq_ignore_ascii_case(&hex[..hex_digits.len()]) {
                    return Match::No;
                }
                if hex_digits.len() < hex.len() {
                    return Match::Perhaps;
                }
                at += 6;
            }
            (Some(b'\\'), Some(escaped)) if escaped == b && b"\"\\/".contains(b) => at += 2,
            (Some(raw), _) if raw == b && !b"\"\\".contains(b) => at += 1,
            _ => return Match::No,
        }
    }
    Match::Key(at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn redact(key: &str, text: &[u8], size: usize) -> String {
        let mut redactor = Redactor::new(key).unwrap();
        let mut out = Vec::new();
        for piece in text.chunks(size) {
            out.extend_from_slice(&redactor.push(piece));
            assert!(redactor.held.len() <= 6 * key.len() + 6);
        }
        out.extend_from_slice(&redactor.finish());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn replaces_the_key_and_keeps_the_rest() {
        for (key, text, want) in [
            ("sk-CANARY", "bad key sk-CANARY, sk-CANAR", "bad key ***, sk-CANAR"),
            ("sk-a/b<c", r#"{"a":"sk-a\/b\u003cc"}"#, r#"{"a":"***"}"#),
            ("sk-a/b<c", r#"{"a":"sk-a\u002Fb\u003Cc"}"#, r#"{"a":"***"}"#),
            ("sk-CANARY", r#"{"a":"\u0073k-C\u0041NARY"}"#, r#"{"a":"***"}"#),
            ("sk-a\"b\\c", r#"{"a":"sk-a\"b\\c"}"#, r#"{"a":"***"}"#),
            ("nsk-CANARY", r#"{"a":"x\nsk-CANARY"}"#, r#"{"a":"x***"}"#),
            ("sk-CANARY\\", r#"{"a":"sk-CANARY\"b"}"#, r#"{"a":"***b"}"#),
            ("12345678", r#"{"a":-12345678.5,"b":"12345678"}"#, r#"{"a":-11111111.5,"b":"***"}"#),
            ("11111111", r#"[11111111]"#, r#"[22222222]"#),
            ("sk-CANARY", r#"{sk-CANARY}"#, r#"{***}"#),
            ("password", r#"{"password":"password "}"#, r#"{"***":"*** "}"#),
        ] {
            for size in [1, 2, 3, 100] {
                assert_eq!(redact(key, text.as_bytes(), size), want, "{key} {text} by {size}");
            }
        }
    }

    #[test]
    fn a_dummy_key_is_not_redacted() {
        for key in ["1", "x", "null", "1234567"] {
            assert!(Redactor::new(key).is_none(), "{key}");
        }
        let redactor = Redactor::new("sk-a/b<c").unwrap();
        assert!(redactor.is_in(br#"echo sk-a\/b<c"#) && redactor.is_in(b"sk-a/b<c"));
        assert!(!redactor.is_in(b"sk-a/b<") && !redactor.is_in(b""));
    }

    /// The content of a JSON string, with each character spelled as `how` says.
    fn spell(text: &str, how: &[u8]) -> String {
        let spell = |(i, c): (usize, char)| match (how[i % how.len()] % 4, c) {
            (0, _) => format!("\\u{:04x}", c as u32),
            (1, _) => format!("\\u{:04X}", c as u32),
            (2, '/') => "\\/".into(),
            (_, '"' | '\\') => format!("\\{c}"),
            _ => c.to_string(),
        };
        text.chars().enumerate().map(spell).collect()
    }

    fn holds(value: &Value, key: &str) -> bool {
        match value {
            Value::String(text) => text.contains(key),
            Value::Array(all) => all.iter().any(|v| holds(v, key)),
            Value::Object(all) => all.iter().any(|(k, v)| k.contains(key) || holds(v, key)),
            other => other.to_string().contains(key),
        }
    }

    proptest! {
        #[test]
        fn plain_text_loses_every_key_with_any_chunking(
            parts in prop::collection::vec("(sk-aab-x|sk-|a|b|sk-aa|x){0,5}", 0..6),
            size in 1usize..7,
        ) {
            let text = parts.concat();
            prop_assert_eq!(redact("sk-aab-x", text.as_bytes(), size), text.replace("sk-aab-x", "***"));
        }

        #[test]
        fn json_stays_json_and_loses_the_key(
            key in r#"[nu0-9a"\\/<]{8,10}"#,
            parts in prop::collection::vec(r#"[nu0-9a"\\/<é]{0,6}"#, 1..4),
            how in prop::collection::vec(0u8..8, 1..9),
            cuts in prop::collection::vec(1usize..9, 1..5),
        ) {
            let echo = spell(&parts.join(&key), &how);
            let number = key.bytes().all(|b| b.is_ascii_digit()).then(|| format!("-1{key}.{key}"));
            let text = format!(r#"{{"{echo}":["{echo}",{}],"\\":"{echo}"}}"#, number.unwrap_or("null".into()));
            prop_assert!(serde_json::from_str::<Value>(&text).is_ok(), "{}", text);
            let once = redact(&key, text.as_bytes(), text.len());
            let value: Value = serde_json::from_str(&once).map_err(|e| TestCaseError::fail(format!("{once}: {e}")))?;
            prop_assert!(!holds(&value, &key), "{}", once);
            let mut redactor = Redactor::new(key.as_str()).unwrap();
            let (mut rest, mut out, mut cuts) = (text.as_bytes(), Vec::new(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                out.extend_from_slice(&redactor.push(piece));
                rest = more;
            }
            out.extend_from_slice(&redactor.finish());
            prop_assert_eq!(String::from_utf8(out).unwrap(), once);
        }

        #[test]
        fn text_without_the_key_is_unchanged(text in r#"[sk\\u"/{}0-9]{0,40}"#, size in 1usize..9) {
            prop_assert_eq!(redact("sk-CANARY", text.as_bytes(), size), text);
        }
    }

    #[test]
    fn a_providers_error_stays_valid_json() {
        let key = "sk-\"odd\"-key";
        let body = json!({"error": {"message": format!("bad key {key}"), "code": null}}).to_string();
        let out: Value = serde_json::from_str(&redact(key, body.as_bytes(), 3)).unwrap();
        assert_eq!(out["error"]["message"], "bad key ***");
    }
}
