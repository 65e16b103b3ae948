//! What an endpoint asks of a body, and the splice that puts a model's name in without copying the rest.
//!
//! Works on what [`crate::policy::scan`] found and on reference-counted chunks; it never looks at the bytes.

use bytes::Bytes;

use super::scan::{Fields, Kind, Member, Model};

/// A body that is JSON but not a request that can be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFault {
    /// A member has a type that it must not have.
    InvalidType(Member),
    /// `messages` is absent or not an array.
    MissingMessages,
    /// No model is named where one must be.
    MissingModel,
}

/// A replacement of `skip` bytes from offset `at` by `insert`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Splice {
    /// Offset in the body, from 0.
    pub at: u64,
    /// Bytes of the body that are left out.
    pub skip: u64,
    /// Bytes that go in.
    pub insert: Bytes,
}

/// A model's name in the three spellings that a splice may need, made once per backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelText {
    /// `"name"`
    value: Bytes,
    /// `"model":"name"`
    only_member: Bytes,
    /// `"model":"name",`
    first_member: Bytes,
}

impl ModelText {
    /// Spells `name` as JSON.
    pub fn new(name: &str) -> Self {
        let value = serde_json::Value::from(name).to_string();
        ModelText {
            only_member: Bytes::from(format!("\"model\":{value}")),
            first_member: Bytes::from(format!("\"model\":{value},")),
            value: Bytes::from(value),
        }
    }
}

impl Fields {
    /// Whether the body asks for a streamed answer.
    pub fn wants_stream(&self) -> bool {
        self.stream == Kind::True
    }

    /// Checks what a request must have: `messages` where it is a chat, and a model where none has a default.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check(&self, is_chat: bool, has_default_model: bool) -> Result<(), BodyFault> {
        if self.model == Model::Other {
            return Err(BodyFault::InvalidType(Member::Model));
        }
        if !matches!(self.stream, Kind::Absent | Kind::False | Kind::Null | Kind::True) {
            return Err(BodyFault::InvalidType(Member::Stream));
        }
        if is_chat && self.messages != Kind::Array {
            return Err(BodyFault::MissingMessages);
        }
        if !has_default_model && !matches!(self.model, Model::Named { .. }) {
            return Err(BodyFault::MissingModel);
        }
        Ok(())
    }
}

/// The splice that makes a body ask for `default` where it names no model itself.
pub fn model_splice(fields: &Fields, default: Option<&ModelText>) -> Option<Splice> {
    let default = default?;
    match &fields.model {
        Model::Absent => Some(Splice {
            at: fields.inside,
            skip: 0,
            insert: if fields.empty { default.only_member.clone() } else { default.first_member.clone() },
        }),
        Model::Nothing(span) => {
            Some(Splice { at: span.start, skip: span.end - span.start, insert: default.value.clone() })
        }
        Model::Named { .. } | Model::Other => None,
    }
}

/// The slices to send, in order: the chunks with the splice applied. Nothing is copied and none is empty.
pub fn slices(chunks: &[Bytes], splice: Option<&Splice>) -> Vec<Bytes> {
    let Some(splice) = splice else { return chunks.to_vec() };
    let mut out = Vec::with_capacity(chunks.len() + 2);
    let (cut, resume) = (splice.at, splice.at + splice.skip);
    let mut inserted = false;
    let mut start = 0u64;
    for chunk in chunks {
        let end = start + chunk.len() as u64;
        let before = cut.clamp(start, end) - start;
        let after = resume.clamp(start, end) - start;
        if before > 0 {
            out.push(chunk.slice(..before as usize));
        }
        if !inserted && cut <= end {
            inserted = true;
            out.push(splice.insert.clone());
        }
        if (after as usize) < chunk.len() {
            out.push(chunk.slice(after as usize..));
        }
        start = end;
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::scan::Scanner;

    fn patched(body: &str, model: &str, chunk: usize) -> String {
        let chunks: Vec<Bytes> = body.as_bytes().chunks(chunk).map(Bytes::copy_from_slice).collect();
        let mut scanner = Scanner::new();
        chunks.iter().for_each(|c| scanner.feed(c).unwrap());
        let fields = scanner.finish().unwrap();
        let splice = model_splice(&fields, Some(&ModelText::new(model)));
        let out = slices(&chunks, splice.as_ref());
        assert!(out.iter().all(|s| !s.is_empty()));
        String::from_utf8(out.concat()).unwrap()
    }

    #[test]
    fn puts_the_default_in_wherever_no_model_is_named() {
        for (body, want) in [
            ("{}", r#"{"model":"m"}"#),
            (" { } ", r#" {"model":"m" } "#),
            (r#"{"a":1}"#, r#"{"model":"m","a":1}"#),
            (r#"{"a":1,"model":null}"#, r#"{"a":1,"model":"m"}"#),
            (r#"{"model" : "" ,"a":1}"#, r#"{"model" : "m" ,"a":1}"#),
            (r#"{"mod\u0065l":null}"#, r#"{"mod\u0065l":"m"}"#),
            (r#"{"model":"own"}"#, r#"{"model":"own"}"#),
        ] {
            for chunk in 1..=body.len() {
                assert_eq!(patched(body, "m", chunk), want, "{body} in chunks of {chunk}");
            }
        }
        assert_eq!(patched("{}", "a\"\\\u{1}é", 1), "{\"model\":\"a\\\"\\\\\\u0001é\"}");
    }

    #[test]
    fn no_default_leaves_the_body_alone() {
        assert_eq!(model_splice(&Fields::default(), None), None);
    }

    #[test]
    fn names_the_rule_that_a_body_breaks() {
        for (body, want) in [
            (r#"{"messages":[]}"#, Ok(())),
            (r#"{"messages":[],"stream":null,"model":""}"#, Ok(())),
            (r#"{}"#, Err(BodyFault::MissingMessages)),
            (r#"{"messages":{}}"#, Err(BodyFault::MissingMessages)),
            (r#"{"messages":null}"#, Err(BodyFault::MissingMessages)),
            (r#"{"messages":[],"stream":1}"#, Err(BodyFault::InvalidType(Member::Stream))),
            (r#"{"messages":[],"stream":"true"}"#, Err(BodyFault::InvalidType(Member::Stream))),
            (r#"{"messages":[],"model":false}"#, Err(BodyFault::InvalidType(Member::Model))),
        ] {
            let mut scanner = Scanner::new();
            scanner.feed(body.as_bytes()).unwrap();
            assert_eq!(scanner.finish().unwrap().check(true, true), want, "{body}");
        }
        for (body, want) in [
            (r#"{"input":"a","model":"m"}"#, Ok(())),
            (r#"{"input":"a"}"#, Err(BodyFault::MissingModel)),
            (r#"{"input":"a","model":""}"#, Err(BodyFault::MissingModel)),
            (r#"{"input":"a","model":null}"#, Err(BodyFault::MissingModel)),
            (r#"{"input":"a","model":1}"#, Err(BodyFault::InvalidType(Member::Model))),
        ] {
            let mut scanner = Scanner::new();
            scanner.feed(body.as_bytes()).unwrap();
            assert_eq!(scanner.finish().unwrap().check(false, false), want, "{body}");
        }
    }

    /// JSON text of any shape, with the spacing and the escapes that serde_json would not choose.
    fn json_value() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just("null".to_owned()),
            any::<bool>().prop_map(|b| b.to_string()),
            "-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,5})?([eE][+-]?[0-9]{1,3})?",
            any::<String>().prop_map(|s| serde_json::Value::from(s).to_string()),
            Just("\"\\ud800\\u0041\\/\"".to_owned()),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(|v| format!("[ {} ]", v.join(" , "))),
                prop::collection::vec(("[a-z]{0,6}", inner), 0..4).prop_map(|m| {
                    let members: Vec<_> = m.iter().map(|(k, v)| format!("\"{k}\" :\t{v}")).collect();
                    format!("{{{}}}", members.join(",\r\n"))
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_patched_body_is_the_body_plus_its_model(
            members in prop::collection::vec(("[a-z]{1,8}", json_value()), 0..5),
            model in prop::option::of(prop_oneof![Just("null"), Just("\"\""), Just("\"own\"")]),
            place in any::<prop::sample::Index>(),
            name in "\\PC{1,12}",
            chunk in 1usize..40,
        ) {
            let known = ["model", "stream", "messages"];
            let mut texts: Vec<String> = members.iter().filter(|(k, _)| !known.contains(&k.as_str()))
                .map(|(k, v)| format!("\"{k}\":{v}")).collect();
            if let Some(model) = model {
                texts.insert(place.index(texts.len() + 1), format!("\"model\": {model}"));
            }
            let body = format!("{{{}}}", texts.join(", "));
            let out = patched(&body, &name, chunk);

            let want = if model == Some("\"own\"") { "own" } else { name.as_str() };
            let value: serde_json::Map<String, serde_json::Value> = match serde_json::from_str(&out) {
                Ok(value) => value,
                Err(e) if e.to_string().contains("number out of range") => return Ok(()),
                Err(e) => {
                    // serde_json's `Value` refuses lone surrogates; the raw text is still JSON.
                    prop_assert!(serde_json::from_str::<&serde_json::value::RawValue>(&out).is_ok(), "{e}");
                    return Ok(());
                }
            };
            prop_assert_eq!(value.get("model").and_then(|m| m.as_str()), Some(want));
            let spelled = serde_json::Value::from(want).to_string();
            let expected = match model {
                Some("\"own\"") => body.clone(),
                Some(nothing) => body.replacen(&format!("\"model\": {nothing}"), &format!("\"model\": {spelled}"), 1),
                None if texts.is_empty() => format!("{{\"model\":{spelled}}}"),
                None => format!("{{\"model\":{spelled},{}", &body[1..]),
            };
            prop_assert_eq!(out, expected);
        }

        #[test]
        fn verdicts_agree_with_serde_json(bytes in prop::collection::vec(
            prop_oneof![prop::sample::select(b"{}[]\",:\\u0123e.-+ tfn".to_vec()), any::<u8>()], 0..40)) {
            let mut body = b"{\"a\":".to_vec();
            body.extend_from_slice(&bytes);
            body.push(b'}');
            let mut scanner = Scanner::new();
            let ours = scanner.feed(&body).and_then(|()| scanner.finish());
            let theirs = std::str::from_utf8(&body).is_ok_and(|s| serde_json::from_str::<&serde_json::value::RawValue>(s).is_ok());
            prop_assert_eq!(matches!(ours, Ok(_) | Err(crate::policy::scan::ScanError::Duplicate(_))), theirs);
        }
    }
}
