//! Asks a provider for the token counts of a stream, which OpenAI's API sends only on request.

use bytes::Bytes;
use serde_json::Value;

use crate::json::patch::Splice;
use crate::protocol::null_member::find_null;

/// The member of a request that asks for the token counts.
pub(crate) const STREAM_OPTIONS: &str = "stream_options";

/// The splice that asks for the token counts in a streamed request; `None` if the client has decided itself, or the
/// member is not an object. The client's other options keep their bytes.
///
/// `stream_end`: the offset behind the value of the request's `stream`. `options`: the member `stream_options`, from
/// its key to the end of its value, and its offset.
pub(crate) fn ask_for_usage(stream_end: u64, options: Option<(u64, &[u8])>) -> Option<Splice> {
    let insert = |at: u64, skip: usize, text: &'static str| {
        Some(Splice { at, skip: skip as u64, insert: Bytes::from_static(text.as_bytes()) })
    };
    let Some((start, member)) = options else {
        return insert(stream_end, 0, ",\"stream_options\":{\"include_usage\":true}");
    };
    let colon =
        STREAM_OPTIONS.len() + 2 + member.get(STREAM_OPTIONS.len() + 2..)?.iter().position(|b| *b == b':')?;
    let value = colon + 1 + member[colon + 1..].iter().take_while(|b| b.is_ascii_whitespace()).count();
    let at = |offset: usize| start + offset as u64;
    match serde_json::from_slice::<Value>(&member[value..]).ok()? {
        Value::Null => insert(at(value), "null".len(), "{\"include_usage\":true}"),
        Value::Object(options) => match options.get("include_usage") {
            Some(Value::Null) => {
                let null = find_null(member, value, b"include_usage")?.value;
                insert(at(null.start), null.len(), "true")
            }
            Some(_) => None,
            None if options.is_empty() => insert(at(value + 1), 0, "\"include_usage\":true"),
            None => insert(at(value + 1), 0, "\"include_usage\":true,"),
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_unless_the_client_has_decided() {
        for (options, want) in [
            (r#""stream_options":null"#, Some(r#""stream_options":{"include_usage":true}"#)),
            (r#""stream_options" : {}"#, Some(r#""stream_options" : {"include_usage":true}"#)),
            (r#""stream_options":{ "a": 1}"#, Some(r#""stream_options":{"include_usage":true, "a": 1}"#)),
            (
                r#""stream_options":{"include_usage": null,"a":1}"#,
                Some(r#""stream_options":{"include_usage": true,"a":1}"#),
            ),
            (r#""stream_options":{"include_usage":true}"#, None),
            (r#""stream_options":{"include_usage":false}"#, None),
            (r#""stream_options":{"include_usage":1}"#, None),
            (r#""stream_options":"x""#, None),
            (r#""stream_options":[]"#, None),
        ] {
            let splice = ask_for_usage(0, Some((100, options.as_bytes())));
            let patched = splice.map(|splice| {
                let at = splice.at as usize - 100;
                let insert = std::str::from_utf8(&splice.insert).unwrap();
                [&options[..at], insert, &options[at + splice.skip as usize..]].concat()
            });
            assert_eq!(patched.as_deref(), want, "{options}");
        }
        let splice = ask_for_usage(7, None).unwrap();
        assert_eq!((splice.at, splice.skip, &splice.insert[..1]), (7, 0, &b","[..]));
    }
}
