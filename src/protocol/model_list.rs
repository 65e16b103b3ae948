//! The list of models that a backend serves, as `GET /v1/models` returns it.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;
use serde_json::value::RawValue;

use crate::json::members::MAX_NAME;

/// How the path of the list ends, behind the version of the API.
pub(crate) const TAIL: &str = "/models";

/// Most names that are kept of one list.
const MAX_NAMES: usize = 10_000;

/// Returns the names in a list of models, each once, in the order of the list: the `id` of each member of `data`, or of
/// the list itself, as some providers send it. Returns `None` if `json` is no such list. Names that no request may have
/// are left out.
pub(crate) fn names(json: &[u8]) -> Option<Vec<Box<str>>> {
    let (mut names, mut known) = (Vec::<Box<str>>::new(), HashSet::new());
    for member in members(json)? {
        let Ok(Value::Object(member)) = serde_json::from_str(member.get()) else { continue };
        let Some(name) = member.get("id").and_then(Value::as_str) else { continue };
        let is_valid = (1..=MAX_NAME).contains(&name.len()) && !name.chars().any(char::is_control);
        if is_valid && names.len() < MAX_NAMES && known.insert(name.to_owned()) {
            names.push(name.into());
        }
    }
    Some(names)
}

/// The members of a list, unread: a provider's list may be long.
fn members(json: &[u8]) -> Option<Vec<&RawValue>> {
    let whole: &RawValue = serde_json::from_slice(json).ok()?;
    serde_json::from_str(whole.get()).ok().or_else(|| {
        let object: BTreeMap<String, &RawValue> = serde_json::from_str(whole.get()).ok()?;
        serde_json::from_str(object.get("data")?.get()).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_from_a_list_with_and_without_data() {
        for (json, want) in [
            (
                r#"{"object":"list","data":[{"id":"a","object":"model"},{"id":"b"},{"id":"a"}]}"#,
                &["a", "b"][..],
            ),
            (r#"[{"id":"a"},{"id":"b/c:free"}]"#, &["a", "b/c:free"]),
            (r#"{"data":[{"id":""},{"id":1},{"name":"x"},7,{"id":"a\nb"},{"id":"ok"}]}"#, &["ok"]),
            (r#"{"data":[]}"#, &[]),
        ] {
            let names = names(json.as_bytes()).unwrap();
            assert_eq!(names.iter().map(|name| &**name).collect::<Vec<_>>(), want, "{json}");
        }
        for json in ["", "{}", "7", r#"{"data":{}}"#, r#"{"error":{"message":"no"}}"#, "[", "secret"] {
            assert_eq!(names(json.as_bytes()), None, "{json}");
        }
        let long = format!(r#"[{{"id":"{}"}}]"#, "x".repeat(MAX_NAME + 1));
        assert_eq!(names(long.as_bytes()), Some(Vec::new()));
        let many: Vec<_> = (0..MAX_NAMES + 5).map(|n| format!(r#"{{"id":"{n}"}}"#)).collect();
        assert_eq!(names(format!("[{}]", many.join(",")).as_bytes()).unwrap().len(), MAX_NAMES);
    }
}
