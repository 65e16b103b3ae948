//! Suggestions for unknown keys.

use crate::policy::near::distance;

/// Whether a message may show `text`: at most 40 bytes of `a-z` and `_` look like a word of the configuration, anything
/// else could be a misplaced secret.
pub(super) fn is_harmless(text: &str) -> bool {
    text.len() <= 40 && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
}

/// The known key that `written` most likely stands for, if any is near enough.
pub(super) fn nearest<'k>(written: &str, known: &[&'k str]) -> Option<&'k str> {
    if !(2..=40).contains(&written.len()) {
        return None;
    }
    let written = written.to_lowercase().replace('-', "_");
    let begins = |key: &&&str| written.len() >= 4 && key.starts_with(&written);
    known
        .iter()
        .map(|key| (distance(&written, key), key))
        .filter(|(distance, key)| *distance <= key.len().max(written.len()).div_ceil(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, key)| key)
        .or_else(|| known.iter().find(begins))
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelled_keys_get_a_suggestion() {
        let known = ["max_size", "max_in_flight", "timeout_secs", "url"];
        for (written, expected) in [
            ("max_sise", Some("max_size")),
            ("maxsize", Some("max_size")),
            ("Max-Size", Some("max_size")),
            ("timeout", Some("timeout_secs")),
            ("uri", Some("url")),
            ("x", None),
            ("colour", None),
            ("sk-CANARY", None),
        ] {
            assert_eq!(nearest(written, &known), expected, "{written}");
        }
    }
}
