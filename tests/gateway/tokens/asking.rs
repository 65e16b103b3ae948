//! Streams whose token counts Zap asks for, and takes out again.

use super::*;

/// The bodies of the chats that a provider got.
fn bodies(provider: &Provider) -> Vec<String> {
    provider.seen().into_iter().map(|seen| String::from_utf8(seen.body).unwrap()).collect()
}

#[test]
fn a_stream_is_asked_for_its_token_counts_and_the_client_sees_nothing_of_it() {
    let counts = [10, 0, 3, 0];
    let chat = ALL[1];
    let (plain, asked) = (chat.answer("one two", false, None), chat.answer("one two", true, Some(counts)));
    let ask = |options: &str| {
        format!("{{\"model\":\"m\",\"stream\":true{options},\"messages\":[],\"x\":[1.0, \"\\u00e9\"]}}")
    };
    let asks = format!(",{ASKS}");
    let is_true = " , \"stream_options\" : {\"include_usage\": true, \"b\":1e400}";
    let is_false = ",\"stream_options\":{\"include_usage\":false}";
    for (more, is_asked) in [
        ("usage = \"inject\"", true),
        ("prices = { \"*\" = { input = 1, output = 1 } }", true),
        ("usage = \"passive\"\nprices = { \"*\" = { input = 1, output = 1 } }", false),
        ("usage = \"off\"", false),
        ("", false),
    ] {
        let a = teller("one two", Some(counts));
        let zap = Zap::with("", &[a.backend("a", more)]);
        let mut client = zap.client();
        for (options, want) in [
            ("", &*asks),
            (",\"stream_options\":{}", &*asks),
            (",\"stream_options\":null", &*asks),
            (",\"stream_options\":{\"include_usage\":null}", &*asks),
            (
                ",\"stream_options\":{ \"include_obfuscation\":false,\"b\":\t1.0}",
                ",\"stream_options\":{\"include_usage\":true, \"include_obfuscation\":false,\"b\":\t1.0}",
            ),
            (is_true, is_true),
            (is_false, is_false),
        ] {
            let answer = client.chat("", ask(options));
            let sent = bodies(&a).pop().unwrap();
            assert_eq!(sent, ask(if is_asked { want } else { options }), "{more} {options}");
            assert!(options == is_true || serde_json::from_str::<Value>(&sent).is_ok(), "{sent}");
            // The provider does not understand another spelling of the question.
            assert_eq!((answer.text(), answer.whole), (&*plain, true), "{more} {options}");
        }
        // The client's own question.
        let answer = client.chat("", ask(&asks));
        assert_eq!((answer.text(), bodies(&a).pop().unwrap()), (&*asked, ask(&asks)), "{more}");
    }
}

#[test]
fn the_question_goes_into_patched_bodies_and_only_into_streams_of_chats_and_completions() {
    let a = teller("one", Some([10, 0, 3, 0]));
    let more = "usage = \"inject\"\ndefault_model = \"d\"\ndrop_fields = [\"user\", \"x\"]";
    let zap = Zap::with("", &[a.backend("a", more)]);
    let mut client = zap.client();
    for (body, want) in [
        (
            "{\"stream\":true,\"messages\":[]}",
            format!("{{\"model\":\"d\",\"stream\":true,{ASKS},\"messages\":[]}}"),
        ),
        (
            "{\"x\":1,\"stream\":true,\"user\":\"u\",\"messages\":[]}",
            format!("{{\"model\":\"d\",\"stream\":true,{ASKS},\"messages\":[]}}"),
        ),
        (
            "{\"messages\":[],\"model\":\"m\",\"x\":{},\"stream\" : true }",
            format!("{{\"messages\":[],\"model\":\"m\",\"stream\" : true,{ASKS} }}"),
        ),
        (
            "{\"stream_options\":{},\"messages\":[],\"user\":1,\"model\":\"m\",\"stream\":true,\"x\":1}",
            format!("{{{ASKS},\"messages\":[],\"model\":\"m\",\"stream\":true}}"),
        ),
    ] {
        let answer = client.chat("", body);
        assert_eq!(answer.text(), ALL[1].answer("one", false, None), "{body}");
        let sent = bodies(&a).pop().unwrap();
        assert_eq!(sent, want, "{body}");
        assert!(serde_json::from_str::<Value>(&sent).is_ok(), "{sent}");
    }
    for ask in ALL {
        send(&mut client, ask, &ask.body("m", ""));
        assert_eq!(bodies(&a).pop().unwrap().contains(ASKS), ask.has_options(), "{ask:?}");
    }
    // A stream that is not asked for: `stream` is false or null, or the word stands deeper.
    for body in ["\"stream\":null", "\"stream\":false", "\"metadata\":{\"stream\":true}"] {
        let body = format!("{{\"model\":\"m\",\"messages\":[],{body}}}");
        client.chat("", &body);
        assert_eq!(bodies(&a).pop().unwrap(), body);
    }
}

#[test]
fn a_field_that_is_dropped_is_not_added() {
    let a = teller("one", Some([10, 0, 3, 0]));
    let zap = Zap::with("", &[a.backend("a", "usage = \"inject\"\ndrop_fields = [\"stream_options\"]")]);
    for options in ["", ",\"stream_options\":null", ",\"stream_options\":{\"include_usage\":true}"] {
        let answer = zap.chat(format!("{{\"model\":\"m\",\"stream\":true{options},\"messages\":[]}}"));
        assert_eq!(answer.text(), ALL[1].answer("one", false, None));
        assert_eq!(bodies(&a).pop().unwrap(), "{\"model\":\"m\",\"stream\":true,\"messages\":[]}");
    }
    assert_eq!(zap.metric("zap_usage_missing_total{backend=\"a\"}"), 3.0);
}

#[test]
fn only_what_zap_has_asked_for_is_taken_out() {
    // Some providers tell the counts so far beside the choices.
    let beside = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"finish_reason\":null}],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":1}}\n\n";
    let quoted = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\",\\\"usage\\\":null\"},\"finish_reason\":null,\"usage\":null}]}\n\n";
    let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\n";
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        for event in [": hello\n\n", beside, quoted, usage, DONE] {
            chunk(stream, event);
        }
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with("", &[a.backend("a", "usage = \"inject\"\nmodels = [\"m\"]")]);
    let answer = zap.chat(ALL[1].body("m", ""));
    assert_eq!(answer.text(), [": hello\n\n", beside, quoted, DONE].concat());
    assert_eq!(tokens(&zap.metrics(), "a", "m"), [7, 0, 2, 0]);
    let answer = zap.chat(ALL[1].body("m", &format!(",{ASKS}")));
    assert_eq!(answer.text(), [": hello\n\n", beside, quoted, usage, DONE].concat());
}

#[test]
fn a_stream_with_a_length_and_an_http_1_0_client_end_right_without_the_token_counts() {
    let counts = [10, 0, 3, 0];
    let chat = ALL[1];
    for has_length in [true, false] {
        let a = Provider::start(move |seen, stream| {
            match has_length {
                true => {
                    let asked = has(&seen.body, ASKS);
                    reply(stream, 200, EVENTS, chat.answer("one two", asked, Some(counts)).as_bytes());
                }
                false => return serve(seen, stream, "one two", Some(counts)),
            }
            After::Keep
        });
        let zap = Zap::with("", &[a.backend("a", "usage = \"inject\"\nmodels = [\"m\"]")]);
        let (body, plain) = (chat.body("m", ""), chat.answer("one two", false, None));
        let mut client = zap.client();
        // The connection can be used again.
        for _ in 0..3 {
            let answer = client.chat("", &body);
            assert_eq!((answer.header("content-length"), answer.text()), (None, &*plain));
            assert!(answer.whole);
        }
        let mut client = zap.client();
        client.send(format!("POST /chat HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
        let (answer, is_clean) = client.rest();
        let answer = String::from_utf8(answer).unwrap();
        let (head, answer) = answer.split_once("\r\n\r\n").unwrap();
        assert_eq!((answer, is_clean), (&*plain, true), "{head}");
        assert!(!head.to_ascii_lowercase().contains("content-length"), "{head}");
        assert_eq!(tokens(&zap.metrics(), "a", "m"), counts.map(|n| 4 * n));
        zap.wait_until_idle();
    }
}

/// Refuses `stream_options`, as old servers do.
fn refuses_options(seen: &Seen, stream: &mut TcpStream, status: u16) -> After {
    if has(&seen.body, "stream_options") || has(&seen.body, "broken") {
        reply(stream, status, JSON, b"{\"error\":{\"message\":\"unknown field\"}}");
        return After::Keep;
    }
    serve(seen, stream, "one", None)
}

#[test]
fn a_provider_that_refuses_the_question_is_asked_once_more_without_it_and_never_again() {
    for status in [400, 422] {
        refuses_the_question(status);
    }
}

fn refuses_the_question(status: u16) {
    let a = Provider::start(move |seen, stream| refuses_options(seen, stream, status));
    let zap = Zap::with("", &[a.backend("a", "usage = \"inject\"\nmodels = [\"m\", \"n\"]")]);
    let mut client = zap.client();
    for model in ["m", "n"] {
        let before = a.count();
        for _ in 0..3 {
            let answer = client.chat("", ALL[1].body(model, ""));
            assert_eq!((answer.status, answer.text()), (200, &*ALL[1].answer("one", false, None)));
            assert_eq!(answer.header("x-zap-attempts"), Some("1"));
        }
        let asked: Vec<_> = bodies(&a)[before..].iter().map(|body| body.contains(ASKS)).collect();
        assert_eq!(asked, [true, false, false, false], "{model}: each model for itself");
    }
    // The client's own question is the client's own fault.
    let before = a.count();
    let answer = client.chat("", ALL[1].body("m", &format!(",{ASKS}")));
    assert_eq!((answer.status, a.count()), (status, before + 1));
    assert_eq!(zap.metric("zap_usage_missing_total{backend=\"a\"}"), 6.0);
}

#[test]
fn the_second_request_counts_towards_the_quota_of_the_provider() {
    for (quota, status) in [(1, 400), (2, 200)] {
        let a = Provider::start(|seen, stream| refuses_options(seen, stream, 400));
        let more = format!("usage = \"inject\"\nmodels = [\"m\"]\nrequests_per_minute = {quota}");
        let zap = Zap::with("[queue]\nmax_wait_secs = 1\n", &[a.backend("a", &more)]);
        assert_eq!(zap.chat(ALL[1].body("m", "")).status, status, "a quota of {quota}");
        assert_eq!(a.count(), quota);
        let refused = zap.chat(ALL[0].body("m", ""));
        assert_eq!((refused.status, &*refused.code(), a.count()), (429, "upstream_rate_limited", quota));
    }
}

#[test]
fn a_bad_request_of_the_client_does_not_end_the_question() {
    let a = Provider::start(|seen, stream| {
        if !has(&seen.body, "broken") {
            return serve(seen, stream, "one", Some([10, 0, 3, 0]));
        }
        // The second answer says nothing about the question either.
        let status = if has(&seen.body, "always 400") || has(&seen.body, ASKS) { 400 } else { 422 };
        reply(stream, status, JSON, b"{\"error\":{\"message\":\"broken\"}}");
        After::Keep
    });
    let zap = Zap::with_log("", &[a.backend("a", "usage = \"inject\"\nmodels = [\"m\", \"n\"]")]);
    let mut client = zap.client();
    for (model, broken, status) in [("m", "broken, always 400", 400), ("n", "broken", 422)] {
        let before = a.count();
        let answer = client.chat("", ALL[1].body(model, &format!(",\"user\":\"{broken}\"")));
        assert_eq!((answer.status, answer.text()), (status, "{\"error\":{\"message\":\"broken\"}}"));
        assert_eq!(a.count(), before + 2);
        let answer = client.chat("", ALL[1].body(model, ""));
        assert_eq!(answer.text(), ALL[1].answer("one", false, None));
        assert!(bodies(&a).pop().unwrap().contains(ASKS), "{broken}");
    }
    let told = provider([10, 0, 3, 0]);
    assert_eq!(zap.lines(4).iter().map(logged).collect::<Vec<_>>(), [None, told.clone(), None, told]);
    // A pair that has answered such a request is not asked again without the question.
    let before = a.count();
    assert_eq!(client.chat("", ALL[1].body("m", ",\"user\":\"broken\"")).status, 400);
    assert_eq!(a.count(), before + 1);
}

#[test]
fn the_second_question_survives_an_idle_connection_that_closes() {
    let gate = Gate::default();
    let (held, is_first) = (gate.clone(), AtomicBool::new(true));
    let a = Provider::start(move |seen, stream| {
        if has(&seen.body, "warm") {
            held.pass();
        } else if !has(&seen.body, "stream_options") && is_first.swap(false, Ordering::SeqCst) {
            // The connection has been idle for too long.
            return After::Close;
        }
        refuses_options(seen, stream, 400)
    });
    let zap = Zap::with("[server]\nworkers = 1", &[a.backend("a", "usage = \"inject\"")]);
    let mut clients = [zap.client(), zap.client(), zap.client()];
    let body = ALL[0].body("m", ",\"user\":\"warm\"");
    clients.iter_mut().for_each(|client| client.post("/chat", "", &body));
    eventually("three connections are open", || gate.waiting() == 3);
    gate.open(3);
    clients.iter_mut().for_each(|client| assert_eq!(client.response().status, 200));
    let answer = clients[0].chat("", ALL[1].body("m", ""));
    assert_eq!((answer.status, answer.text()), (200, &*ALL[1].answer("one", false, None)));
    assert_eq!(answer.header("x-zap-attempts"), Some("1"));
}

#[test]
fn a_member_that_only_looks_like_the_question_is_refused_where_zap_asks() {
    let a = teller("one", Some([10, 0, 3, 0]));
    let body = |key: &str| {
        format!("{{\"model\":\"m\",\"stream\":true,\"{key}\":{{\"include_usage\":false}},\"messages\":[]}}")
    };
    let zap = Zap::with("", &[a.backend("a", "usage = \"inject\"")]);
    for key in ["Stream_Options", "STREAM_OPTIONS", "\\u0053tream_options"] {
        let answer = zap.chat(body(key));
        assert_eq!((answer.status, answer.code().as_str()), (400, "duplicate_key"), "{key}");
        assert!(answer.text().contains("send only \\\"stream_options\\\""), "{}", answer.text());
    }
    let twice = body("x").replace("\"x\"", "\"stream_options\":{},\"stream_options\"");
    assert_eq!((zap.chat(twice).code().as_str(), a.count()), ("duplicate_key", 0));
    // Where Zap does not ask, the member is the client's own.
    let zap = Zap::with("", &[a.backend("a", "usage = \"passive\"")]);
    assert_eq!(zap.chat(body("Stream_Options")).status, 200);
    assert_eq!(bodies(&a), [body("Stream_Options")]);
}
