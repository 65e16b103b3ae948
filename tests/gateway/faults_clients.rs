//! Faults of clients, load, panics and security: rows C, O and S of the table of faults. A test name begins with the
//! id of its row.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use zap::internals::{Decision, Limiter, WINDOW};

use crate::support::lies::{Api, Ask};
use crate::support::provider::{After, Gate, chunk, end_chunks, reply, start_events, wait_closed};
use crate::support::{CHAT, Client, Provider, Response, STREAM, Zap, eventually, within};

const NO_PROBES: &str = "[health]\ninterval_secs = 600\n";

/// The ways of a client to disconnect: FIN and RST.
static WAYS: [fn(Client); 2] = [drop, Client::reset];

/// Sends no response and waits until Zap closes the connection.
fn silent() -> Provider {
    Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    })
}

/// A chat of `size` bytes and a few more.
fn chat_of(size: usize) -> String {
    format!("{{\"messages\":[\"{}\"]}}", "x".repeat(size))
}

/// A complete request with `body`.
fn post(body: &str) -> String {
    format!("POST /chat HTTP/1.1\r\nhost: zap\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// Like [`post`], in chunks of `size` bytes; `body` must be ASCII.
fn chunked(body: &str, size: usize) -> String {
    let pieces = body.as_bytes().chunks(size).map(|p| (p.len(), String::from_utf8_lossy(p)));
    let pieces: String = pieces.map(|(n, piece)| format!("{n:x}\r\n{piece}\r\n")).collect();
    format!("POST /chat HTTP/1.1\r\nhost: zap\r\ntransfer-encoding: chunked\r\n\r\n{pieces}0\r\n\r\n")
}

/// Sends a request on a new connection, even if Zap does not read all of it, and reads the response.
fn ask(zap: &Zap, request: &str) -> Response {
    let mut client = zap.client();
    client.try_send(request);
    client.response()
}

fn sleep_until(at: Instant) {
    std::thread::sleep(at.saturating_duration_since(Instant::now()));
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Queues a request and disconnects, in each way; each time the queue is empty at once, and `a` gets no request.
fn disconnect_while_queued(zap: &Zap, a: &Provider) {
    let (seen, before) = (a.count(), queued_disconnects(zap));
    for leave in WAYS {
        let mut client = zap.client();
        client.post("/chat", "", CHAT);
        eventually("the request is queued", || zap.metric("zap_queue_depth") == 1.0);
        leave(client);
        within(secs(1), "the queue is empty", || zap.metric("zap_queue_depth") == 0.0);
    }
    eventually("both disconnects are counted", || queued_disconnects(zap) == before + 2.0);
    assert_eq!(a.count(), seen, "a request of a disconnected client was sent");
}

fn queued_disconnects(zap: &Zap) -> f64 {
    zap.metric("zap_client_disconnects_total{phase=\"queued\"}")
}

#[test]
fn c1_client_disconnects_while_queued() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let settings = format!("{NO_PROBES}[queue]\nmax_in_flight = 1\n");
    let zap = Zap::with(&settings, &[a.backend("a", "")]);
    let mut first = zap.client();
    first.post("/chat", "", CHAT);
    eventually("the backend has the first request", || gate.waiting() == 1);
    disconnect_while_queued(&zap, &a);
    gate.open(1);
    assert_eq!(first.response().status, 200);
    assert_eq!(a.count(), 1);
    zap.wait_until_idle();
}

#[test]
fn c1_client_disconnects_while_the_backend_cools_down() {
    let a = Provider::fixed(429, "retry-after: 20\r\n", "{}");
    let settings = format!("{NO_PROBES}[queue]\nmax_wait_secs = 60\ntimeout_secs = 60\n");
    let zap = Zap::with(&settings, &[a.backend("a", "")]);
    // The request that met the 429 waits too.
    let mut first = zap.client();
    first.post("/chat", "", CHAT);
    eventually("the request is queued", || zap.metric("zap_queue_depth") == 1.0);
    assert_eq!(a.count(), 1);
    drop(first);
    within(secs(1), "the queue is empty", || zap.metric("zap_queue_depth") == 0.0);
    eventually("the disconnect is counted", || queued_disconnects(&zap) == 1.0);
    disconnect_while_queued(&zap, &a);
    assert_eq!(a.count(), 1);
    zap.wait_until_idle();
}

#[test]
fn c1_client_disconnects_while_it_waits_for_quota() {
    let a = Provider::named("a");
    // The quota refills a little more than a minute after its only request.
    let settings = format!("{NO_PROBES}[queue]\nmax_wait_secs = 120\ntimeout_secs = 120\n");
    let zap = Zap::with(&settings, &[a.backend("a", "requests_per_minute = 1")]);
    assert_eq!(zap.chat(CHAT).status, 200);
    disconnect_while_queued(&zap, &a);
    assert_eq!(a.count(), 1);
    zap.wait_until_idle();
}

#[test]
fn c1_client_disconnects_while_the_backend_is_full() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let zap = Zap::with(NO_PROBES, &[a.backend("a", "max_in_flight = 1")]);
    let mut first = zap.client();
    first.post("/chat", "", CHAT);
    eventually("the backend has the first request", || gate.waiting() == 1);
    disconnect_while_queued(&zap, &a);
    gate.open(1);
    assert_eq!(first.response().status, 200);
    assert_eq!(a.count(), 1);
    zap.wait_until_idle();
}

#[test]
fn c2_c4_client_disconnects_after_a_second_request_of_any_size_and_framing() {
    let a = silent();
    let zap = Zap::with(NO_PROBES, &[a.backend("a", "")]);
    let mut n = 0;
    for (first, behind, ways) in [
        (post(CHAT), post(CHAT), &WAYS[..]),
        // More than Zap buffers. If the kernel's buffer is full too, a FIN does not arrive, but a reset does.
        (post(CHAT), post(&chat_of(100 << 10)), &WAYS[..]),
        (post(CHAT), post(&chat_of(200 << 10)), &WAYS[1..]),
        (chunked(CHAT, 10), post(CHAT), &WAYS[..]),
        (chunked(CHAT, 10), chunked(CHAT, 10), &WAYS[..]),
    ] {
        for leave in ways {
            for at_once in [false, true] {
                let mut client = zap.client();
                n += 1;
                if at_once {
                    client.send([first.as_str(), behind.as_str()].concat());
                } else {
                    client.send(&first);
                }
                eventually("the backend has the request", || a.count() == n);
                if !at_once {
                    client.send(&behind);
                }
                leave(client);
                within(secs(2), "the upstream connection is closed", || a.connections() == 0);
                let waiting = || zap.metric("zap_client_disconnects_total{phase=\"waiting\"}");
                eventually("the disconnect is counted", || waiting() == n as f64);
                assert_eq!(a.count(), n, "the second request must not be sent");
            }
        }
    }
    zap.wait_until_idle();
    assert_eq!(a.count(), n);
}

#[test]
fn c5_a_half_close_during_a_stream_is_a_disconnect() {
    let a = Provider::start(|_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        wait_closed(stream);
        After::Close
    });
    let zap = Zap::with(NO_PROBES, &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    assert_eq!(client.head().status, 200);
    assert_eq!(client.chunk().unwrap(), b"data: one\n\n");
    client.half_close();
    within(Duration::from_millis(250), "the upstream connection is closed", || a.connections() == 0);
    let (rest, _) = client.rest();
    assert!(!rest.ends_with(b"0\r\n\r\n"), "the cut response must not look complete");
    eventually("the disconnect is counted", || {
        zap.metric("zap_client_disconnects_total{phase=\"streaming\"}") == 1.0
    });
    zap.wait_until_idle();
}

#[test]
fn c5_a_half_close_while_queued_is_a_disconnect() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let settings = format!("{NO_PROBES}[queue]\nmax_in_flight = 1\n");
    let zap = Zap::with(&settings, &[a.backend("a", "")]);
    let (mut first, mut second) = (zap.client(), zap.client());
    first.post("/chat", "", CHAT);
    eventually("the backend has the first request", || gate.waiting() == 1);
    second.post("/chat", "", CHAT);
    eventually("the second request is queued", || zap.metric("zap_queue_depth") == 1.0);
    second.half_close();
    within(secs(1), "the queue is empty", || zap.metric("zap_queue_depth") == 0.0);
    assert_eq!(second.rest().0, b"");
    eventually("the disconnect is counted", || {
        zap.metric("zap_client_disconnects_total{phase=\"queued\"}") == 1.0
    });
    gate.open(1);
    assert_eq!(first.response().status, 200);
    assert_eq!(a.count(), 1);
    zap.wait_until_idle();
}

/// Sends a head on each of `n` connections, one byte every 500 ms, until Zap closes them. Returns how long each
/// connection was open.
fn drip_heads(address: SocketAddr, n: usize) -> Vec<Duration> {
    const HEAD: &[u8] = b"GET /health HTTP/1.1\r\nhost: ";
    const EVERY: Duration = Duration::from_millis(500);
    let start = Instant::now();
    let connect = || {
        let mut stream = TcpStream::connect(address).unwrap();
        let since = Instant::now();
        stream.write_all(&HEAD[..1]).unwrap();
        stream.set_nonblocking(true).unwrap();
        (stream, since)
    };
    let mut open: Vec<(TcpStream, Instant)> = (0..n).map(|_| connect()).collect();
    let mut stood = Vec::with_capacity(n);
    let mut sent = 1u32;
    while !open.is_empty() && start.elapsed() < secs(15) {
        open.retain_mut(|(stream, since)| {
            let is_closed = match stream.read(&mut [0; 16]) {
                Ok(n) => {
                    assert_eq!(n, 0, "unexpected bytes arrived");
                    true
                }
                Err(e) => e.kind() != ErrorKind::WouldBlock,
            };
            if is_closed {
                stood.push(since.elapsed());
            }
            !is_closed
        });
        if start.elapsed() >= EVERY * sent {
            let byte = HEAD.get(sent as usize).copied().unwrap_or(b'x');
            for (stream, _) in &mut open {
                // Zap may have closed the connection just now.
                let _ = stream.write_all(&[byte]);
            }
            sent += 1;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(open.is_empty(), "{} of {n} are still open", open.len());
    stood
}

#[test]
fn c6_five_hundred_slow_heads_are_closed_in_time_and_do_not_delay_others() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let (start, done) = (Instant::now(), AtomicBool::new(false));
    let (stood, took) = std::thread::scope(|s| {
        let other = s.spawn(|| {
            let mut client = zap.client();
            let mut took = Vec::new();
            while !done.load(Ordering::SeqCst) && start.elapsed() < secs(20) {
                let since = Instant::now();
                assert_eq!(client.chat("", CHAT).status, 200);
                took.push(since.elapsed());
                std::thread::sleep(Duration::from_millis(5));
            }
            took
        });
        let stood = drip_heads(zap.address, 500);
        done.store(true, Ordering::SeqCst);
        (stood, other.join().unwrap())
    });
    assert_eq!(stood.len(), 500);
    for open in stood {
        assert!(open > Duration::from_millis(9_500) && open < secs(12), "{open:?}");
    }
    let worst = took.iter().max().unwrap();
    assert!(*worst < Duration::from_millis(500), "the slowest of {} requests took {worst:?}", took.len());
    assert!(took.len() > 100, "{}", took.len());
    zap.wait_until_idle();
}

#[test]
fn c7_a_body_must_grow_by_1_kib_in_30_s() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    std::thread::scope(|s| {
        let steady = s.spawn(|| {
            let request = post(&chat_of(2_000));
            let (begun, rest) = request.split_at(request.len() - 2_000);
            let mut client = zap.client();
            let since = Instant::now();
            client.send(begun);
            sleep_until(since + secs(20));
            client.send(&rest[..1_024]);
            sleep_until(since + secs(33));
            assert!(client.is_quiet(), "1 KiB in 30 s is enough");
            client.send(&rest[1_024..]);
            assert_eq!(client.response().text(), "ok");
        });
        let request = post(&chat_of(1_000));
        let (head, body) = request.split_at(request.find("\r\n\r\n").unwrap() + 4);
        let mut client = zap.client();
        let since = Instant::now();
        client.send(head);
        let mut sent = 0u32;
        while client.is_quiet() && since.elapsed() < secs(35) {
            if since.elapsed() >= secs(2) * sent {
                let at = sent as usize;
                client.try_send(&body[at..=at]);
                sent += 1;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let took = since.elapsed();
        let answer = client.response();
        assert_eq!((answer.status, answer.code().as_str()), (408, "request_timeout"));
        assert_eq!(answer.header("connection"), Some("close"));
        assert!(took > secs(29) && took < secs(33), "{took:?}");
        assert_eq!(client.rest().0, b"");
        steady.join().unwrap();
    });
    assert_eq!(a.count(), 1, "the request that timed out is not sent");
    zap.wait_until_idle();
}

#[test]
fn c10_a_hundred_headers_pass_and_one_more_does_not() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let more = |n: usize| (0..n).map(|i| format!("x-{i}: y\r\n")).collect::<String>();
    let get = |n: usize| format!("GET /health HTTP/1.1\r\nhost: a\r\n{}\r\n", more(n - 1));
    let length = CHAT.len();
    let chat = |n: usize| {
        let more = more(n - 2);
        format!("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n{more}\r\n{CHAT}")
    };
    assert_eq!(ask(&zap, &get(100)).status, 200);
    assert_eq!(ask(&zap, &chat(100)).text(), "ok");
    for request in [get(101), chat(101)] {
        let mut client = zap.client();
        client.send(request);
        assert_eq!(client.response().status, 431);
        assert_eq!(client.rest().0, b"");
    }
    assert_eq!(a.count(), 1);
    zap.wait_until_idle();
}

#[test]
fn c10_a_head_that_is_too_large_is_refused_and_the_connection_closed() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    for (head, statuses) in [
        (format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "t".repeat(70_000)), [431, 414]),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "y".repeat(500_000)), [431, 431]),
    ] {
        let mut client = zap.client();
        client.try_send(head);
        let status = client.response().status;
        assert!(statuses.contains(&status), "{status}");
        assert_eq!(client.rest().0, b"");
    }
    assert_eq!(zap.chat(CHAT).status, 200);
    zap.wait_until_idle();
}

#[test]
fn c12_ten_mebibytes_of_brackets_are_refused_in_linear_time() {
    const SIZE: usize = 10 << 20;
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    // With the last prefix the brackets are inside a string without an end, so the whole body is read.
    for opening in ["", "{\"a\":", "{\"messages\":[\""] {
        let took = [SIZE, 2 * SIZE].map(|size| {
            let request = post(&format!("{opening}{}", "[".repeat(size)));
            let since = Instant::now();
            let answer = ask(&zap, &request);
            assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_json"), "{opening:?}");
            since.elapsed()
        });
        assert!(took[1] < 4 * took[0].max(Duration::from_millis(250)), "{opening:?}: {took:?}");
        assert_eq!(a.count(), 0);
    }
    assert_eq!(zap.chat(CHAT).text(), "ok");
    zap.wait_until_idle();
}

#[test]
fn c13_unusual_json_reaches_the_backend_byte_for_byte() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "default_model = \"m\"")]);
    let body = [
        r#"{ "z" :1e400 ,"#,
        "\r\n\t",
        r#""messages" : [ {"role":"user" ,"content":"\ud800 \udc00\ud800 \u0000\/"} ] ,"#,
        r#""b":-0,"a":1.0 , "\udead":[1E+2,  -0.0,1.10, 0.1e-7 ],"b":{ } }"#,
        "\n",
    ]
    .concat();
    let want = format!("{{\"model\":\"m\",{}", &body[1..]);
    for (i, request) in [post(&body), chunked(&body, 7), chunked(&body, 1)].iter().enumerate() {
        assert_eq!(ask(&zap, request).text(), "ok");
        assert_eq!(String::from_utf8_lossy(&a.seen()[i].body), want);
    }
    zap.wait_until_idle();
}

#[test]
fn c14_a_repeated_model_gets_the_same_error_at_any_position() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "default_model = \"m\"")]);
    let long = "x".repeat(10 << 20);
    let first = r#"{"model":"a","mod\u0065l":"b","messages":[]}"#;
    let around = r#"{"mod\u0065l":"a","messages":[{"model":1}],"model":"b"}"#;
    let last = r#"{"messages":[],"model":null,"\u006dodel":"b"}"#;
    let mut requests = vec![
        post(&format!(r#"{{"model":"a","messages":["{long}"],"mod\u0065l":"b"}}"#)),
        post(&format!(r#"{{"messages":["{long}"],"mod\u0065l":"a","model":"b"}}"#)),
        post(&format!(r#"{{"model":"a","model":"b","messages":["{long}"]}}"#)),
    ];
    for body in [first, around, last] {
        requests.extend([post(body), chunked(body, 7), chunked(body, 1)]);
    }
    let mut answers: Vec<Response> = requests.iter().map(|request| ask(&zap, request)).collect();
    // The same bodies in writes of seven bytes.
    for body in [first, around, last] {
        let mut client = zap.client();
        for piece in post(body).as_bytes().chunks(7) {
            client.try_send(piece);
        }
        answers.push(client.response());
    }
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!((answer.status, answer.code().as_str()), (400, "duplicate_key"), "{i}");
        assert_eq!(answer.text(), answers[0].text(), "{i}");
    }
    assert_eq!(a.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn c15_a_refused_head_gets_no_100_continue() {
    const ENCODING: &str = "unsupported_content_encoding";
    let a = Provider::named("ok");
    let open = Zap::with("", &[a.backend("a", "")]);
    let limited = Zap::with("[rate_limit]\nrequests_per_minute = 1\n", &[a.backend("a", "")]);
    assert_eq!(limited.chat(CHAT).status, 200);
    for (zap, path, headers, status, code) in [
        (&open, "/chat", "content-length: 33554433\r\n", 413, "request_too_large"),
        (&open, "/chat", "content-length: 45\r\ncontent-encoding: gzip\r\n", 415, ENCODING),
        (&open, "/chat", "content-length: 45\r\ncontent-encoding: GZIP\r\n", 415, ENCODING),
        (&open, "/chat", "content-length: 45\r\ncontent-encoding: identity, gzip\r\n", 415, ENCODING),
        (&open, "/chat", "content-length: 45\r\nexpect: 200-ok\r\n", 417, "expectation_failed"),
        (&open, "/nothing", "content-length: 45\r\n", 404, "unknown_url"),
        (&open, "/health", "content-length: 45\r\n", 405, "method_not_allowed"),
        (&limited, "/chat", "content-length: 45\r\n", 429, "rate_limit_exceeded"),
    ] {
        let mut client = zap.client();
        client.send(format!("POST {path} HTTP/1.1\r\nhost: zap\r\nexpect: 100-continue\r\n{headers}\r\n"));
        let answer = client.response();
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{headers:?}");
        client.half_close();
        assert_eq!(client.rest().0, b"", "{headers:?}");
    }
    assert_eq!(a.count(), 1);
    open.wait_until_idle();
    limited.wait_until_idle();
}

#[test]
fn c16_http_1_0_keeps_a_connection_only_on_request() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let length = CHAT.len();
    let chat =
        |headers: &str| format!("POST /chat HTTP/1.0\r\n{headers}content-length: {length}\r\n\r\n{CHAT}");
    let keep = ["connection: keep-alive\r\n", "host: a\r\nconnection: Keep-Alive\r\n"];
    let mut client = zap.client();
    for headers in keep {
        client.send(chat(headers));
        let answer = client.response();
        assert_eq!((answer.status, answer.text()), (200, "ok"));
        assert_eq!((answer.header("transfer-encoding"), answer.header("content-length")), (None, Some("2")));
        assert!(client.is_quiet(), "the connection must stay open without further bytes");
    }
    client.send(chat(""));
    assert_eq!(client.response().text(), "ok");
    assert_eq!(client.rest(), (Vec::new(), true));
    assert_eq!(a.count(), 3);
    zap.wait_until_idle();
}

#[test]
fn c17_other_methods_get_a_405_with_allow() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    for path in ["/chat", "/v1/chat/completions"] {
        for method in ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "post"] {
            let answer =
                ask(&zap, &format!("{method} {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"));
            assert_eq!((answer.status, answer.code().as_str()), (405, "method_not_allowed"), "{method}");
            assert_eq!(answer.header("allow"), Some("POST"), "{method}");
        }
    }
    assert_eq!(a.count(), 0);
    zap.wait_until_idle();
}

/// Asserts that `bytes` get one 400, that the connection closes, and that nothing after the 400 is sent.
fn assert_one_400_and_close(zap: &Zap, bytes: &[u8], what: &str) {
    let mut client = zap.client();
    client.try_send(bytes);
    let answer = client.response();
    assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"), "{what}");
    assert_eq!(answer.header("connection"), Some("close"), "{what}");
    assert_eq!(client.rest().0, b"", "{what}");
}

const SMUGGLED: &str = "0\r\n\r\nGET /health HTTP/1.1\r\nhost: a\r\n\r\n";

#[test]
fn c18_every_vector_of_the_desync_suite_is_refused() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let suite: serde_json::Value = serde_json::from_str(include_str!("data/desync.json")).unwrap();
    let vectors = suite["vectors"].as_array().unwrap();
    assert_eq!(vectors.len(), 58);
    for vector in vectors {
        let text = |i: usize| vector[i].as_str().unwrap();
        let headers = vector[4].as_array().unwrap();
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|h| (h[0].as_str().unwrap(), h[1].as_str().unwrap())).collect();
        // Without a host header every vector would be refused for that reason alone.
        let has_host = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host"));
        let host = if has_host { "" } else { "Host: localhost\r\n" };
        let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!("{} {} {}\r\n{host}{lines}\r\n{SMUGGLED}", text(1), text(2), text(3));
        // Each character of the JSON text stands for one byte.
        let bytes: Vec<u8> = request.chars().map(|c| u8::try_from(c).unwrap()).collect();
        assert_one_400_and_close(&zap, &bytes, text(0));
    }
    assert_eq!(a.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn c18_content_length_with_transfer_encoding_is_refused_in_either_order() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let (length, coding) = (format!("content-length: {}\r\n", CHAT.len()), "transfer-encoding: chunked\r\n");
    for headers in [format!("{length}{coding}"), format!("{coding}{length}")] {
        let request = format!("POST /chat HTTP/1.1\r\nhost: a\r\n{headers}\r\n{SMUGGLED}");
        assert_one_400_and_close(&zap, request.as_bytes(), &headers);
    }
    assert_eq!(a.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn c19_random_bytes_are_closed_in_time_and_the_next_client_is_served() {
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let mut rng = fastrand::Rng::with_seed(19);
    let mut noise = |n: usize| (0..n).map(|_| rng.u8(..)).collect::<Vec<u8>>();
    // A record of 512 bytes that holds a ClientHello of 508.
    let hello = [&[0x16u8, 3, 1, 2, 0, 1, 0, 1, 0xFC, 3, 3][..], &noise(506)[..]].concat();
    let mut texts = vec![hello];
    for size in [1, 7, 300, 5_000, 100_000] {
        let some = noise(size);
        let without_lf: Vec<u8> = some.iter().copied().filter(|b| *b != b'\n').collect();
        texts.push([&without_lf[..], &b"\n"[..]].concat());
        texts.push([&b"GET "[..], &without_lf[..]].concat());
        texts.push(without_lf);
        texts.push(some);
    }
    let since = Instant::now();
    let streams: Vec<TcpStream> = texts
        .iter()
        .map(|text| {
            let mut stream = TcpStream::connect(zap.address).unwrap();
            // Zap may refuse the request before all of it is sent.
            let _ = stream.write_all(text);
            stream
        })
        .collect();
    assert_eq!(zap.chat(CHAT).text(), "ok");
    for (mut stream, text) in streams.into_iter().zip(&texts) {
        let shown = String::from_utf8_lossy(&text[..text.len().min(20)]);
        stream.set_read_timeout(Some(secs(12))).unwrap();
        let mut got = Vec::new();
        if let Err(e) = stream.read_to_end(&mut got) {
            assert_eq!(e.kind(), ErrorKind::ConnectionReset, "{shown:?} of {}", text.len());
        }
        assert!(got.is_empty() || got.starts_with(b"HTTP/1.1 4"), "{:?}", String::from_utf8_lossy(&got));
        assert!(since.elapsed() < secs(12), "{shown:?} of {}: {:?}", text.len(), since.elapsed());
    }
    assert_eq!(zap.chat(CHAT).text(), "ok");
    assert_eq!(a.count(), 2);
    zap.wait_until_idle();
}

#[test]
fn o1_of_200_concurrent_requests_all_beyond_14_are_refused() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let zap = Zap::with("[queue]\nmax_in_flight = 4\nmax_size = 10", &[a.backend("a", "")]);
    let mut clients: Vec<Client> = (0..200).map(|_| zap.client()).collect();
    std::thread::scope(|s| {
        for part in clients.chunks_mut(25) {
            s.spawn(move || part.iter_mut().for_each(|c| c.post("/chat", "", CHAT)));
        }
    });
    eventually("186 requests are refused", || {
        zap.metric("zap_rejected_total{reason=\"queue_full\"}") == 186.0
    });
    eventually("the backend holds four requests", || gate.waiting() == 4);
    assert_eq!(zap.metric("zap_queue_depth"), 10.0);
    // Refuse one at a time, so that the requests do not compete for the CPU.
    let refuse = || {
        let mut client = zap.client();
        let since = Instant::now();
        assert_eq!(client.chat("", CHAT).code(), "queue_full");
        since.elapsed()
    };
    let mut took: Vec<Duration> = (0..50).map(|_| refuse()).collect();
    took.sort_unstable();
    assert!(took[25] < Duration::from_millis(5), "half of the refusals took more than {:?}", took[25]);
    gate.open(14);
    let answers: Vec<Response> = clients.iter_mut().map(Client::response).collect();
    assert_eq!(answers.iter().filter(|r| r.status == 200).count(), 14);
    for refused in answers.iter().filter(|r| r.status != 200) {
        assert_eq!((refused.status, refused.code().as_str()), (503, "queue_full"));
        assert_eq!(refused.header("retry-after"), Some("1"));
    }
    assert_eq!(a.count(), 14);
    zap.wait_until_idle();
}

#[test]
fn o2_exactly_the_limit_passes_for_each_of_100_keys() {
    const KEYS: usize = 100;
    const LIMIT: usize = 3;
    let a = Provider::named("ok");
    let settings = format!("[rate_limit]\nrequests_per_minute = {LIMIT}\n");
    let zap = Zap::with(&settings, &[a.backend("a", "")]);
    let one_of_each = |_| (0..KEYS).map(|_| zap.client()).collect::<Vec<Client>>();
    let mut crowd: Vec<Vec<Client>> = (0..=LIMIT).map(one_of_each).collect();
    let barrier = Barrier::new(crowd.len());
    let ask_all = |clients: &mut Vec<Client>| {
        barrier.wait();
        for (i, client) in clients.iter_mut().enumerate() {
            client.post("/chat", &format!("authorization: Bearer k{i}\r\n"), CHAT);
        }
        clients.iter_mut().map(|c| c.response().status).collect::<Vec<u16>>()
    };
    let statuses: Vec<Vec<u16>> = std::thread::scope(|s| {
        let ask_all = &ask_all;
        let threads: Vec<_> = crowd.iter_mut().map(|clients| s.spawn(move || ask_all(clients))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for key in 0..KEYS {
        let of_key: Vec<u16> = statuses.iter().map(|s| s[key]).collect();
        assert_eq!(of_key.iter().filter(|s| **s == 200).count(), LIMIT, "{of_key:?}");
        assert_eq!(of_key.iter().filter(|s| **s == 429).count(), 1, "{of_key:?}");
    }
    assert_eq!(a.count(), KEYS * LIMIT);
    assert_eq!(zap.metric("zap_rate_limit_keys"), KEYS as f64);
    zap.wait_until_idle();
}

#[test]
fn o3_a_million_keys_take_bounded_memory_and_active_keys_keep_their_windows() {
    const MAX: usize = 100_000;
    const LIMIT: u32 = 3;
    // Each window brings three times as many keys as are tracked. Each active key returns every 5 s.
    const STEP: u64 = WINDOW / 300_000;
    const LIVE: u64 = 50;
    let hash = |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let limiter = Limiter::new(MAX);
    let mut windows = vec![Vec::<u64>::new(); LIVE as usize];
    let (mut most, mut refused) = (0usize, 0u32);
    for i in 0..1_000_000u64 {
        let now = (i + 1) * STEP;
        assert!(limiter.check(hash(i), LIMIT, now).admitted, "the new key {i} is refused");
        most = most.max(limiter.keys());
        if !i.is_multiple_of(500) {
            continue;
        }
        let n = i / 500 % LIVE;
        let window = &mut windows[n as usize];
        window.retain(|at| at + WINDOW > now);
        let admitted = window.len() < LIMIT as usize;
        if admitted {
            window.push(now);
        }
        let remaining = LIMIT - window.len() as u32;
        let reset = if remaining > 0 { 0 } else { window[0] + WINDOW - now };
        let want = Decision { admitted, limit: LIMIT, remaining, reset };
        assert_eq!(limiter.check(hash(10_000_000 + n), LIMIT, now), want, "{n} at {now}");
        refused += u32::from(!admitted);
    }
    assert!((MAX..=MAX + 8).contains(&most), "{most}");
    assert!(refused > 500, "{refused}");
}

#[cfg(debug_assertions)]
#[test]
fn o6_a_panic_before_the_response_fails_its_own_request_only() {
    let a = Provider::named("ok");
    let zap = Zap::with("[server]\nworkers = 1", &[a.backend("a", "")]);
    let mut other = zap.client();
    assert_eq!(other.chat("", CHAT).text(), "ok");
    zap::internals::failpoint::arm_panic("try", http::HeaderValue::from_static("bug-try"));
    let mut client = zap.client();
    let broken = client.chat("x-request-id: bug-try\r\n", CHAT);
    assert_eq!((broken.status, broken.code().as_str()), (500, "internal_error"));
    assert_eq!(broken.header("x-request-id"), Some("bug-try"));
    assert_eq!(broken.header("x-zap-attempts"), Some("1"));
    assert_eq!(broken.header("connection"), Some("close"));
    assert_eq!(client.rest().0, b"");
    zap.wait_until_idle();
    let all = zap.metrics();
    assert_eq!(all["zap_requests_total{endpoint=\"chat\",backend=\"\",status=\"500\"}"], 1.0);
    assert_eq!(all["zap_rejected_total{reason=\"internal_error\"}"], 1.0);
    assert_eq!(other.chat("", CHAT).text(), "ok");
    assert_eq!(zap.client().chat("x-request-id: bug-try\r\n", CHAT).text(), "ok");
    assert_eq!(a.count(), 3);
    zap.wait_until_idle();
}

#[cfg(debug_assertions)]
#[test]
fn o6_a_panic_during_a_response_cuts_that_response_only() {
    let (bad, good) = (Gate::default(), Gate::default());
    let (gate_of_bad, gate_of_good) = (bad.clone(), good.clone());
    let a = Provider::start(move |seen, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        if seen.header("x-request-id") == Some("bug-body") {
            gate_of_bad.pass();
        } else {
            gate_of_good.pass();
        }
        chunk(stream, "data: two\n\ndata: [DONE]\n\n");
        crate::support::provider::end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with("[server]\nworkers = 1", &[a.backend("a", "")]);
    let (mut client, mut other) = (zap.client(), zap.client());
    other.post("/chat", "", STREAM);
    let mut whole = other.head();
    client.post("/chat", "x-request-id: bug-body\r\n", STREAM);
    let mut cut = client.head();
    assert_eq!((whole.status, cut.status), (200, 200));
    assert_eq!(
        (&*other.chunk().unwrap(), &*client.chunk().unwrap()),
        (&b"data: one\n\n"[..], &b"data: one\n\n"[..])
    );
    zap::internals::failpoint::arm_panic("body", http::HeaderValue::from_static("bug-body"));
    bad.open(1);
    client.body(&mut cut);
    assert!(!cut.whole && cut.body.is_empty(), "{cut:?}");
    eventually("the disconnect is counted", || {
        zap.metric("zap_rejected_total{reason=\"internal_error\"}") == 1.0
    });
    good.open(2);
    other.body(&mut whole);
    assert!(whole.whole && whole.text().ends_with("data: [DONE]\n\n"), "{whole:?}");
    assert!(zap.chat(STREAM).whole);
    zap.wait_until_idle();
}

/// Sends `request` on a new connection and returns all bytes up to its end.
fn raw(zap: &Zap, request: &str) -> String {
    let mut client = zap.client();
    client.try_send(request);
    String::from_utf8_lossy(&client.rest().0).into_owned()
}

#[test]
fn s1_a_backend_key_is_in_no_response_whatever_fails() {
    let a = Provider::start(|seen, stream| {
        let key = seen.header("authorization").or(seen.header("x-api-key")).unwrap_or_default();
        let body: serde_json::Value = serde_json::from_slice(&seen.body).unwrap();
        match body["model"].as_str().unwrap() {
            "cut" => {
                start_events(stream);
                chunk(stream, "data: one\n\n");
            }
            "gone" => {}
            kind if kind.starts_with("events by ") => {
                let ask = Ask::of(seen.line.split(' ').nth(1).unwrap(), &seen.body);
                let (before, content, _) = ask.parts();
                let error = format!("{{\"message\":\"bad {key}\",\"code\":\"bad\"}}");
                let error = match ask.api {
                    Api::Messages => {
                        format!("event: error\ndata: {{\"type\":\"error\",\"error\":{error}}}\n\n")
                    }
                    Api::Responses => format!(
                        "event: response.failed\ndata: {{\"type\":\"response.failed\",\"response\":{{\"error\":{error}}}}}\n\n"
                    ),
                    Api::Chat | Api::Completions => format!("data: {{\"error\":{error}}}\n\n"),
                };
                start_events(stream);
                let events = [&before, content, &error, &error].concat();
                for piece in events.as_bytes().chunks(kind["events by ".len()..].parse().unwrap()) {
                    chunk(stream, std::str::from_utf8(piece).unwrap());
                }
                end_chunks(stream);
                return After::Keep;
            }
            "beside" => {
                let body = format!("{{\"choices\":[{{\"index\":0}}],\"error\":{{\"message\":\"{key}\"}}}}");
                reply(stream, 200, "content-type: application/json\r\n", body.as_bytes());
                return After::Keep;
            }
            "noise" => {
                let _ = stream.write_all(format!("HTTP/9 {key}\r\n\r\n{key}").as_bytes());
            }
            status => {
                // A request waits for a short cooldown, and gets the 429 if the cooldown is long.
                let wait = if status == "429" { 60_000 } else { 1 };
                let echo =
                    format!("x-echo: {key}\r\nlocation: http://evil/{key}\r\nretry-after-ms: {wait}\r\n");
                reply(stream, status.parse().unwrap(), &echo, format!("{{\"key\":\"{key}\"}}").as_bytes());
                return After::Keep;
            }
        }
        After::Close
    });
    let settings = "[health]\ninterval_secs = 600\nfailure_threshold = 1000\n\
        [retry]\nbase_delay_ms = 1\nmax_delay_ms = 1\n";
    let zap = Zap::with(settings, &[a.backend("a", "api_key = \"sk-CANARY-0123456789\"")]);
    let mut answers = Vec::new();
    for (head, status) in [
        ("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n{", 400),
        ("POST /chat HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 400),
        ("GET /nothing HTTP/1.1\r\nhost: a\r\n\r\n", 404),
        ("GET /chat HTTP/1.1\r\nhost: a\r\n\r\n", 405),
        ("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: 999999999\r\n\r\n", 413),
        ("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-encoding: br\r\n\r\n", 415),
        ("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\nexpect: more\r\n\r\n", 417),
        ("GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n", 200),
    ] {
        // `connection: close`, so that the response ends with the connection.
        answers.push((raw(&zap, &head.replacen("\r\n", "\r\nconnection: close\r\n", 1)), status));
    }
    assert_eq!(a.count(), 0);
    for (fault, status) in [
        ("400", 400),
        ("404", 404),
        ("500", 500),
        ("529", 529),
        ("429", 429),
        ("307", 502),
        ("cut", 200),
        ("gone", 502),
        ("noise", 502),
        ("beside", 200),
        ("401", 502),
    ] {
        // A model of its own, so that the cooldown of one fault does not concern the next.
        let request = post(&format!("{{\"messages\":[],\"model\":\"{fault}\"}}"));
        answers.push((raw(&zap, &request.replacen("\r\n", "\r\nconnection: close\r\n", 1)), status));
        let seen = a.seen();
        let key = seen.last().unwrap().header("authorization");
        assert_eq!(key, Some("Bearer sk-CANARY-0123456789"), "{fault}");
    }
    // Another gateway, since the last fault has closed the backend.
    let both = "protocols = [\"openai\", \"anthropic\"]\napi_key = \"sk-CANARY-0123456789\"";
    let of_streams = Zap::with(settings, &[a.backend("a", both)]);
    for (ask, size) in
        Ask::ALL.iter().filter(|ask| ask.is_stream).flat_map(|ask| [(ask, 1), (ask, 9), (ask, 999)])
    {
        let mut client = of_streams.client();
        client.post(ask.path(), "connection: close\r\n", ask.body(&format!("events by {size}")));
        let answer = String::from_utf8_lossy(&client.rest().0).into_owned();
        assert!(answer.contains("good"), "the error is behind content: {answer}");
        let text: String = answer.split("\r\n").collect();
        let key = if ask.api == Api::Messages { "***" } else { "Bearer ***" };
        assert_eq!(text.matches(&format!("\"message\":\"bad {key}\"")).count(), 2, "{answer}");
        answers.push((answer, 200));
    }
    for (answer, status) in &answers {
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "not {status}: {answer}");
        assert!(!answer.contains("CANARY"), "{answer}");
    }
    for path in ["/metrics", "/status"] {
        let answer = zap.client().get(path);
        assert!(!answer.headers.iter().any(|(_, v)| v.contains("CANARY")), "{path}");
        assert!(!answer.text().contains("CANARY"), "{path}");
    }
    zap.wait_until_idle();
}

#[test]
fn s2_nothing_that_a_client_sends_leaks_to_the_backend_or_changes_the_route() {
    let evil = Provider::named("evil");
    let headers = format!(
        "authorization: Bearer sk-client\r\ncookie: a=sk-client\r\nx-api-key: sk-client\r\n\
        connection: authorization, x-custom\r\nx-custom: sk-client\r\n\
        x-forwarded-host: {0}\r\nx-api-base: http://{0}\r\nx-zap-backend: evil\r\n",
        evil.address
    );
    let body = format!(
        "{{\"api_base\":\"http://{0}\",\"base_url\":\"http://{0}/v1\",\"api_key\":\"mine\",\"messages\":[]}}",
        evil.address
    );
    for (more, key) in [
        ("", None),
        ("api_key = \"sk-own\"", Some("Bearer sk-own")),
        // Forwarding is configured, but `Connection` names the header, so it is hop-by-hop and not forwarded.
        ("forward_authorization = true", None),
    ] {
        let a = Provider::named("a");
        let zap = Zap::with(NO_PROBES, &[a.backend("a", more)]);
        let answer = zap.client().chat(&headers, &body);
        assert_eq!((answer.text(), answer.header("x-zap-backend")), ("a", Some("a")));
        let seen = a.seen().remove(0);
        assert_eq!(seen.line, "POST /v1/chat/completions HTTP/1.1");
        assert_eq!(seen.header("host"), Some(a.address.to_string().as_str()));
        assert_eq!(seen.header("authorization"), key);
        for (name, value) in &seen.headers {
            let is_own = !["cookie", "x-api-key", "x-custom", "connection"].contains(&name.as_str());
            assert!(is_own && !value.contains("sk-client") && !value.contains("evil"), "{name}: {value}");
            assert!(!value.contains(&evil.address.to_string()), "{name}: {value}");
        }
        assert_eq!(String::from_utf8_lossy(&seen.body), body);
        zap.wait_until_idle();
    }
    assert_eq!((evil.count(), evil.probes().len(), evil.connections()), (0, 0, 0));
}

#[test]
fn s3_thousands_of_models_paths_and_methods_make_no_series() {
    const EACH: usize = 4_000;
    const THREADS: usize = 4;
    let a = Provider::named("ok");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let one_of_each = |client: &mut Client, i: usize| {
        assert_eq!(client.get(&format!("/path{i}")).status, 404);
        assert_eq!(client.chat("", format!("{{\"messages\":[],\"model\":\"m{i}\"}}")).status, 200);
        client.send(format!("M{i} /chat HTTP/1.1\r\nhost: h{i}\r\n\r\n"));
        assert_eq!(client.response().status, 405);
    };
    let series = || {
        let mut names: Vec<String> = zap.metrics().into_keys().collect();
        names.sort_unstable();
        names
    };
    let chats = || zap.metric("zap_request_duration_seconds_count{endpoint=\"chat\"}");
    one_of_each(&mut zap.client(), EACH);
    eventually("all requests are counted", || chats() == 2.0);
    let before = series();
    std::thread::scope(|s| {
        for first in 0..THREADS {
            let (zap, one_of_each) = (&zap, &one_of_each);
            s.spawn(move || {
                let mut client = zap.client();
                (first..EACH).step_by(THREADS).for_each(|i| one_of_each(&mut client, i));
            });
        }
    });
    eventually("all requests are counted", || chats() == (2 * EACH + 2) as f64);
    assert_eq!(series(), before);
    zap.wait_until_idle();
}
