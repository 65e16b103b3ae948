//! Expansion of `${NAME}` inside a value.

/// Where the values of variables come from.
pub(super) type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Replaces every `${NAME}` in `text` by the value that `env` returns, and every `${NAME:-default}` by the value, or by
/// the default if the variable is unset or empty. `$${` stands for a plain `${`. Values are not expanded again. Returns
/// `None` if there is nothing to replace.
///
/// # Errors
///
/// Returns one message per fault. The messages name variables, but contain neither their values nor `text`.
pub(super) fn expand(text: &str, env: Env<'_>) -> Result<Option<String>, Vec<String>> {
    if !text.contains("${") {
        return Ok(None);
    }
    let mut expanded = String::with_capacity(text.len());
    let mut faults = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        if let Some(before) = before.strip_suffix('$') {
            expanded.push_str(before);
            expanded.push_str("${");
            rest = after;
            continue;
        }
        expanded.push_str(before);
        let Some((name, default, tail)) = variable(after) else {
            faults.push(
                "contains a malformed `${`; must be `${NAME}` or `${NAME:-default}`, NAME of `A-Za-z0-9_` and not \
                 beginning with a digit; a plain `${` is written `$${`"
                    .into(),
            );
            return Err(faults);
        };
        match env(name).filter(|value| !value.is_empty()) {
            Some(value) if value.ends_with(['\n', '\r']) => faults.push(format!(
                "uses the environment variable `{name}`, whose value ends in a newline; \
                 must be set without it: `export {name}=\"$(cat FILE)\"` drops it"
            )),
            Some(value) => expanded.push_str(&value),
            None => match default {
                Some(default) => expanded.push_str(default),
                None => faults.push(format!(
                    "uses the environment variable `{name}`, which is unset or empty; \
                     must be set, or have a default: `${{{name}:-default}}`"
                )),
            },
        }
        rest = tail;
    }
    expanded.push_str(rest);
    if faults.is_empty() { Ok(Some(expanded)) } else { Err(faults) }
}

/// Splits what follows a `${` into the name of the variable, its default, and the text behind the `}`.
fn variable(after: &str) -> Option<(&str, Option<&str>, &str)> {
    let (inner, tail) = after.split_once('}')?;
    let (name, default) = match inner.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inner, None),
    };
    // A variable inside a default would end at the first `}`.
    let is_valid = is_variable_name(name) && default.is_none_or(|default| !default.contains("${"));
    is_valid.then_some((name, default, tail))
}

fn is_variable_name(name: &str) -> bool {
    !name.starts_with(|first: char| first.is_ascii_digit())
        && !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str) -> Option<String> {
        match name {
            "A" => Some("one".to_owned()),
            "B_2" => Some("${A}".to_owned()),
            "EMPTY" => Some(String::new()),
            "LINE" => Some("sk-CANARY\n".to_owned()),
            _ => None,
        }
    }

    #[test]
    fn variables_are_replaced_once() {
        for (text, expected) in [
            ("", None),
            ("plain $A $ {A}", None),
            ("${A}", Some("one")),
            ("x${A}y${A}z", Some("xoneyonez")),
            ("${B_2}", Some("${A}")),
            ("$${A}", Some("${A}")),
            ("$$${A}${A}", Some("$${A}one")),
            ("${NONE:-two}", Some("two")),
            ("${EMPTY:-two}", Some("two")),
            ("${A:-two}", Some("one")),
            ("a${NONE:-}b", Some("ab")),
            ("${NONE:-http://a:1/-:-x}", Some("http://a:1/-:-x")),
            ("$${", Some("${")),
        ] {
            assert_eq!(expand(text, &env), Ok(expected.map(str::to_owned)), "{text}");
        }
    }

    #[test]
    fn faults_name_the_variable_and_show_no_value() {
        for (text, count, part) in [
            ("sk-CANARY${NONE}${A}${EMPTY}", 2, "`NONE`"),
            ("sk-CANARY${", 1, "malformed"),
            ("sk-CANARY${}", 1, "malformed"),
            ("${sk-CANARY}", 1, "malformed"),
            ("${1A}", 1, "malformed"),
            ("${A", 1, "malformed"),
            ("${NONE}${A", 2, "`NONE`"),
            ("${NONE:-${A}}", 1, "malformed"),
            ("${LINE}", 1, "`LINE`, whose value ends in a newline"),
        ] {
            let faults = expand(text, &env).unwrap_err();
            assert_eq!(faults.len(), count, "{text}");
            assert!(faults[0].contains(part), "{text}: {faults:?}");
            assert!(!faults.concat().contains("CANARY"), "{faults:?}");
        }
    }
}
