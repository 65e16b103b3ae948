//! A string of the file with its place, and the strings that a message may show.

/// Longest string that a message shows, in bytes.
const MAX_SHOWN: usize = 64;
/// Beginnings of the keys that providers hand out, in lower case.
const KEY_STARTS: [&str; 17] = [
    "sk-", "sk_", "pk-", "pk_", "gsk_", "csk-", "xai-", "aiza", "hf_", "r8_", "nvapi-", "pplx-", "fw_",
    "tgp_", "ghp_", "akia", "bearer",
];
/// A run of letters and digits of this length is random text, not a word.
const RANDOM: usize = 16;
/// A run of letters alone, or digits alone, of this length is random text too.
const LONG: usize = 24;

/// Stands for a name that a message may not show.
const STAND_IN: &str = "<name>";

/// A string of the file, in which variables are expanded.
pub(super) struct Text {
    pub(super) value: String,
    /// The string as the file has it, if it has a variable: messages never show the value of a variable.
    written: Option<String>,
    /// The whole name of its place, as messages write it: `models.smart.targets[1].backend`.
    pub(super) place: String,
    pub(super) line: usize,
}

impl Text {
    /// A string; `written` holds it as the file has it, if that differs.
    pub(super) fn new(value: String, written: Option<String>, place: String, line: usize) -> Self {
        Self { value, written, place, line }
    }

    /// The string as the file has it.
    pub(super) fn written(&self) -> &str {
        self.written.as_deref().unwrap_or(&self.value)
    }

    /// Whether the string has a variable.
    pub(super) fn is_variable(&self) -> bool {
        self.written.is_some()
    }

    /// The string in quotes, if a message may show it.
    pub(super) fn shown(&self) -> Option<String> {
        quoted(self.written())
    }

    /// The first half of a message about an invalid string.
    pub(super) fn found(&self) -> String {
        match (self.shown(), self.is_variable()) {
            (Some(shown), false) => format!("is {shown}"),
            (Some(shown), true) => format!("is {shown}, whose value is not valid"),
            (None, _) => "is not valid".to_owned(),
        }
    }
}

/// Whether a message may show `text`: it could be a name, an address, a path or a word, and does not look like a key.
pub(super) fn may_show(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b" _-.,:/*+?[]()${}".contains(&byte);
    text.len() <= MAX_SHOWN && text.bytes().all(is_plain) && !is_like_a_key(text)
}

/// Whether `text` may contain a key: it has the prefix of a provider's keys, or a long run of random characters.
pub(crate) fn is_like_a_key(text: &str) -> bool {
    let begins_as_key = |part: &str| {
        let part = part.trim_start_matches('-').to_ascii_lowercase();
        KEY_STARTS.iter().any(|start| part.starts_with(start))
    };
    let is_random = |run: &str| {
        let digits = run.bytes().filter(u8::is_ascii_digit).count();
        run.len() >= LONG || run.len() >= RANDOM && (1..run.len()).contains(&digits)
    };
    text.split([' ', '/', ':', ',', '?', '=', '.', '{', '(', '[']).any(begins_as_key)
        || text.split(|c: char| !c.is_ascii_alphanumeric()).any(is_random)
}

/// A string in quotes, if a message may show it.
pub(crate) fn quoted(text: &str) -> Option<String> {
    may_show(text).then(|| format!("{text:?}"))
}

/// A name in a message, or a stand-in if a message may not show it.
pub(super) fn shown_name(text: &str) -> &str {
    if may_show(text) { text } else { STAND_IN }
}

/// One part of a place, as TOML writes it: in quotes if it is not a bare key; a stand-in if a message may not show it.
pub(super) fn key_name(text: &str) -> String {
    let is_bare = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    match !text.is_empty() && text.bytes().all(is_bare) {
        true => shown_name(text).to_owned(),
        false => quoted(text).unwrap_or_else(|| STAND_IN.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_shown_and_keys_are_not() {
        for text in [
            "",
            "random",
            "0.0.0.0",
            "gpt-4.1",
            "claude-3-5-sonnet-20241022",
            "meta-llama/Llama-3.3-70B-Instruct-Turbo",
            "accounts/fireworks/models/mixtral-8x7b-instruct",
            "https://api.example.com/v1",
            "${PORT:-8000}",
            "least loaded",
        ] {
            assert!(may_show(text), "{text}");
        }
        for text in [
            "sk-x",
            "Bearer x",
            "https://a/sk-x",
            "${A:-sk-x}",
            "gsk_x",
            "AIzaSyx",
            "0123456789abcdef",
            "deadbeefdeadbeefdeadbeef",
            "a\nb",
            "a\u{1b}b",
            "a@b",
            "a\"b",
            "\u{e4}",
            &"word ".repeat(13),
        ] {
            assert!(!may_show(text), "{text}");
        }
        for (text, part, in_quotes) in [
            ("smart", "smart", Some("\"smart\"")),
            ("gpt-4.1", "\"gpt-4.1\"", Some("\"gpt-4.1\"")),
            ("", "\"\"", Some("\"\"")),
            ("sk-x", "<name>", None),
            ("sk-x.y", "<name>", None),
        ] {
            assert_eq!((key_name(text).as_str(), quoted(text).as_deref()), (part, in_quotes), "{text}");
        }
    }
}
