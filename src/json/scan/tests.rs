//! Tests of the scanner: results and errors, for any chunking of the body.

use std::ops::Range;

use super::*;
use crate::json::members::Affinity;

fn scan(body: &[u8]) -> Result<Fields, ScanError> {
    scan_for(&WATCH_NONE, body)
}

fn scan_for(watch: &Watch, body: &[u8]) -> Result<Fields, ScanError> {
    let mut whole = Scanner::new(watch);
    let all = whole.feed(body).and_then(|()| whole.finish());
    let mut bytewise = Scanner::new(watch);
    let one = body.iter().try_for_each(|b| bytewise.feed(&[*b])).and_then(|()| bytewise.finish());
    assert_eq!(all, one, "chunking changes the verdict on {}", String::from_utf8_lossy(body));
    all
}

#[test]
fn finds_the_members_at_the_top_level_only() {
    let fields =
        scan(br#"{"messages":[{"model":"inner","stream":true}],"stream":false,"model":"gpt"}"#).unwrap();
    assert_eq!(fields.messages, ValueKind::Array);
    assert_eq!(fields.stream, ValueKind::False);
    assert_eq!(fields.model, Model::Named { span: 69..74, name: "gpt".into(), whole: true });
    assert_eq!((fields.inside, fields.members, fields.length), (1, 3, 75));
}

#[test]
fn finds_the_values_that_identify_a_conversation() {
    let watch = Watch { affinity: true, droppable: Vec::new() };
    let found = |body: &str| {
        let fields = scan_for(&watch, body.as_bytes()).unwrap();
        let text = |span: Option<Range<u64>>| span.map(|s| body[s.start as usize..s.end as usize].to_owned());
        let Affinity { cache_key, user, opening, .. } = fields.affinity;
        (text(cache_key), text(user), text(opening))
    };
    for (body, want) in [
        (r#"{"messages":[]}"#, (None, None, Some("[]"))),
        (r#"{"messages":{"role":"user"}}"#, (None, None, None)),
        (r#"{"us\u0065r":"u","prompt_cache_key":""}"#, (None, Some(r#""u""#), None)),
        (r#"{"us\\u0065r":"u","prompt_cache_key":null}"#, (None, None, None)),
        (r#"{"user":7,"x":{"user":"v"}}"#, (None, None, None)),
        (r#"{"input":"hi","model":"m"}"#, (None, None, Some(r#""hi""#))),
        (r#"{"prompt":["a","b"]}"#, (None, None, Some(r#"["a","b"]"#))),
        (r#"{"input":{"role":"user"},"prompt":7}"#, (None, None, None)),
        (
            r#"{"input":[{"role":"user","content":"x"},{"role":"user"}],"messages":[1],"prompt":"z"}"#,
            (None, None, Some(r#"[{"role":"user","content":"x"}"#)),
        ),
        (
            r#"{"messages":[{"role":"system","content":"s"},{"content":[{"role":"user"}],"role":"\u0075ser"},{"role":"user"}]}"#,
            (
                None,
                None,
                Some(r#"[{"role":"system","content":"s"},{"content":[{"role":"user"}],"role":"\u0075ser"}"#),
            ),
        ),
        (
            r#"{"messages":[{"role":["user"]},{"role":{"role":"user"}},"user",["role","user"],{"Role":"user"}],"z":1}"#,
            (
                None,
                None,
                Some(
                    r#"[{"role":["user"]},{"role":{"role":"user"}},"user",["role","user"],{"Role":"user"}]"#,
                ),
            ),
        ),
    ] {
        let (cache_key, user, opening) = want;
        let want = [cache_key, user, opening].map(|part| part.map(str::to_owned));
        assert_eq!(<[_; 3]>::from(found(body)), want, "{body}");
    }
    for (body, member) in [
        (r#"{"user":null,"user":"u"}"#, Member::User),
        (r#"{"input":null,"prompt":"x","input":"u"}"#, Member::Input),
        (r#"{"metadata":null,"metadata":{}}"#, Member::Metadata),
        (r#"{"prompt":1,"prompt":2}"#, Member::Prompt),
        (r#"{"prompt_cache_key":1,"prompt_cache_key":2}"#, Member::PromptCacheKey),
    ] {
        assert_eq!(scan_for(&watch, body.as_bytes()), Err(ScanError::Duplicate(member)), "{body}");
    }
}

#[test]
fn notes_the_positions_of_droppable_members() {
    let watch = Watch { affinity: false, droppable: vec!["store".into(), "n".into()] };
    let fields =
        scan_for(&watch, br#"{ "a":1 , "n" : {"store":[1,2]} ,"st\\u006fre":0, "st\u006Fre":1}"#).unwrap();
    let spans = vec![
        MemberSpan { name: 1, nth: 1, comma: 8, span: 10..31, next: Some(33) },
        MemberSpan { name: 0, nth: 3, comma: 48, span: 50..64, next: None },
    ];
    assert_eq!(fields.droppable, spans);
    let twice = scan_for(&watch, br#"{"store":1,"st\\u006fre":2,"st\u006fre":3}"#);
    assert_eq!(twice, Err(ScanError::Duplicate(Member::Droppable(0))));
}

#[test]
fn reads_every_form_of_model() {
    for (body, want) in [
        (r#"{}"#, Model::Absent),
        (r#"{"model":null}"#, Model::Nothing(9..13)),
        (r#"{"model": "" }"#, Model::Nothing(10..12)),
        (r#"{"mod\u0065l":"a"}"#, Model::Named { span: 14..17, name: "a".into(), whole: true }),
        (
            r#"{"model":"\ud83d\ude00\n\u00e9é"}"#,
            Model::Named { span: 9..33, name: "😀\néé".into(), whole: true },
        ),
        (
            r#"{"model":"\ud83dx\udc00"}"#,
            Model::Named { span: 9..24, name: "\u{FFFD}x\u{FFFD}".into(), whole: true },
        ),
        (r#"{"model":3}"#, Model::Other),
        (r#"{"model":{"model":1}}"#, Model::Other),
        (r#"{"model":["a"],"x":"y"}"#, Model::Other),
    ] {
        assert_eq!(scan(body.as_bytes()).unwrap().model, want, "{body}");
    }
}

#[test]
fn a_long_name_is_truncated_but_not_refused() {
    let body = format!(r#"{{"model":"{}"}}"#, "m".repeat(100_000));
    let Model::Named { span, name, whole } = scan(body.as_bytes()).unwrap().model else {
        panic!("not named")
    };
    assert_eq!((span, name.len(), whole), (9..100_011, MAX_NAME, false));
    let key = format!(r#"{{"model{}":1}}"#, "x".repeat(MAX_NAME));
    assert_eq!(scan(key.as_bytes()).unwrap().model, Model::Absent);
}

#[test]
fn refuses_a_member_that_appears_twice() {
    for (body, member) in [
        (r#"{"model":"a","model":"a"}"#, Member::Model),
        (r#"{"model":null,"mod\u0065l":"b"}"#, Member::Model),
        (r#"{"model":1,"model":2}"#, Member::Model),
        (r#"{"stream":null,"stream":null}"#, Member::Stream),
        (r#"{"messages":[],"\u006dessages":[]}"#, Member::Messages),
    ] {
        assert_eq!(scan(body.as_bytes()), Err(ScanError::Duplicate(member)), "{body}");
    }
    assert!(scan(br#"{"x":1,"x":2,"user":3,"user":4}"#).is_ok());
}

#[test]
fn refuses_a_key_that_differs_only_in_case() {
    let watch = Watch { affinity: true, droppable: vec!["store".into(), "top_k".into(), "Seed".into()] };
    for (body, key, member) in [
        (r#"{"Model":"x"}"#, "Model", Member::Model),
        (r#"{"model":"a","Model":"b"}"#, "Model", Member::Model),
        (r#"{"MODEL":"a","model":"b"}"#, "MODEL", Member::Model),
        (r#"{"model":"a","x":{},"\u004dodel":"b"}"#, "Model", Member::Model),
        (r#"{ "moDel" : null }"#, "moDel", Member::Model),
        (r#"{"Messages":[]}"#, "Messages", Member::Messages),
        (r#"{"meſſageſ":[]}"#, "meſſageſ", Member::Messages),
        (r#"{"ſtream":true}"#, "ſtream", Member::Stream),
        (r#"{"\u017fTREAM":true}"#, "ſTREAM", Member::Stream),
        (r#"{"uſer":"u"}"#, "uſer", Member::User),
        (r#"{"prompt_cache_\u212aey":"u"}"#, "prompt_cache_\u{212a}ey", Member::PromptCacheKey),
        (r#"{"STORE":1}"#, "STORE", Member::Droppable(0)),
        (r#"{"top_\u212A":1}"#, "top_\u{212a}", Member::Droppable(1)),
        (r#"{"seed":1}"#, "seed", Member::Droppable(2)),
    ] {
        let want = ScanError::CaseVariant { key: key.into(), member };
        assert_eq!(scan_for(&watch, body.as_bytes()), Err(want), "{body}");
    }
    let body = r#"{"models":1,"mode":1,"Modél":1,"Modex":1,"streamſ":1,"ſ":1,"":1,"top_\\u212A":1,"x":{"Model":1},"Seed":1,"temperature":0}"#;
    assert!(scan_for(&watch, body.as_bytes()).is_ok());
    assert!(scan(br#"{"User":1,"Store":1,"Prompt_Cache_Key":1}"#).is_ok(), "Zap reads none of these members");
    let long = format!(r#"{{"{}":1}}"#, "ſ".repeat(MAX_NAME));
    assert!(scan(long.as_bytes()).is_ok());
    let both = Watch { affinity: false, droppable: vec!["N".into(), "n".into()] };
    assert!(scan_for(&both, br#"{"n":1,"N":2}"#).is_ok(), "the configuration lists both keys");
}

#[test]
fn an_error_has_the_offset_of_the_first_invalid_byte() {
    for (body, offset) in [
        (&b""[..], 0),
        (b"[]", 0),
        (b"  3", 2),
        (b"\xEF\xBB\xBF{}", 0),
        (b"{", 1),
        (b"{}x", 2),
        (b"{}{}", 2),
        (br#"{"a":01}"#, 6),
        (br#"{"a":1,}"#, 7),
        (br#"{"a":-}"#, 6),
        (br#"{"a":tru}"#, 8),
        (br#"{"a":[1}"#, 7),
        (br#"{"a":"\x"}"#, 7),
        (br#"{"a":"\u12g4"}"#, 10),
        (b"{\"a\":\"\n\"}", 6),
        (b"{\"a\":\"\x80\"}", 6),
        (b"{\"a\":\"\xC3\"}", 7),
        (b"{\"a\":\"\xED\xA0\x80\"}", 7),
        (b"{\"a\":\"\xF4\x90\x80\x80\"}", 7),
        (br#"{a:1}"#, 1),
        (br#"{"a" 1}"#, 5),
    ] {
        assert_eq!(scan(body), Err(ScanError::Invalid { offset }), "{}", String::from_utf8_lossy(body));
    }
}

/// Twice the input takes at most twice the work, for any input and any chunking.
#[test]
fn the_work_is_linear_in_the_input() {
    let watch = Watch {
        affinity: true,
        droppable: vec!["store".into(), "n".into(), "metadata".into(), "user".into()],
    };
    type Shape = (&'static str, fn(usize) -> Vec<u8>);
    let shapes: [Shape; 21] = [
        ("nested arrays", |n| [&b"{\"a\":"[..], &b"[".repeat(n)].concat()),
        ("deep arrays, many times", |n| {
            let deep = format!("{}{}", "[".repeat(126), "]".repeat(126));
            format!("{{\"a\":[{}0]}}", format!("{deep},").repeat(n / 252)).into_bytes()
        }),
        ("brackets in a string", |n| format!("{{\"a\":\"{}\"}}", "[".repeat(n)).into_bytes()),
        ("escaped quotes", |n| format!("{{\"a\":\"{}\"}}", "\\\"".repeat(n / 2)).into_bytes()),
        ("escaped units", |n| format!("{{\"a\":\"{}\"}}", "\\ud83d".repeat(n / 6)).into_bytes()),
        ("escaped quotes, no end", |n| format!("{{\"a\":\"{}", "\\\"".repeat(n / 2)).into_bytes()),
        ("two bytes each", |n| format!("{{\"a\":\"{}\"}}", "é".repeat(n / 2)).into_bytes()),
        ("four bytes each", |n| format!("{{\"a\":\"{}\"}}", "😀".repeat(n / 4)).into_bytes()),
        ("few non-ASCII characters", |n| {
            format!("{{\"a\":\"{}\"}}", ("x".repeat(99) + "é").repeat(n / 101)).into_bytes()
        }),
        ("invalid at the end", |n| [format!("{{\"a\":\"{}", "é".repeat(n / 2)).as_bytes(), b"\xFF"].concat()),
        ("invalid outside of strings", |n| [&b"{\"a\":"[..], &"é".repeat(n / 2).into_bytes()].concat()),
        ("strings with a character each", |n| {
            format!("{{\"a\":[{}0]}}", "\"é\",".repeat(n / 5)).into_bytes()
        }),
        ("empty strings", |n| format!("{{\"a\":[{}0]}}", "\"\",".repeat(n / 3)).into_bytes()),
        ("members", |n| format!("{{\"b\":0{}}}", ",\"a\":1".repeat(n / 6)).into_bytes()),
        ("droppable twice", |n| format!("{{\"store\":0{}}}", ",\"store\":1".repeat(n / 10)).into_bytes()),
        ("members inside", |n| format!("{{\"a\":{{\"b\":0{}}}}}", ",\"a\":1".repeat(n / 6)).into_bytes()),
        ("roles", |n| {
            format!("{{\"messages\":[{{\"role\":0{}}}]}}", ",\"role\":\"u\"".repeat(n / 11)).into_bytes()
        }),
        ("escaped keys", |n| format!("{{\"b\":0{}}}", ",\"\\u0061\":1".repeat(n / 11)).into_bytes()),
        ("a long key", |n| format!("{{\"{}é\":1}}", "k".repeat(n)).into_bytes()),
        ("a long number", |n| format!("{{\"a\":{}}}", "9".repeat(n)).into_bytes()),
        ("spaces", |n| format!("{{{}}}", " \n".repeat(n / 2)).into_bytes()),
    ];
    for (name, shape) in shapes {
        for piece in [1, 2, 17, 1_000, usize::MAX] {
            let work = |n: usize| {
                let body = shape(n);
                let mut scanner = Scanner::new(&watch);
                skip::work::take();
                let _ = body.chunks(piece.min(body.len())).try_for_each(|chunk| scanner.feed(chunk));
                (skip::work::take(), body.len() as u64)
            };
            let ((once, _), (twice, length)) = (work(20_000), work(40_000));
            assert!(twice <= 2 * once + 2_000, "{name} in pieces of {piece}: {once}, then {twice}");
            assert!(twice <= 40 * length + 2_000, "{name} in pieces of {piece}: {twice} for {length}");
        }
    }
}

#[test]
fn nests_to_128_and_no_deeper() {
    let nested = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
    assert!(scan(nested(127).as_bytes()).is_ok());
    assert_eq!(scan(nested(128).as_bytes()), Err(ScanError::Invalid { offset: 132 }));
    let mixed = format!("{}1{}", "{\"a\":[".repeat(64), "]}".repeat(64));
    assert!(scan(mixed.as_bytes()).is_ok());
}
