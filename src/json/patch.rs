//! The rules that an endpoint has for a body, and splices, which insert a model's name without copying the rest.
//!
//! This module works on the results of [`crate::json::scan`] and on reference-counted chunks; it never reads the bytes.

use bytes::Bytes;
use smallvec::SmallVec;

use crate::json::members::{Fields, Model, ValueKind};

/// Why a body that is valid JSON cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFault {
    /// `messages` is absent or not an array.
    MissingMessages,
    /// The body names no model, and there is no default model.
    MissingModel,
    /// `model` is neither a string nor null.
    ModelType,
    /// `stream` is neither true nor false nor null.
    StreamType,
}

/// A replacement of `skip` bytes from offset `at` by `insert`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Splice {
    /// Offset in the body, from 0.
    pub at: u64,
    /// Number of bytes of the body that are left out.
    pub skip: u64,
    /// Bytes that are inserted.
    pub insert: Bytes,
}

/// The pieces of a body to send, in order. The inline size fits a small body with one splice.
pub type Slices = SmallVec<[Bytes; 4]>;

/// A model's name in the forms that a splice may need, made in advance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelText {
    /// `"name"`
    value: Bytes,
    /// `"model":"name"`
    only_member: Bytes,
    /// `"model":"name",`
    first_member: Bytes,
    /// `{"model":"name",`
    opening: Bytes,
}

impl ModelText {
    /// Writes `name` as JSON.
    pub fn new(name: &str) -> Self {
        let value = serde_json::Value::from(name).to_string();
        ModelText {
            only_member: Bytes::from(format!("\"model\":{value}")),
            first_member: Bytes::from(format!("\"model\":{value},")),
            opening: Bytes::from(format!("{{\"model\":{value},")),
            value: Bytes::from(value),
        }
    }
}

impl Fields {
    /// Whether the body asks for a streamed answer.
    pub fn wants_stream(&self) -> bool {
        self.stream == ValueKind::True
    }

    /// Checks the types of `model` and `stream`, that a chat request has `messages`, and that a model is named unless
    /// there is a default model.
    ///
    /// # Errors
    /// Returns the [`BodyFault`] of the first rule that the body breaks.
    pub fn check(&self, is_chat: bool, has_default_model: bool) -> Result<(), BodyFault> {
        if self.model == Model::Other {
            return Err(BodyFault::ModelType);
        }
        if !matches!(self.stream, ValueKind::Absent | ValueKind::False | ValueKind::Null | ValueKind::True) {
            return Err(BodyFault::StreamType);
        }
        if is_chat && self.messages != ValueKind::Array {
            return Err(BodyFault::MissingMessages);
        }
        if !has_default_model && !matches!(self.model, Model::Named { .. }) {
            return Err(BodyFault::MissingModel);
        }
        Ok(())
    }
}

/// Returns the splices that change a body for one backend, in the order of the body. They set its model to `model`, if
/// there is one, and remove the members for which `drops` returns `true`; `drops` gets the member's index in
/// [`Watch::droppable`](crate::json::members::Watch).
pub fn splices<'f>(
    fields: &'f Fields,
    model: Option<&ModelText>,
    drops: impl Fn(usize) -> bool + Copy + 'f,
) -> impl Iterator<Item = Splice> + 'f {
    let dropped = fields.droppable.iter().filter(move |member| drops(member.name));
    let is_only = fields.members == dropped.clone().count() as u64;
    let model = model.and_then(|model| model_splice(fields, model, is_only));
    let removals = dropped.zip(0..).map(|(member, dropped_before)| {
        // If any member before this one stays, remove the comma before it, else the comma after it.
        let follows_member = member.nth > dropped_before;
        let at = if follows_member { member.comma } else { member.span.start };
        let end = if follows_member { member.span.end } else { member.next.unwrap_or(member.span.end) };
        Splice { at, skip: end - at, insert: Bytes::new() }
    });
    let at = model.as_ref().map_or(u64::MAX, |model| model.at);
    let before = removals.clone().take_while(move |splice| splice.at < at);
    before.chain(model).chain(removals.skip_while(move |splice| splice.at < at))
}

/// Returns the splice that sets the model. `is_only`: the body has no other member left.
fn model_splice(fields: &Fields, model: &ModelText, is_only: bool) -> Option<Splice> {
    match &fields.model {
        // Nearly always the brace is the first byte: replace it together with the member, to send one piece less.
        Model::Absent if fields.inside == 1 && !is_only => {
            Some(Splice { at: 0, skip: 1, insert: model.opening.clone() })
        }
        Model::Absent => Some(Splice {
            at: fields.inside,
            skip: 0,
            insert: if is_only { model.only_member.clone() } else { model.first_member.clone() },
        }),
        Model::Named { span, .. } | Model::Nothing(span) => {
            Some(Splice { at: span.start, skip: span.end - span.start, insert: model.value.clone() })
        }
        Model::Other => None,
    }
}

/// Adds a splice to splices that are in the order of the body. It comes before one at the same place.
pub(crate) fn with_splice(
    splices: impl Iterator<Item = Splice>,
    extra: Splice,
) -> impl Iterator<Item = Splice> {
    let (mut splices, mut extra) = (splices.peekable(), Some(extra));
    std::iter::from_fn(move || match (&extra, splices.peek()) {
        (Some(extra_splice), Some(next)) if next.at < extra_splice.at => splices.next(),
        (Some(_), _) => extra.take(),
        (None, _) => splices.next(),
    })
}

/// Applies the splices to the chunks and returns the slices to send, in order. The splices must be in order and must
/// not overlap. No bytes are copied, and no slice is empty.
pub fn slices(chunks: &[Bytes], mut splices: impl Iterator<Item = Splice>) -> Slices {
    let mut out = Slices::new();
    let mut next = splices.next();
    // Everything before `at` has been sent or left out. `start..end` is the position of the chunk in the body.
    let (mut at, mut start) = (0u64, 0u64);
    for chunk in chunks {
        let end = start + chunk.len() as u64;
        while at < end {
            let stop = next.as_ref().map_or(end, |splice| splice.at.min(end));
            if stop > at {
                out.push(chunk.slice((at - start) as usize..(stop - start) as usize));
            }
            at = stop;
            if let Some(splice) = next.take_if(|splice| splice.at == stop) {
                at += splice.skip;
                if !splice.insert.is_empty() {
                    out.push(splice.insert);
                }
                next = splices.next();
            }
        }
        start = end;
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::json::members::{ScanError, Watch};
    use crate::json::scan::Scanner;

    /// The `body` that a backend with the default `model` gets.
    fn patched(body: &str, model: &str, chunk: usize) -> String {
        let model = ModelText::new(model);
        let default = |fields: &Fields| match fields.model {
            Model::Named { .. } => None,
            _ => Some(&model),
        };
        spliced(body, chunk, &[], |fields| splices(fields, default(fields), |_| true).collect())
    }

    fn spliced(
        body: &str,
        chunk: usize,
        droppable: &[&str],
        make: impl Fn(&Fields) -> Vec<Splice>,
    ) -> String {
        let chunks: Vec<Bytes> = body.as_bytes().chunks(chunk).map(Bytes::copy_from_slice).collect();
        let watch = Watch { affinity: false, droppable: droppable.iter().map(|d| (*d).into()).collect() };
        let mut scanner = Scanner::new(&watch);
        chunks.iter().for_each(|c| scanner.feed(c).unwrap());
        let out = slices(&chunks, make(&scanner.finish().unwrap()).into_iter());
        assert!(out.iter().all(|s| !s.is_empty()));
        String::from_utf8(out.concat()).unwrap()
    }

    #[test]
    fn inserts_the_default_model_if_the_body_names_none() {
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
    fn a_body_without_splices_is_unchanged() {
        assert!(splices(&Fields::default(), None, |_| true).next().is_none());
        let chunks = [Bytes::from_static(b"{"), Bytes::from_static(b"}")];
        assert_eq!(slices(&chunks, std::iter::empty())[..], chunks);
    }

    #[test]
    fn members_are_removed_with_their_commas_and_models_are_replaced() {
        for (body, drops, model, want) in [
            (r#"{"x":1}"#, "x", "", r#"{}"#),
            (r#"{ "x":1 }"#, "x", "m", r#"{"model":"m"  }"#),
            (r#"{"x":1,"a":2}"#, "x", "", r#"{"a":2}"#),
            (r#"{"a":2 , "x":[1,{"x":2}] }"#, "x", "", r#"{"a":2  }"#),
            (r#"{"a":2,"x":1,"b":3}"#, "x", "", r#"{"a":2,"b":3}"#),
            (r#"{"x":1,"y":2}"#, "xy", "", r#"{}"#),
            (r#"{"x":1 , "y":2,"a":3}"#, "xy", "m", r#"{"model":"m", "a":3}"#),
            (r#"{"a":3,"x":1,"y":2}"#, "xy", "", r#"{"a":3}"#),
            (r#"{"x":1,"a":3,"y":2}"#, "xy", "", r#"{"a":3}"#),
            (r#"{"x":1,"a":3,"y":2}"#, "y", "", r#"{"x":1,"a":3}"#),
            (r#"{"x":1,"y":2}"#, "y", "m", r#"{"model":"m","x":1}"#),
            (r#"{"x":1,"y":2}"#, "x", "m", r#"{"model":"m","y":2}"#),
            (r#"{"x":1,"y":2}"#, "xy", "m", r#"{"model":"m"}"#),
            (r#"{"model":"old","x":1}"#, "x", "new", r#"{"model":"new"}"#),
            (r#"{"x":1,"model" : null}"#, "x", "new", r#"{"model" : "new"}"#),
            (r#"{"x":1,"model":"old","y":2}"#, "", "new", r#"{"x":1,"model":"new","y":2}"#),
        ] {
            let model = Some(model).filter(|m| !m.is_empty()).map(ModelText::new);
            let names = ["x", "y"];
            for chunk in 1..=body.len() {
                let make =
                    |fields: &Fields| splices(fields, model.as_ref(), |i| drops.contains(names[i])).collect();
                assert_eq!(spliced(body, chunk, &names, make), want, "{body} in chunks of {chunk}");
            }
        }
    }

    #[test]
    fn check_returns_the_rule_that_a_body_breaks() {
        for (body, want) in [
            (r#"{"messages":[]}"#, Ok(())),
            (r#"{"messages":[],"stream":null,"model":""}"#, Ok(())),
            (r#"{}"#, Err(BodyFault::MissingMessages)),
            (r#"{"messages":{}}"#, Err(BodyFault::MissingMessages)),
            (r#"{"messages":null}"#, Err(BodyFault::MissingMessages)),
            (r#"{"messages":[],"stream":1}"#, Err(BodyFault::StreamType)),
            (r#"{"messages":[],"stream":"true"}"#, Err(BodyFault::StreamType)),
            (r#"{"messages":[],"model":false}"#, Err(BodyFault::ModelType)),
        ] {
            let mut scanner = Scanner::default();
            scanner.feed(body.as_bytes()).unwrap();
            assert_eq!(scanner.finish().unwrap().check(true, true), want, "{body}");
        }
        for (body, want) in [
            (r#"{"input":"a","model":"m"}"#, Ok(())),
            (r#"{"input":"a"}"#, Err(BodyFault::MissingModel)),
            (r#"{"input":"a","model":""}"#, Err(BodyFault::MissingModel)),
            (r#"{"input":"a","model":null}"#, Err(BodyFault::MissingModel)),
            (r#"{"input":"a","model":1}"#, Err(BodyFault::ModelType)),
        ] {
            let mut scanner = Scanner::default();
            scanner.feed(body.as_bytes()).unwrap();
            assert_eq!(scanner.finish().unwrap().check(false, false), want, "{body}");
        }
    }

    /// JSON text of any shape, with spacing and escapes that serde_json does not write.
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
            let mut scanner = Scanner::default();
            let ours = scanner.feed(&body).and_then(|()| scanner.finish());
            let theirs = std::str::from_utf8(&body).is_ok_and(|s| serde_json::from_str::<&serde_json::value::RawValue>(s).is_ok());
            prop_assert_eq!(matches!(ours, Ok(_) | Err(ScanError::Duplicate(_) | ScanError::CaseVariant { .. })), theirs);
        }
    }
}
