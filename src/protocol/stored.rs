//! Responses that a provider has stored: the paths by which a client asks for them, and what a request refers to.

use http::Method;
use memchr::memmem;
use serde_json::Value;
use serde_json::value::RawValue;

/// The members of a request that refer to what a provider has stored.
pub(crate) const MEMBERS: [&str; 3] = ["conversation", INPUT, "previous_response_id"];

/// The member whose items may refer to stored ones.
pub(crate) const INPUT: &str = "input";

/// The type of such an item.
pub(crate) const ITEM_REFERENCE: &str = "item_reference";

/// The path of all stored responses.
const PATH: &str = "/responses/";

/// Longest id in a path, in bytes.
const MAX_ID: usize = 256;

/// Why a path has no stored response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotStored {
    /// The path does not support the method; the methods that it supports.
    Method(&'static str),
    /// The path is none of a stored response.
    Path,
}

/// A stored response that a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored<'a> {
    /// Its id.
    pub id: &'a str,
    /// The path behind `/responses/`: the id, and what is asked of it.
    pub tail: &'a str,
}

impl<'a> Stored<'a> {
    /// The stored response that a request with this method and path asks for.
    ///
    /// # Errors
    /// The path has none, or another method.
    pub(crate) fn of(method: &Method, path: &'a str) -> Result<Self, NotStored> {
        let tail = path.split_once(PATH).map(|(_, tail)| tail).ok_or(NotStored::Path)?;
        let (id, what) = tail.split_once('/').unwrap_or((tail, ""));
        let allow = match what {
            "" if !tail.ends_with('/') => "GET, DELETE",
            "cancel" => "POST",
            "input_items" => "GET",
            _ => return Err(NotStored::Path),
        };
        if !is_id(id) {
            return Err(NotStored::Path);
        }
        let is_allowed = allow.split(", ").any(|allowed| *method == allowed);
        if is_allowed { Ok(Stored { id, tail }) } else { Err(NotStored::Method(allow)) }
    }
}

/// Whether a part of a path is an id. The backend's key goes with the request, so a path that a server might read as
/// another one is refused: one with dots alone, or with an escape.
fn is_id(text: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~=:+".contains(&b);
    (1..=MAX_ID).contains(&text.len()) && text.bytes().all(is_plain) && text.bytes().any(|b| b != b'.')
}

/// The ids that a member of a request refers to, given from its key to its value: the newest item first.
pub(crate) fn references(member: &[u8]) -> Vec<String> {
    let mut keyed = serde_json::Deserializer::from_slice(member).into_iter::<String>();
    let Some(Ok(name)) = keyed.next() else { return Vec::new() };
    let value = member[keyed.byte_offset()..].trim_ascii_start().strip_prefix(b":").unwrap_or_default();
    match &*name {
        INPUT => item_references(value),
        _ if value.len() > MAX_REFERENCE => Vec::new(),
        _ => match serde_json::from_slice(value) {
            Ok(Value::String(id)) => vec![id],
            // A conversation may be an object.
            Ok(object) => object["id"].as_str().map(str::to_owned).into_iter().collect(),
            Err(_) => Vec::new(),
        },
    }
    .into_iter()
    .filter(|id| !id.is_empty())
    .collect()
}

/// Longest value that may be an id or have one, in bytes.
const MAX_REFERENCE: usize = 4096;

/// Most items of one request that are looked up.
const MAX_ITEMS: usize = 64;

/// The newest references to items in `input`, the newest first. An item is parsed only if it is short and names the
/// type.
fn item_references(input: &[u8]) -> Vec<String> {
    let items: Vec<&RawValue> = serde_json::from_slice(input).unwrap_or_default();
    let of_item = |item: &&RawValue| {
        let text = item.get().as_bytes();
        let may_refer =
            text.len() <= MAX_REFERENCE && memmem::find(text, ITEM_REFERENCE.as_bytes()).is_some();
        let item: Value = if may_refer { serde_json::from_slice(text).ok()? } else { return None };
        let is_reference = item["type"] == ITEM_REFERENCE;
        item["id"].as_str().filter(|_| is_reference).map(str::to_owned)
    };
    items.iter().rev().filter_map(of_item).take(MAX_ITEMS).collect()
}

/// Whether an error says that the backend does not have the response that a request refers to.
pub(crate) fn is_not_found(text: &[u8]) -> bool {
    let Ok(body) = serde_json::from_slice::<Value>(text) else { return false };
    body["error"]["code"] == "previous_response_not_found"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_response_has_few_paths_and_each_its_methods() {
        let of = |method: &str, path| {
            Stored::of(&Method::from_bytes(method.as_bytes()).unwrap(), path)
                .map(|stored| (stored.id, stored.tail))
        };
        for (method, path, want) in [
            ("GET", "/v1/responses/resp_1", Ok(("resp_1", "resp_1"))),
            ("DELETE", "/responses/a-b.c~d=:+", Ok(("a-b.c~d=:+", "a-b.c~d=:+"))),
            ("POST", "/v1/responses/r/cancel", Ok(("r", "r/cancel"))),
            ("GET", "/v1/responses/r/input_items", Ok(("r", "r/input_items"))),
            ("POST", "/v1/responses/r", Err(NotStored::Method("GET, DELETE"))),
            ("HEAD", "/v1/responses/r", Err(NotStored::Method("GET, DELETE"))),
            ("GET", "/v1/responses/r/cancel", Err(NotStored::Method("POST"))),
            ("DELETE", "/v1/responses/r/input_items", Err(NotStored::Method("GET"))),
            ("GET", "/v1/responses/", Err(NotStored::Path)),
            ("GET", "/v1/responses/r/", Err(NotStored::Path)),
            ("GET", "/v1/responses/r/other", Err(NotStored::Path)),
            ("GET", "/v1/responses/r/cancel/x", Err(NotStored::Path)),
            ("GET", "/v1/responses/..", Err(NotStored::Path)),
            ("GET", "/v1/responses/..%2fmodels", Err(NotStored::Path)),
            ("GET", "/v1/responses/../models", Err(NotStored::Path)),
            ("GET", "/v1/responses/a%20b", Err(NotStored::Path)),
        ] {
            assert_eq!(of(method, path), want, "{method} {path}");
        }
        let long = format!("/v1/responses/{}", "x".repeat(MAX_ID));
        assert!(of("GET", &long).is_ok() && of("GET", &format!("{long}x")) == Err(NotStored::Path));
    }

    #[test]
    fn a_request_refers_to_a_response_a_conversation_or_items() {
        for (member, want) in [
            (r#""previous_response_id": "resp_1""#, &["resp_1"][..]),
            (r#""previous_response_id":null"#, &[]),
            (r#""previous_response_id":"""#, &[]),
            (r#""conversation":"conv_1""#, &["conv_1"]),
            (r#""conversation":{"id":"conv_1"}"#, &["conv_1"]),
            (r#""conversation":null"#, &[]),
            (r#""input":"item_reference""#, &[]),
            (
                r#""input":[{"type":"item_reference","id":"a"},{"role":"user","id":"no","content":"x"},
                    {"type":"item_reference","id":"b"},{"type":"message","id":"no"},{"type":"item_reference","id":7}]"#,
                &["b", "a"],
            ),
            (
                r#""input":[7,null,"item_reference",["x"],{"type":["item_reference"],"id":"no"},{"type":"item_reference","id":{"a":1}}]"#,
                &[],
            ),
            (r#""input":{"type":"item_reference","id":"no"}"#, &[]),
        ] {
            assert_eq!(references(member.as_bytes()), want, "{member}");
        }
        let many: Vec<_> = (0..100).map(|n| format!(r#"{{"type":"item_reference","id":"i{n}"}}"#)).collect();
        let found = references(format!("\"input\":[{}]", many.join(",")).as_bytes());
        assert_eq!((found.len(), &*found[0]), (MAX_ITEMS, "i99"), "the newest ones");
        let long = format!("\"previous_response_id\":\"{}\"", "x".repeat(MAX_REFERENCE));
        assert!(references(long.as_bytes()).is_empty());
    }
}
