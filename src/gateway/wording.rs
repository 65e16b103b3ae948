//! Keeps words out of messages that frameworks match on, whatever the status: they take such a message for a rate limit
//! or a prompt that is too long.
//!
//! A message may repeat text of the client, the configuration or the provider. Where such text has one of the words,
//! the message goes without the text.

use std::borrow::Cow;

/// Whether a message has a word that frameworks match on.
pub(super) fn is_misleading(message: &str) -> bool {
    let message = message.to_lowercase().replace(['_', '-'], " ");
    [
        "too many requests",
        "toomanyrequests",
        "rate limit",
        "ratelimit",
        "quota",
        "429",
        "context length",
        "too long",
    ]
    .iter()
    .any(|words| message.contains(words))
}

/// `message`, or `otherwise` if `message` is misleading.
pub(super) fn unless_misleading(message: String, otherwise: &'static str) -> Cow<'static, str> {
    if is_misleading(&message) { otherwise.into() } else { message.into() }
}

/// The message for a model that is not served. `near`: similar names.
pub(super) fn model_not_found(name: &str, near: &[Box<str>]) -> String {
    let name = if is_misleading(name) { String::new() } else { format!(" `{name}`") };
    let near: Vec<&str> = near.iter().map(|near| &**near).filter(|near| !is_misleading(near)).collect();
    let near = match near.is_empty() {
        true => String::new(),
        false => format!("; near it: `{}`", near.join("`, `")),
    };
    format!("The model{name} is not served here, or not to this key{near}. GET /v1/models lists what is.")
}

/// Formats a number for a message: in hexadecimal or octal if its digits would contain `429`.
pub(super) fn format_number(n: u64) -> String {
    let spellings = [n.to_string(), format!("{n:#x}")];
    // There is no 9 in octal.
    spellings.into_iter().find(|text| !text.contains("429")).unwrap_or_else(|| format!("{n:#o}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_spelled_without_429() {
        for (n, text) in [
            (42, "42"),
            (429, "0x1ad"),
            (14_290, "0x37d2"),
            (4_294_967_296, "0x100000000"),
            (1_321_429, "0o5024725"),
        ] {
            assert_eq!(format_number(n), text);
        }
    }

    #[test]
    fn a_misleading_name_is_left_out_and_the_others_stay() {
        let near = |names: &[&str]| names.iter().map(|name| (*name).into()).collect::<Vec<Box<str>>>();
        for (name, similar, want) in [
            ("x", near(&[]), "The model `x` is not served here, or not to this key."),
            (
                "x",
                near(&["quota-x", "y", "z"]),
                "The model `x` is not served here, or not to this key; near it: `y`, `z`.",
            ),
            ("gpt-429", near(&["quota-x"]), "The model is not served here, or not to this key."),
            ("Rate-Limit", near(&["y"]), "The model is not served here, or not to this key; near it: `y`."),
        ] {
            let message = model_not_found(name, &similar);
            assert_eq!(message, format!("{want} GET /v1/models lists what is."));
        }
    }
}
