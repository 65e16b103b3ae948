//! Expansion of `${NAME}` inside a value.

/// Replaces every `${NAME}` in `text` by the value that `env` returns. Values are not expanded again.
///
/// # Errors
///
/// Returns one message per fault. The messages name variables, but contain neither their values nor `text`.
pub(super) fn expand(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, Vec<String>> {
    let mut expanded = String::with_capacity(text.len());
    let mut faults = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        expanded.push_str(before);
        let Some((name, tail)) = after.split_once('}').filter(|(name, _)| is_variable_name(name)) else {
            faults.push(
                "contains a malformed `${`; must be `${NAME}`, NAME of `A-Za-z0-9_` and not beginning with a digit"
                    .into(),
            );
            return Err(faults);
        };
        match env(name).filter(|value| !value.is_empty()) {
            Some(value) => expanded.push_str(&value),
            None => faults.push(format!(
                "uses the environment variable `{name}`, which is unset or empty; \
                 the variable must be set"
            )),
        }
        rest = tail;
    }
    expanded.push_str(rest);
    if faults.is_empty() { Ok(expanded) } else { Err(faults) }
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
            _ => None,
        }
    }

    #[test]
    fn variables_are_replaced_once() {
        for (text, expected) in [
            ("", ""),
            ("plain $A $ {A}", "plain $A $ {A}"),
            ("${A}", "one"),
            ("x${A}y${A}z", "xoneyonez"),
            ("$${A}}", "$one}"),
            ("${B_2}", "${A}"),
        ] {
            assert_eq!(expand(text, &env).as_deref(), Ok(expected), "{text}");
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
        ] {
            let faults = expand(text, &env).unwrap_err();
            assert_eq!(faults.len(), count, "{text}");
            assert!(faults[0].contains(part), "{text}: {faults:?}");
            assert!(!faults.concat().contains("CANARY"), "{faults:?}");
        }
    }
}
