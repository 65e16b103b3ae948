//! Suggestions for unknown keys.

use crate::config::aliases;
use crate::policy::near::distance;

/// Suggests the key that an unknown key stands for, or lists all keys. `kind` is its table, as the manual writes it.
pub(super) fn hint(kind: &str, written: &str, known: &[&str]) -> String {
    if let Some(meant) = aliases::meaning(kind, written) {
        return match meant.contains(' ') {
            true => meant.to_owned(),
            false => format!("did you mean `{meant}`?"),
        };
    }
    match nearest(written, known) {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.len() == 1 => format!("must be `{}`", known.concat()),
        None => format!("must be one of `{}`", known.join("`, `")),
    }
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

    #[test]
    fn names_of_other_programs_come_before_similar_names() {
        let known = ["url", "api_key"];
        for (written, expected) in [
            ("base_url", "did you mean `url`?"),
            ("baseURL", "did you mean `url`?"),
            ("apiKey", "did you mean `api_key`?"),
            ("ulr", "did you mean `url`?"),
            ("colour", "must be one of `url`, `api_key`"),
        ] {
            assert_eq!(hint("backends", written, &known), expected, "{written}");
        }
    }
}
