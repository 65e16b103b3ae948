use super::*;

#[test]
fn a_key_is_in_no_error_of_a_stream_whatever_the_chunking() {
    use StreamFormat::{Done, Messages, Plain, Responses};
    const KEY: &str = "sk-CANARY/0123456789";
    const CHUNK: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"sk-CANARY\"}}]}\n\n";
    let long = "x".repeat(MAX_HELD);
    let rows = [
        (Done, r#"data: {"error":{"message":"bad KEY","code":401}}"#.to_owned(), "data: [DONE]\n\n"),
        (Done, r#"data: {"error":"KEYKEY","choices":[{"delta":{"content":"x"}}]}"#.into(), ""),
        (Done, r#"data: {"error":"bad","usage":null}"#.into(), "data: {\"error\":\"KEY\"}\n\ndata: KEY"),
        (Done, r#"data: {"choices":[{"error":{"message":"KEY"},"finish_reason":"error"}]}"#.into(), ""),
        (
            Done,
            r#"data: {"x":{"error":"KEY"}}"#.into(),
            "data: {\"x\":{\"error\":\"KEY\"}}\n\ndata: {\"x\":{\"error\":\"KEY\"}}\n\n",
        ),
        (Done, "event: error\r\ndata: bad KEY\r\nid: KEY\r".into(), ""),
        (Done, "data: bad KEY".into(), ": KEY\n\n"),
        (Done, "data: [DONE]".into(), "data: {\"error\":{\"message\":\"KEY\"}}\n\n"),
        (Done, format!("data: {{\"x\":\"{long}\",\"error\":\"bad KEY\"}}"), "data: {\"error\":\"KEY\"}"),
        (
            Messages,
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"message\":\"bad KEY\"}}".into(),
            "event: error\ndata: KEY\n\n",
        ),
        (
            Messages,
            "event: message_stop\ndata: {\"type\":\"message_stop\"}".into(),
            "data: {\"type\":\"error\",\"error\":{\"message\":\"KEY\"}}\n\n",
        ),
        (Messages, format!("event: error\ndata: {{\"x\":\"{long}\",\"error\":\"KEY\"}}"), ""),
        (Plain, r#"data: {"error":"bad KEY"}"#.into(), ""),
        (Responses, r#"data: {"type":"error","message":"bad KEY"}"#.into(), ""),
        (
            Responses,
            "event: response.failed\ndata: {\"response\":{\"error\":{\"message\":\"KEY\"}}}".into(),
            "data: {\"error\":{\"message\":\"KEY\"}}\n\n",
        ),
        (Responses, format!("event: response.failed\ndata: {{\"x\":\"{long}\",\"error\":\"KEY\"}}"), ""),
    ];
    for (format, error, rest) in rows {
        for key in [KEY, "sk-CANARY\\/01234567\\u00389"] {
            let error = format!("{error}\n\n{rest}").replace("KEY", key);
            let text = format!("{CHUNK}{CHUNK}{error}");
            let want = format!("{CHUNK}{CHUNK}{}", error.replace(key, "***"));
            let sizes: &[usize] =
                if text.len() < 1000 { &[1, 2, 3, 7, 50, 1000] } else { &[999, MAX_HELD, 100_000] };
            for (size, hides) in sizes.iter().flat_map(|size| [(*size, false), (*size, true)]) {
                let mut stream = EventStream::new(format, hides).without_key(Some(KEY.into()));
                let mut out = Vec::new();
                for piece in text.as_bytes().chunks(size) {
                    out.extend_from_slice(&stream.push(Bytes::copy_from_slice(piece)));
                }
                out.extend_from_slice(&stream.finish());
                let want = if hides { want.replace(",\"usage\":null", "") } else { want.clone() };
                assert!(out == want.as_bytes(), "{size} {hides} {}", String::from_utf8_lossy(&out));
                assert_eq!(stream.held(), 0);
            }
        }
    }
}

/// What a stream says, and what went out before its end.
fn run(format: StreamFormat, pieces: &[&str]) -> (EventStream, String) {
    let mut stream = EventStream::new(format, false);
    let mut out = Vec::new();
    for piece in pieces {
        out.extend_from_slice(&stream.push(Bytes::copy_from_slice(piece.as_bytes())));
    }
    (stream, String::from_utf8(out).unwrap())
}

const ROLE: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"},\"finish_reason\":null}]}\n\n";
const TEXT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"an error\"},\"finish_reason\":null}]}\n\n";
const STOP: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\": \"stop\"}]}\n\n";
const ERROR: &str = "data: {\"error\":{\"code\":503}}\n\n";
const DONE: &str = "data: [DONE]\n\n";

#[test]
fn tells_what_a_stream_says() {
    use StreamEnd::{Complete, Error};
    for (pieces, has_content, end, is_whole) in [
        (&[][..], false, None, false),
        (&[ROLE], false, None, false),
        (&[ROLE, TEXT], true, None, false),
        (&[ROLE, TEXT, STOP], true, None, true),
        (&[TEXT, DONE], true, Some(Complete), true),
        (&[DONE], false, Some(Complete), true),
        (&[TEXT, DONE, ERROR], true, Some(Complete), true),
        (&[ROLE, ERROR], false, Some(Error), false),
        (&[TEXT, ERROR, DONE], true, Some(Error), false),
        (&[TEXT, "event: error\ndata: x\n\n"], true, Some(Error), false),
        (&[TEXT, "data: {}\r\rdata: [DONE]\n\n"], true, Some(Complete), true),
        (&["\u{FEFF}data: [DONE]\n\n"], false, Some(Complete), true),
        (&["\n\r\n", TEXT, "data: [DONE]\r\r"], true, Some(Complete), true),
    ] {
        let (stream, out) = run(StreamFormat::Done, pieces);
        assert_eq!(
            (stream.has_content(), stream.end(), stream.is_whole()),
            (has_content, end, is_whole),
            "{pieces:?}"
        );
        assert_eq!(out, pieces.concat());
    }
    let (mut stream, _) = run(StreamFormat::Done, &[ROLE, ERROR]);
    let error = stream.take_early_error().unwrap();
    assert_eq!((error.status, &error.body[..]), (503, &b"{\"error\":{\"code\":503}}"[..]));
    assert_eq!(run(StreamFormat::Done, &[TEXT, ERROR]).0.take_early_error(), None);
}

const START: &str = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\",\"type\":\"message\",\"role\":\"assistant\",\"content\":[],\"stop_reason\":null,\"usage\":{\"input_tokens\":25,\"cache_creation_input_tokens\":100,\"cache_read_input_tokens\":300,\"output_tokens\":1}}}\n\n";
const MESSAGE_STOP: &str = "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";

fn text_delta(text: &str) -> String {
    format!(
        "event: content_block_delta\ndata: {{\"type\":\"content_block_delta\",\"index\":0,\"delta\":{{\"type\":\"text_delta\",\"text\":\"{text}\"}}}}\n\n"
    )
}

fn message_delta(reason: &str, usage: &str) -> String {
    format!(
        "event: message_delta\ndata: {{\"type\":\"message_delta\",\"delta\":{{\"stop_reason\":{reason}}},\"usage\":{usage}}}\n\n"
    )
}

#[test]
fn a_message_tells_its_token_counts_in_parts_and_its_end_in_an_event() {
    use StreamEnd::{Complete, Error};
    let block = "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n";
    let error = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"m\"}}\n\n";
    let usage =
        |input, cached, cache_write, output| Usage { input, cached, cache_write, output, reasoning: 0 };
    let texts: String = ["Hel", "lo", " \\u00e9\\\"", "!"].iter().map(|text| text_delta(text)).collect();
    let last = message_delta("\"end_turn\"", "{\"output_tokens\":7}");
    let all = message_delta(
        "\"end_turn\"",
        "{\"input_tokens\":30,\"cache_read_input_tokens\":null,\"output_tokens\":9}",
    );
    let early = message_delta("null", "{\"output_tokens\":3}");
    for (parts, has_content, end, told, begun) in [
        (vec![START, block], false, None, None, Some(usage(425, 300, 100, 1))),
        (vec![START, block, &texts], true, None, None, Some(usage(425, 300, 100, 1))),
        (vec![START, &texts, &early], true, None, None, Some(usage(425, 300, 100, 3))),
        (vec![START, &texts, &early, &last], true, None, Some(usage(425, 300, 100, 7)), None),
        (vec![START, &texts, &all, MESSAGE_STOP], true, Some(Complete), Some(usage(430, 300, 100, 9)), None),
        (vec![START, &last, MESSAGE_STOP], true, Some(Complete), Some(usage(425, 300, 100, 7)), None),
        (vec![START, MESSAGE_STOP], false, Some(Complete), None, Some(usage(425, 300, 100, 1))),
        (vec![START, &texts, error], true, Some(Error), None, Some(usage(425, 300, 100, 1))),
        (vec![&texts, &last, MESSAGE_STOP], true, Some(Complete), Some(usage(0, 0, 0, 7)), None),
    ] {
        let text = parts.concat();
        for size in [1, 2, 7, 64, 1000, text.len()] {
            let pieces: Vec<&str> =
                text.as_bytes().chunks(size).map(|piece| std::str::from_utf8(piece).unwrap()).collect();
            let (stream, out) = run(StreamFormat::Messages, &pieces);
            assert_eq!(out, text);
            let said = (stream.has_content(), stream.end(), stream.usage());
            assert_eq!(said, (has_content, end, told), "{text} in pieces of {size}");
            assert_eq!(stream.usage_so_far(), told.or(begun));
            assert_eq!(stream.is_whole(), end == Some(Complete), "the message itself says that it is over");
            let length = if text.contains("Hel") { "Hello \u{e9}\"!".len() as u64 } else { 0 };
            assert_eq!(stream.text(), length, "{text}");
        }
    }
}

#[test]
fn a_message_event_that_is_too_long_keeps_its_class_its_counts_and_its_text() {
    let long = "y".repeat(2 * MAX_HELD);
    let start = START.replace("msg_1", &long);
    let (stream, _) = run(StreamFormat::Messages, &[&start[..MAX_HELD + 9], &start[MAX_HELD + 9..]]);
    assert_eq!((stream.has_content(), stream.usage_so_far().unwrap().input), (false, 425));
    let delta = text_delta(&long);
    let (stream, _) = run(StreamFormat::Messages, &[&delta[..MAX_HELD + 9], &delta[MAX_HELD + 9..]]);
    assert!(stream.has_content() && stream.text() >= long.len() as u64);
    let result = "data: {\"type\":\"content_block_start\",\"content_block\":{\"type\":\"web_search_tool_result\",\"x\":\"";
    let (stream, _) = run(StreamFormat::Messages, &[result, &long, "\"}}\n\n"]);
    assert_eq!((stream.has_content(), stream.text()), (true, 0));
}

#[test]
fn an_unfinished_event_is_held_back_until_the_end() {
    let (mut stream, out) = run(StreamFormat::Done, &[TEXT, "data: [DO", "NE]", "\n"]);
    assert_eq!((&*out, stream.held(), stream.end()), (TEXT, 13, None));
    assert_eq!((stream.finish(), stream.end()), (Bytes::from("data: [DONE]\n"), Some(StreamEnd::Complete)));
}

#[test]
fn an_event_that_is_too_long_goes_out_in_pieces_and_keeps_its_class() {
    for (name, end) in [
        ("event: response.completed\ndata: {", Some(StreamEnd::Complete)),
        ("data: {\"type\":\"response.completed\",", Some(StreamEnd::Complete)),
        ("data: {\"type\":\"response.output_item.done\",", None),
    ] {
        let long = format!("{name}\"x\":\"{}\"}}", "y".repeat(3 * MAX_HELD));
        let (head, tail) = long.split_at(2 * MAX_HELD);
        let (mut stream, out) = run(StreamFormat::Responses, &[head, tail]);
        assert_eq!((out.len(), stream.end(), stream.is_between_events()), (long.len(), None, false));
        assert_eq!(stream.push(Bytes::from_static(b"\n")), "\n");
        assert_eq!(stream.push(Bytes::from_static(b"\n: x")), "\n");
        assert_eq!((stream.end(), stream.has_content(), stream.held()), (end, true, 3), "{name}");
        assert!(stream.partial.capacity() < 100, "the long event is not kept");
    }
}

/// A stream of an answer in chunks of random shapes, and the same stream as a provider sends it that was asked for the
/// token counts.
fn random_streams(rng: &mut fastrand::Rng) -> (String, String) {
    let (mut plain, mut asked) = (String::new(), String::new());
    let end = ["\n\n", "\r\n\r\n", "\r\r"][rng.usize(..3)];
    let (space, place) = (["", " "][rng.usize(..2)], rng.usize(..3));
    let varies = [rng.bool(), rng.bool()];
    for i in 0..rng.usize(..30) {
        let text: String = (0..rng.usize(..8))
            .map(|_| ["a", "\\\"", "é", "\\n", "{", "usage", "\\\\"][rng.usize(..7)])
            .collect();
        let delta = match rng.usize(..12) {
            0 => "{}".to_owned(),
            1 => format!(
                "{{\"tool_calls\":[{{\"index\":{},\"function\":{{\"arguments\":\"{text}\"}}}}]}}",
                rng.u8(..3)
            ),
            _ => format!("{{\"content\":\"{text}\"}}"),
        };
        let id = if varies[0] { i } else { 0 };
        let more = if varies[1] {
            format!(",\"obfuscation\":\"{}\"", "x".repeat(rng.usize(..9)))
        } else {
            String::new()
        };
        let finish = if rng.u8(..20) == 0 { "\"stop\"" } else { "null" };
        let parts = [
            format!("\"id\":\"c{id}\",\"created\":{}", 1000 + i),
            format!("\"choices\":{space}[{{\"delta\":{delta},\"finish_reason\":{finish}}}]"),
            format!("\"model\":\"m\"{more}"),
        ];
        plain += &format!("data: {{{}}}{end}", parts.join(","));
        let null = format!("\"usage\":{space}null");
        let mut asked_parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        asked_parts.insert(place, &null);
        asked += &format!("data: {{{}}}{end}", asked_parts.join(","));
    }
    asked += &format!(
        "data: {{\"id\":\"c\",\"choices\":[],\"usage\":{{\"prompt_tokens\":3,\"completion_tokens\":4}}}}{end}"
    );
    for text in [&mut plain, &mut asked] {
        *text += &format!("data: [DONE]{end}");
    }
    (plain, asked)
}

fn pieces(rng: &mut fastrand::Rng, text: &str) -> Vec<Bytes> {
    let (mut rest, mut pieces) = (text.as_bytes(), Vec::new());
    let most = [1, 20, 300, 5000][rng.usize(..4)];
    while !rest.is_empty() {
        let (piece, more) = rest.split_at(rng.usize(1..=most).min(rest.len()));
        pieces.push(Bytes::copy_from_slice(piece));
        rest = more;
    }
    pieces
}

#[test]
fn the_client_gets_the_same_bytes_whether_or_not_zap_asks_for_the_token_counts() {
    let mut rng = fastrand::Rng::with_seed(17);
    for round in 0..10_000 {
        let (plain, asked) = random_streams(&mut rng);
        let said = |text: &str, hides: bool, rng: &mut fastrand::Rng| {
            let mut stream = EventStream::new(StreamFormat::Done, hides);
            let mut out: Vec<u8> =
                pieces(rng, text).into_iter().flat_map(|piece| stream.push(piece)).collect();
            out.extend_from_slice(&stream.finish());
            let verdict = (stream.has_content(), stream.end(), stream.is_whole(), stream.text());
            (String::from_utf8(out).unwrap(), verdict, stream.usage())
        };
        let (out, verdict, usage) = said(&asked, true, &mut rng);
        assert_eq!(out, plain, "round {round}: {asked}");
        assert_eq!(usage.map(|usage| (usage.input, usage.output)), Some((3, 4)));
        assert_eq!(said(&plain, false, &mut rng), (plain.clone(), verdict, None), "round {round}");
        assert_eq!(said(&asked, false, &mut rng), (asked, verdict, usage), "round {round}");
    }
}

#[test]
fn an_event_of_a_known_shape_counts_its_text_and_any_other_is_parsed() {
    let event =
        |text: &str| format!("data: {{\"n\":1,\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n");
    let (stream, _) =
        run(StreamFormat::Done, &[&event("one"), &event("three"), &event("a\\\"b"), &event("")]);
    assert_eq!(stream.text(), 3 + 5 + 3);
    let mut shape = stream.shape;
    let known = event("four").into_bytes();
    assert_eq!(shape.find(&known).map(|found| (found.length, found.text)), Some((known.len(), 4)));
    for other in [
        event("x").replace("\"n\":1", "\"n\":2"),
        event("x").replace("}]", ",\"finish_reason\":\"stop\"}]"),
        event("a\nb"),
        event("x\",\"y\":\""),
        event("x").trim_end().to_owned(),
        STOP.to_owned(),
    ] {
        assert_eq!(shape.find(other.as_bytes()), None, "{other}");
    }
}

#[test]
fn an_event_that_is_too_long_to_be_held_keeps_its_reason_and_its_token_counts() {
    let text = "y".repeat(2 * MAX_HELD);
    let long = format!(
        "data: {{\"choices\":[{{\"message\":{{\"content\":\"{text}\"}},\"finish_reason\":\"stop\"}}]}}\n\n"
    );
    for cut in 0..40 {
        let (head, tail) = long.split_at(long.len() - cut);
        let (mut stream, out) = run(StreamFormat::Done, &[head, tail]);
        assert_eq!((out.len() + stream.finish().len(), stream.is_whole()), (long.len(), true), "{cut}");
    }
    let (stream, _) = run(StreamFormat::Done, &[&long.replace("\"stop\"", "null")]);
    assert!(!stream.is_whole());
    let told = "\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":9}";
    let chat = long.replace("]}\n\n", &format!("],{told}}}\n\n"));
    let image = format!("event: x\ndata: {{\"b64_json\":\"{text}\",{told}}}\n\n");
    let response = format!(
        "event: response.completed\ndata: {{\"type\":\"response.completed\",\"response\":{{\"instructions\":\"{text}\",{told},\"x\":{{}}}},\"y\":1}}\n\n"
    );
    for (format, event) in
        [(StreamFormat::Done, chat), (StreamFormat::Plain, image), (StreamFormat::Responses, response)]
    {
        for cut in [1, 10, 60, 100, MAX_HELD + 10] {
            let (head, tail) = event.split_at(event.len() - cut);
            let usage = run(format, &[head, tail]).0.usage();
            assert_eq!(usage.map(|usage| (usage.input, usage.output)), Some((7, 9)), "{format:?} {cut}");
        }
    }
}

#[test]
fn a_byte_at_a_time_gives_the_same_verdict() {
    for text in
        [[ROLE, TEXT, STOP, DONE].concat(), [ROLE, ERROR].concat(), ["\r\n", TEXT, ": x\r\r"].concat()]
    {
        let bytes: Vec<&str> = (0..text.len()).map(|i| &text[i..=i]).collect();
        let ((one, out), (whole, _)) = (run(StreamFormat::Done, &bytes), run(StreamFormat::Done, &[&text]));
        assert_eq!(out, text);
        assert_eq!(
            (one.has_content, one.is_finished, one.end, &one.early_error),
            (whole.has_content, whole.is_finished, whole.end, &whole.early_error)
        );
    }
}
