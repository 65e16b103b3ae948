//! All of JSONTestSuite (github.com/nst/JSONTestSuite, MIT), read from the fuzzing corpus.

use crate::support::{Provider, Zap};

fn suite(prefix: &str) -> Vec<(String, Vec<u8>)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/patch");
    let files = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    let name = |p: &std::path::Path| p.file_name().unwrap().to_str().unwrap().to_owned();
    files.filter(|p| name(p).starts_with(prefix)).map(|p| (name(&p), std::fs::read(&p).unwrap())).collect()
}

#[test]
fn every_valid_text_reaches_the_backend_byte_for_byte() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let mut client = zap.client();
    let valid = suite("y_");
    assert_eq!(valid.len(), 95);
    for (name, text) in valid {
        let wrapped = [&b"{\"messages\":[], \"x\" :"[..], &text, b"}"].concat();
        let answer = client.chat("", &wrapped);
        assert_eq!((answer.status, &answer.body), (200, &wrapped), "{name}");
        // An object is a valid chat once it has `messages`.
        if text.trim_ascii().starts_with(b"{") && text.trim_ascii() != b"{}" {
            let at = text.iter().position(|b| *b == b'{').unwrap() + 1;
            let body = [&text[..at], b"\"messages\":[],", &text[at..]].concat();
            let answer = client.chat("", &body);
            assert_eq!((answer.status, &answer.body), (200, &body), "{name}");
        }
    }
}

#[test]
fn every_invalid_text_is_refused_and_the_backend_sees_nothing() {
    let provider = Provider::named("a");
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let invalid = suite("n_");
    assert_eq!(invalid.len(), 188);
    for (name, text) in invalid {
        let mut client = zap.client();
        let answer = client.chat("", &text);
        assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_json"), "{name}");
        // Placed inside a chat, some fragments close the enclosing array or object; none may yield a valid chat.
        let wrapped = [&b"{\"messages\":[],\"x\":"[..], &text, b"}"].concat();
        let is_json = std::str::from_utf8(&wrapped)
            .is_ok_and(|t| serde_json::from_str::<&serde_json::value::RawValue>(t).is_ok());
        if !is_json {
            assert_eq!(zap.chat(&wrapped).code(), "invalid_json", "{name} wrapped");
        }
    }
    assert_eq!(provider.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn texts_that_parsers_may_accept_or_refuse_are_treated_as_by_serde_json() {
    let provider = Provider::named("ok");
    let zap = Zap::with("", &[provider.backend("a", "")]);
    for (name, text) in suite("i_") {
        let wrapped = [&b"{\"messages\":[],\"x\":"[..], &text, b"}"].concat();
        let is_json = std::str::from_utf8(&wrapped)
            .is_ok_and(|t| serde_json::from_str::<&serde_json::value::RawValue>(t).is_ok());
        let too_deep = name == "i_structure_500_nested_arrays.json";
        assert_eq!(zap.chat(&wrapped).status == 200, is_json && !too_deep, "{name}");
    }
}
