//! Faults of upstreams: rows U1 to U23 of the table of faults, except those tested in other files.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use socket2::SockRef;

use crate::support::provider::{
    After, Gate, backend, blackhole, chunk, end_chunks, reply, start_events, wait_closed,
};
use crate::support::{CHAT, Provider, STREAM, Zap, eventually, within};

/// A backoff of 1 to 2 ms, no ejection, one probe at the start.
const QUICK: &str =
    "[retry]\nbase_delay_ms = 1\nmax_delay_ms = 2\n[health]\ninterval_secs = 600\nfailure_threshold = 1000\n";

/// Like [`QUICK`], with a backoff of ten minutes.
const SLOW: &str = "[retry]\nbase_delay_ms = 600000\nmax_delay_ms = 600000\n\
    [health]\ninterval_secs = 600\nfailure_threshold = 1000\n";

const JSON: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";

/// [`QUICK`] with `max_retries = n`.
fn retries(n: usize) -> String {
    QUICK.replace("[retry]", &format!("[retry]\nmax_retries = {n}"))
}

/// Ends a provider's connection with a FIN.
fn eof(_: &mut TcpStream) -> After {
    After::Close
}

/// Ends a provider's connection with a reset. [`Provider`] shuts its stream down before it drops it, which would
/// send a FIN first; so its stream is replaced by another one, and dropping the old one sends the reset.
fn reset(stream: &mut TcpStream) -> After {
    SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).unwrap();
    let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap();
    *stream = TcpStream::connect(elsewhere.local_addr().unwrap()).unwrap();
    After::Close
}

/// The peer addresses of all connections that a provider has served.
type Peers = Arc<Mutex<HashSet<SocketAddr>>>;

fn note(peers: &Peers, stream: &TcpStream) {
    peers.lock().unwrap().extend(stream.peer_addr().ok());
}

/// A server without HTTP: `serve` gets each connection, on a new thread. [`Provider`] can neither send bytes before
/// a request nor stop in the middle of one. The server stops when dropped.
struct Raw {
    address: SocketAddr,
    stopped: Arc<AtomicBool>,
}

impl Raw {
    fn start(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stopped = Arc::new(AtomicBool::new(false));
        let (theirs, serve) = (stopped.clone(), Arc::new(serve));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if theirs.load(Ordering::SeqCst) {
                    return;
                }
                let (serve, stream) = (serve.clone(), stream.unwrap());
                std::thread::spawn(move || serve(stream));
            }
        });
        Raw { address, stopped }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let since = Instant::now();
    let done = work();
    (done, since.elapsed())
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// The sum of all samples of a metric family.
fn sum(zap: &Zap, family: &str) -> f64 {
    zap.metrics().iter().filter(|(series, _)| series.starts_with(family)).map(|(_, value)| *value).sum()
}

/// The number of failed tries of this `kind` at `backend`.
fn errors(zap: &Zap, backend: &str, kind: &str) -> f64 {
    zap.metric(&format!("zap_upstream_errors_total{{backend=\"{backend}\",kind=\"{kind}\"}}"))
}

/// Whether `text` is exactly one `stream_interrupted` error event.
fn is_interruption(text: &str) -> bool {
    let event = text.strip_prefix("data: ").and_then(|t| t.strip_suffix("\n\n")).unwrap_or_default();
    let error: serde_json::Value = serde_json::from_str(event).unwrap_or_default();
    error["error"]["code"] == "stream_interrupted" && error["error"]["type"] == "upstream_error"
}

#[test]
fn u01_a_refused_connection_is_retried_without_delay_and_alone_is_a_502() {
    let b = Provider::named("b");
    // Backend a gets nine first tries in a row: retries do not advance the rotation.
    let zap = Zap::with(SLOW, &[backend(Provider::closed_port(), "a", "weight = 100"), b.backend("b", "")]);
    let mut client = zap.client();
    let ask = |_| {
        let (answer, took) = timed(|| client.chat("", CHAT));
        assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("b", Some("2")));
        took
    };
    let mut times: Vec<_> = (0..9).map(ask).collect();
    times.sort_unstable();
    assert!(times[4] < millis(100), "{times:?}");
    zap.wait_until_idle();

    let zap = Zap::with(QUICK, &[backend(Provider::closed_port(), "a", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_unreachable"));
    assert_eq!(answer.header("x-zap-attempts"), Some("3"));
    zap.wait_until_idle();
}

#[test]
fn u02_an_unanswered_connect_ends_after_connect_ms_and_alone_is_a_504() {
    let (address, _held) = blackhole();
    let b = Provider::named("b");
    let settings = format!("{QUICK}[timeouts]\nconnect_ms = 300\n");
    let zap = Zap::with(&settings, &[backend(address, "a", "weight = 9"), b.backend("b", "")]);
    let (answer, took) = timed(|| zap.chat(CHAT));
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("b", Some("2")));
    assert!(took >= millis(300) && took < millis(800), "{took:?}");
    assert_eq!(errors(&zap, "a", "upstream_timeout"), 1.0);
    zap.wait_until_idle();

    let zap = Zap::with(&settings, &[backend(address, "a", "")]);
    let (answer, took) = timed(|| zap.chat(CHAT));
    assert_eq!((answer.status, answer.code().as_str()), (504, "upstream_timeout"));
    assert!(took >= millis(300) && took < millis(2_000), "{took:?}");
    zap.wait_until_idle();
}

/// Reads the request, sends no response and waits until Zap closes the connection.
fn silent() -> Provider {
    Provider::start(|_, stream| {
        wait_closed(stream);
        After::Close
    })
}

#[test]
fn u03_a_silent_backend_is_tried_once_even_if_others_are_retried() {
    let (a, b) = (silent(), Provider::fixed(500, "", "b failed"));
    let n = AtomicUsize::new(0);
    let c = Provider::start(move |_, stream| {
        match n.fetch_add(1, Ordering::SeqCst) {
            0 => reply(stream, 500, "", b"c failed"),
            _ => reply(stream, 200, "", b"c"),
        }
        After::Keep
    });
    let settings = format!("{}[timeouts]\nfirst_byte_secs = 1\n", retries(6));
    let all = [a.backend("a", "weight = 9"), b.backend("b", ""), c.backend("c", "")];
    let zap = Zap::with(&settings, &all);
    let (answer, took) = timed(|| zap.chat(STREAM));
    assert_eq!((answer.status, answer.text()), (200, "c"));
    assert_eq!((a.count(), c.count()), (1, 2));
    assert!((1..=2).contains(&b.count()), "{}", b.count());
    // The head of a stream has its own clock, as long as another target is left.
    assert!(took > millis(900) && took < millis(2_000), "{took:?}");
    assert_eq!(errors(&zap, "a", "upstream_timeout"), 1.0);
    eventually("the connection to the silent backend is closed", || a.connections() == 0);
    zap.wait_until_idle();
}

#[test]
fn u03_a_silent_backend_is_not_retried_even_if_all_others_fail() {
    let (a, b) = (silent(), Provider::fixed(500, "", "b failed"));
    let settings = format!("{}[timeouts]\nfirst_byte_secs = 1\n", retries(4));
    let zap = Zap::with(&settings, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
    let answer = zap.chat(STREAM);
    assert_eq!((answer.status, answer.text()), (500, "b failed"));
    assert_eq!((a.count(), b.count(), answer.header("x-zap-attempts")), (1, 4, Some("5")));
    zap.wait_until_idle();
}

/// A slow answer without streaming is paid for at its backend, and the last target that can be asked may be as slow.
#[test]
fn u03_a_plain_request_and_the_last_target_of_a_stream_wait_for_a_slow_backend() {
    let slow = || {
        Provider::start(|_, stream| {
            std::thread::sleep(millis(2_500));
            reply(stream, 200, "", b"slow");
            After::Keep
        })
    };
    let (a, b) = (slow(), Provider::named("b"));
    let settings = format!("{QUICK}[timeouts]\nfirst_byte_secs = 1\nfirst_token_secs = 1\n");
    let zap = Zap::with(&settings, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
    let alone = Zap::with(&settings, &[a.backend("a", "")]);
    std::thread::scope(|s| {
        for (zap, body) in [(&zap, CHAT), (&alone, CHAT), (&alone, STREAM)] {
            s.spawn(move || {
                let (answer, took) = timed(|| zap.chat(body));
                assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("slow", Some("1")), "{body}");
                assert!(took > millis(2_400), "{took:?}");
            });
        }
    });
    assert_eq!((a.count(), b.count()), (3, 0));
    zap.wait_until_idle();
}

#[test]
fn u04_a_reset_after_the_request_is_retried_elsewhere() {
    let a = Provider::start(|_, stream| reset(stream));
    let b = Provider::named("b");
    let zap = Zap::with(QUICK, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("b", Some("2")));
    assert_eq!((a.count(), errors(&zap, "a", "upstream_unreachable")), (1, 1.0));
    zap.wait_until_idle();

    let zap = Zap::with(QUICK, &[a.backend("a", "")]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_unreachable"));
    assert_eq!((a.count(), errors(&zap, "a", "upstream_unreachable")), (4, 3.0));
    zap.wait_until_idle();
}

#[test]
fn u04_a_reset_while_the_request_is_sent_is_retried_elsewhere_with_the_whole_body() {
    let a = Raw::start(|mut stream| {
        let _ = stream.read_exact(&mut [0; 64]);
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    });
    let b = Provider::named("b");
    let zap = Zap::with(QUICK, &[backend(a.address, "a", "weight = 9"), b.backend("b", "")]);
    let body = format!(r#"{{"messages":["{}"]}}"#, "x".repeat(8 << 20));
    let answer = zap.chat(&body);
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("b", Some("2")));
    assert!(b.seen()[0].body == body.as_bytes(), "backend b must get the same body");
    assert_eq!(errors(&zap, "a", "upstream_unreachable"), 1.0);
    zap.wait_until_idle();
}

#[test]
fn u05_no_client_sees_the_close_of_an_idle_upstream_connection() {
    let peers = Peers::default();
    let theirs = peers.clone();
    let a = Provider::start(move |_, stream| {
        note(&theirs, stream);
        reply(stream, 200, "", b"ok");
        // Close after two kernel ticks without a request: 2 to 8 ms.
        stream.set_read_timeout(Some(millis(1))).unwrap();
        After::Keep
    });
    let settings = "[retry]\nmax_retries = 0\n[health]\nfailure_threshold = 1\n[server]\nworkers = 4\n";
    let zap = Zap::with(settings, &[a.backend("a", "")]);
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                let mut client = zap.client();
                for _ in 0..500 {
                    let answer = client.chat("", CHAT);
                    assert_eq!((answer.status, answer.text()), (200, "ok"));
                    // Sometimes shorter and sometimes longer than that idle time.
                    std::thread::sleep(Duration::from_micros(fastrand::u64(1_000..10_000)));
                }
            });
        }
    });
    let opened = peers.lock().unwrap().len();
    assert!(opened > 50 && opened < 2_000, "the close never raced with a request: {opened} connections");
    assert_eq!(a.count(), 2_000);
    assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0);
    assert_eq!(errors(&zap, "a", "upstream_unreachable"), 0.0);
    assert_eq!((sum(&zap, "zap_upstream_errors_total"), sum(&zap, "zap_retries_total")), (0.0, 0.0));
    zap.wait_until_idle();
}

#[test]
fn u06_a_response_cut_before_its_content_is_retried_elsewhere_and_alone_is_a_502() {
    const EVENTS: &str = "content-type: text/event-stream\r\n";
    const ROLE: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
    let ends: [fn(&mut TcpStream) -> After; 2] = [eof, reset];
    // A short JSON body is read as a whole before its head goes out, and a stream up to its first content.
    for (headers, begun, body) in [
        ("content-type: application/json\r\n", "", CHAT),
        ("content-type: application/json\r\n", r#"{"choices":[{"mess"#, CHAT),
        ("", r#"{"choices":[{"mess"#, CHAT),
        (EVENTS, "", STREAM),
        (EVENTS, "data: {\"cho", STREAM),
        (EVENTS, ": hello\n\ndata: {\"cho", STREAM),
        (EVENTS, ROLE, STREAM),
    ] {
        for framing in ["content-length: 500", "transfer-encoding: chunked"] {
            for (i, end) in ends.into_iter().enumerate() {
                let shown = format!("{headers}{framing}, {begun}, {i}");
                let a = Provider::start(move |_, stream| {
                    let head = format!("HTTP/1.1 200 OK\r\n{headers}{framing}\r\n\r\n");
                    let size = if begun.is_empty() || framing.contains("length") { "" } else { "1f4\r\n" };
                    let _ = stream.write_all(format!("{head}{size}{begun}").as_bytes());
                    end(stream)
                });
                let b = Provider::named("b");
                let zap = Zap::with(QUICK, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
                let answer = zap.chat(body);
                assert_eq!((answer.status, answer.text()), (200, "b"), "{shown}");
                assert_eq!(answer.header("x-zap-attempts"), Some("2"), "{shown}");
                assert_eq!(errors(&zap, "a", "stream_interrupted"), 1.0, "{shown}");
                assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 0.0, "{shown}");
                zap.wait_until_idle();

                // Without another target, the first event of a stream goes out at once.
                if begun.contains("\n\n") {
                    continue;
                }
                let zap = Zap::with(QUICK, &[a.backend("a", "")]);
                let answer = zap.chat(body);
                let found = (answer.status, answer.code());
                assert_eq!(found, (502, "upstream_unreachable".to_owned()), "{shown}");
                assert_eq!((answer.header("x-zap-attempts"), answer.whole), (Some("3"), true), "{shown}");
                zap.wait_until_idle();
            }
        }
    }
}

#[test]
fn u07_a_reset_mid_stream_ends_with_an_error_event_and_a_close() {
    let gate = Gate::default();
    let held = gate.clone();
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, "data: one\n\n");
        held.pass();
        reset(stream)
    });
    let zap = Zap::with(QUICK, &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    let mut answer = client.head();
    assert_eq!(client.chunk().unwrap(), b"data: one\n\n");
    gate.open(1);
    client.body(&mut answer);
    assert!(!answer.whole && is_interruption(answer.text()), "{}", answer.text());
    assert_eq!(client.rest(), (Vec::new(), true));
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 1.0);
    assert_eq!((a.count(), errors(&zap, "a", "stream_interrupted")), (1, 1.0));
    zap.wait_until_idle();
}

#[test]
fn u07_a_stream_cut_after_it_has_begun_ends_with_an_error_event_and_a_close() {
    let ends: [fn(&mut TcpStream) -> After; 2] = [eof, reset];
    let role = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n";
    for begun in ["data: one\n\n", role] {
        for end in ends {
            let a = Provider::start(move |_, stream| {
                start_events(stream);
                chunk(stream, begun);
                end(stream)
            });
            let zap = Zap::with(QUICK, &[a.backend("a", "")]);
            let mut client = zap.client();
            let answer = client.chat("", STREAM);
            assert_eq!(answer.status, 200);
            let rest = answer.text().strip_prefix(begun).expect("the received events are delivered");
            assert!(!answer.whole && is_interruption(rest), "{rest}");
            assert_eq!(client.rest(), (Vec::new(), true));
            assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 1.0);
            assert_eq!((a.count(), errors(&zap, "a", "stream_interrupted")), (1, 1.0));
            zap.wait_until_idle();
        }
    }
}

#[test]
fn u07_a_cut_after_content_is_never_retried_and_of_another_body_has_a_kind_of_its_own() {
    for (headers, body, kind) in [
        ("content-type: text/event-stream\r\n", STREAM, "stream_interrupted"),
        ("content-type: text/plain\r\n", CHAT, "upstream_error"),
    ] {
        let a = Provider::start(move |_, stream| {
            let head = format!("HTTP/1.1 200 OK\r\n{headers}transfer-encoding: chunked\r\n\r\n");
            let _ = stream.write_all(head.as_bytes());
            chunk(stream, "data: one\n\n");
            After::Close
        });
        let b = Provider::named("b");
        let zap = Zap::with(QUICK, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
        let answer = zap.chat(body);
        assert!(answer.status == 200 && !answer.whole && answer.text().starts_with("data: one\n\n"));
        assert_eq!((b.count(), errors(&zap, "a", kind)), (0, 1.0), "{kind}");
        zap.wait_until_idle();
    }
}

#[test]
fn u07_a_cut_stream_with_content_length_is_counted_as_interrupted() {
    let a = Provider::start(|_, stream| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99\r\n\r\n";
        stream.write_all(format!("{head}data: one\n\n").as_bytes()).unwrap();
        After::Close
    });
    let zap = Zap::with(QUICK, &[a.backend("a", "")]);
    let answer = zap.chat(STREAM);
    assert_eq!((answer.text(), answer.whole), ("data: one\n\n", false));
    assert_eq!(zap.metric("zap_streams_interrupted_total{side=\"upstream\"}"), 1.0);
    zap.wait_until_idle();
}

#[test]
fn a_status_beyond_599_is_a_failure() {
    let (a, b) = (Provider::fixed(700, "", "what"), Provider::named("b"));
    let zap = Zap::with(QUICK, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
    assert_eq!(zap.chat(CHAT).text(), "b");
    let zap = Zap::with(QUICK, &[a.backend("a", "")]);
    assert_eq!(zap.chat(CHAT).status, 700, "no other backend has a better response");
    assert_eq!(zap.metric("zap_requests_total{endpoint=\"chat\",backend=\"a\",status=\"599\"}"), 1.0);
}

#[test]
fn u08_a_clean_end_without_a_terminal_event_is_a_cut_unless_the_answer_has_a_finish_reason() {
    const FINISH: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    const COMPLETED: &str = "data: {\"type\":\"response.completed\"}\n\n";
    let chat = ("/chat", STREAM);
    let completions = ("/v1/completions", r#"{"model":"m","prompt":"x","stream":true}"#);
    let responses = ("/v1/responses", r#"{"model":"m","input":"x","stream":true}"#);
    for ((path, body), last, is_whole) in [
        (chat, "", false),
        (completions, "", false),
        (responses, "", false),
        (chat, FINISH, true),
        (completions, FINISH, true),
        (responses, FINISH, false),
        (responses, "data: [DONE]\n\n", false),
        (responses, COMPLETED, true),
    ] {
        let a = Provider::start(move |_, stream| {
            start_events(stream);
            chunk(stream, &format!("data: one\n\n{last}"));
            end_chunks(stream);
            After::Keep
        });
        let zap = Zap::with(QUICK, &[a.backend("a", "")]);
        let mut client = zap.client();
        client.post(path, "", body);
        let answer = client.response();
        let rest = answer.text().strip_prefix(&*format!("data: one\n\n{last}")).expect("all events arrive");
        let interrupted = zap.metric("zap_streams_interrupted_total{side=\"upstream\"}");
        assert_eq!(interrupted, f64::from(u8::from(!is_whole)), "{path} {last}");
        match is_whole {
            true => assert_eq!((rest, answer.whole), ("", true), "{path} {last}"),
            // The body of `/v1/responses` ends cleanly, with an event of its own kind.
            false if path == "/v1/responses" => {
                assert!(
                    rest.starts_with("event: response.failed\n") && answer.whole,
                    "{path} {last}: {rest}"
                );
            }
            false => assert!(is_interruption(rest) && !answer.whole, "{path} {last}: {rest}"),
        }
        if answer.whole {
            assert!(client.is_quiet(), "{path} {last}");
        } else {
            assert_eq!(client.rest(), (Vec::new(), true), "{path} {last}");
        }
        zap.wait_until_idle();
    }
}

#[test]
fn u09_a_stall_is_cut_in_time_and_other_bodies_than_event_streams_are_aborted() {
    for (head, chunked, events) in [
        ("content-type: text/event-stream\r\ntransfer-encoding: chunked", true, true),
        // An event stream is known by its beginning, whatever its label says.
        ("content-type: application/json\r\ntransfer-encoding: chunked", true, true),
        ("content-type: application/json\r\ncontent-length: 500", false, false),
        ("content-type: application/json\r\nx-text: 1\r\ntransfer-encoding: chunked", true, false),
        ("content-type: application/json\r\nx-text: 1\r\ncontent-length: 500", false, false),
    ] {
        let text = if head.contains("x-text") { "\"one\n\n" } else { "data: one\n\n" };
        let a = Provider::start(move |_, stream| {
            let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n").as_bytes());
            let _ = if chunked { chunk(stream, text) } else { stream.write_all(text.as_bytes()).is_ok() };
            wait_closed(stream);
            After::Close
        });
        let zap = Zap::with(&format!("{QUICK}[timeouts]\nstream_idle_secs = 1\n"), &[a.backend("a", "")]);
        let mut client = zap.client();
        client.post("/chat", "", STREAM);
        let mut answer = client.head();
        let (_, took) = timed(|| client.body(&mut answer));
        // The clock of these limits has steps of 100 ms, longer on a busy machine, and may be one step late.
        assert!(took > millis(700) && took < millis(2_000), "{head}: {took:?}");
        let rest = answer.text().strip_prefix(text).expect("the received bytes are delivered");
        assert!(
            !answer.whole && is_interruption(rest) == events && rest.is_empty() != events,
            "{head}: {rest}"
        );
        assert_eq!(client.rest(), (Vec::new(), true), "{head}");
        eventually("the upstream connection is closed", || a.connections() == 0);
        assert_eq!(errors(&zap, "a", "upstream_timeout"), 1.0);
        zap.wait_until_idle();
    }
}

/// The kernel's send and receive queue, in bytes, of the socket at port `from` of a connection between two local
/// ports.
fn queued(from: u16, to: u16) -> (usize, usize) {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let (from, to) = (format!(":{from:04X}"), format!(":{to:04X}"));
    let found = table.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, remote) = (fields.next()?, fields.next()?);
        let (sending, reading) = fields.nth(1)?.split_once(':')?;
        let number = |hex: &str| usize::from_str_radix(hex, 16).ok();
        let is_it = local.ends_with(&from) && remote.ends_with(&to);
        if is_it { Some((number(sending)?, number(reading)?)) } else { None }
    });
    found.unwrap_or_default()
}

/// The hardest case: the client's socket is full, and Zap has less left to write than it is willing to buffer, so it
/// waits for both sides at once.
#[test]
fn u09_a_client_that_reads_nothing_is_closed_when_its_upstream_stalls() {
    // The ports of Zap and of the client.
    let ports = Arc::new(OnceLock::<(u16, u16)>::new());
    let is_silent = Arc::new(AtomicBool::new(false));
    let (theirs, fell_silent) = (ports.clone(), is_silent.clone());
    let a = Provider::start(move |_, stream| {
        let (zap, client) = *theirs.get().unwrap();
        let (own, peer) = (stream.local_addr().unwrap().port(), stream.peer_addr().unwrap().port());
        let grows_beyond = |before: usize| {
            let end = Instant::now() + millis(100);
            while Instant::now() < end {
                if queued(zap, client).0 > before {
                    return true;
                }
                std::thread::sleep(millis(2));
            }
            false
        };
        start_events(stream);
        let piece = format!("data: {}\n\n", "x".repeat(24 * 1024 - 8));
        for _ in 0..4096 {
            let before = queued(zap, client).0;
            chunk(stream, &piece);
            eventually("Zap has read the chunk", || queued(peer, own).1 == 0);
            if !grows_beyond(before) {
                fell_silent.store(true, Ordering::SeqCst);
                break;
            }
        }
        wait_closed(stream);
        After::Close
    });
    let settings = format!("{QUICK}[timeouts]\nstream_idle_secs = 1\n[server]\nmax_connections = 1\n");
    let zap = Zap::with(&settings, &[a.backend("a", "")]);
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&zap.address.into()).unwrap();
    let mut first = TcpStream::from(socket);
    ports.set((zap.address.port(), first.local_addr().unwrap().port())).unwrap();
    let head = format!("POST /chat HTTP/1.1\r\nhost: zap\r\ncontent-length: {}\r\n\r\n", STREAM.len());
    first.write_all([head.as_bytes(), STREAM.as_bytes()].concat().as_slice()).unwrap();
    // With very many open sockets each read of the kernel's table is slow.
    within(Duration::from_secs(60), "the upstream has stopped sending", || is_silent.load(Ordering::SeqCst));
    // Only one connection is allowed, so another client is served once the first is closed.
    let is_served = || zap.client().get("/v1/models").status == 200;
    within(Duration::from_secs(10), "the connection of the client is closed", is_served);
    eventually("the upstream connection is closed", || a.connections() == 0);
    zap.wait_until_idle();
    drop(first);
}

#[test]
fn u10_an_endless_stream_is_slowed_to_its_client_and_ends_with_it() {
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    let a = Provider::start(move |_, stream| {
        start_events(stream);
        let piece = "x".repeat(64 * 1024);
        while chunk(stream, &piece) {
            count.fetch_add(piece.len(), Ordering::SeqCst);
        }
        After::Close
    });
    let zap = Zap::with(QUICK, &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    client.head();
    let mut read = 0;
    while read < 64 << 20 {
        read += client.chunk().expect("the stream continues").len();
        // The kernel's buffers on both sides of Zap may hold this much, whatever Zap does.
        let ahead = sent.load(Ordering::SeqCst).saturating_sub(read);
        assert!(ahead < 48 << 20, "{ahead} bytes are in flight");
    }
    let since = Instant::now();
    drop(client);
    eventually("the upstream connection is closed", || a.connections() == 0);
    assert!(since.elapsed() < millis(250), "{:?}", since.elapsed());
    eventually("the disconnect is counted", || {
        let all = zap.metrics();
        all["zap_client_disconnects_total{phase=\"streaming\"}"] == 1.0
            && all["zap_streams_interrupted_total{side=\"client\"}"] == 1.0
    });
    zap.wait_until_idle();
}

#[test]
fn u11_an_invalid_or_ambiguous_response_is_a_502_and_its_connection_is_closed() {
    let body = "\r\n\r\n2\r\nok\r\n0\r\n\r\n";
    for bytes in [
        format!("{JSON}transfer-encoding: chunked\r\ncontent-length: 2{body}"),
        format!("{JSON}content-length: 12\r\ntransfer-encoding: chunked{body}"),
        format!("{JSON}transfer-encoding: chunked\r\ntransfer-encoding: chunked{body}"),
        format!("{JSON}transfer-encoding: gzip, chunked{body}"),
        format!("{JSON}transfer-encoding: gzip{body}"),
        format!("{JSON}content-length: 2\r\ncontent-length: 2\r\n\r\nok"),
        format!("{JSON}content-length: 2\r\ncontent-length: 3\r\n\r\nok"),
        format!("{JSON}content-length: 2, 2\r\n\r\nok"),
        format!("{JSON}content-length: -2\r\n\r\nok"),
        format!("{JSON}transfer-encoding: chunked\r\n\r\nxyz\r\nok\r\n0\r\n\r\n"),
        format!("{JSON}transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nok\r\n0\r\n\r\n"),
        format!("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked{body}"),
        "HTTP/9 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(),
        format!("\r\n{JSON}content-length: 2\r\n\r\nok"),
        format!("\n{JSON}content-length: 2\r\n\r\nok"),
        "garbage\r\n\r\n".to_owned(),
        "\x16\x03\x01\x02\x01\x01\x01\x02".to_owned(),
    ] {
        let shown = format!("{bytes:?}");
        let a = Provider::start(move |_, stream| {
            let _ = stream.write_all(bytes.as_bytes());
            After::Keep
        });
        let zap = Zap::with(&retries(0), &[a.backend("a", "")]);
        let answer = zap.chat(CHAT);
        assert_eq!(answer.status, 502, "{shown}");
        assert_eq!(answer.code(), "upstream_invalid_response", "{shown}");
        assert_eq!((answer.header("x-zap-attempts"), answer.whole), (Some("1"), true), "{shown}");
        assert_eq!(errors(&zap, "a", "upstream_invalid_response"), 1.0, "{shown}");
        eventually("the upstream connection is closed", || a.connections() == 0);
        zap.wait_until_idle();
    }
}

#[test]
fn u11_bytes_before_a_response_are_a_502() {
    let open = Arc::new(AtomicUsize::new(0));
    let theirs = open.clone();
    let a = Raw::start(move |mut stream| {
        theirs.fetch_add(1, Ordering::SeqCst);
        let _ = stream.write_all(b"220 ready\r\n");
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
        theirs.fetch_sub(1, Ordering::SeqCst);
    });
    let zap = Zap::with(&retries(0), &[backend(a.address, "a", "")]);
    // Several rounds, because the scheduler decides whether the bytes arrive before the request is sent.
    for _ in 0..20 {
        let answer = zap.chat(CHAT);
        assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_invalid_response"));
    }
    eventually("all upstream connections are closed", || open.load(Ordering::SeqCst) == 0);
    zap.wait_until_idle();
}

const POISON: &str = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison";

#[test]
fn u11_bytes_after_a_response_reach_no_client() {
    for first in ["content-length: 3\r\n\r\none", "transfer-encoding: chunked\r\n\r\n3\r\none\r\n0\r\n\r\n"] {
        let (peers, n) = (Peers::default(), AtomicUsize::new(0));
        let theirs = peers.clone();
        let a = Provider::start(move |_, stream| {
            note(&theirs, stream);
            match n.fetch_add(1, Ordering::SeqCst) {
                0 => stream.write_all(format!("{JSON}{first}{POISON}").as_bytes()).unwrap(),
                _ => reply(stream, 200, "", b"two"),
            }
            After::Keep
        });
        let zap = Zap::with(&format!("{QUICK}[server]\nworkers = 1\n"), &[a.backend("a", "")]);
        let mut client = zap.client();
        let answer = client.chat("", CHAT);
        assert_eq!((answer.text(), answer.whole), ("one", true), "{first}");
        assert!(client.is_quiet(), "{first}");
        assert_eq!(client.chat("", CHAT).text(), "two", "{first}");
        assert!(client.is_quiet(), "{first}");
        assert_eq!(peers.lock().unwrap().len(), 2, "{first}: the connection must not be reused");
        eventually("the first upstream connection is closed", || a.connections() == 1);
        zap.wait_until_idle();
    }
}

#[test]
fn u11_late_bytes_after_a_response_reach_no_client() {
    let (peers, n, gate) = (Peers::default(), AtomicUsize::new(0), Gate::default());
    let is_out = Arc::new(AtomicBool::new(false));
    let (theirs, held, went_out) = (peers.clone(), gate.clone(), is_out.clone());
    let a = Provider::start(move |_, stream| {
        note(&theirs, stream);
        if n.fetch_add(1, Ordering::SeqCst) == 0 {
            reply(stream, 200, "", b"one");
            held.pass();
            stream.write_all(POISON.as_bytes()).unwrap();
            went_out.store(true, Ordering::SeqCst);
        } else {
            reply(stream, 200, "", b"two");
        }
        After::Keep
    });
    let zap = Zap::with(&format!("{QUICK}[server]\nworkers = 1\n"), &[a.backend("a", "")]);
    let mut client = zap.client();
    assert_eq!(client.chat("", CHAT).text(), "one");
    gate.open(1);
    eventually("the extra bytes are sent", || is_out.load(Ordering::SeqCst));
    assert_eq!(client.chat("", CHAT).text(), "two");
    assert!(client.is_quiet());
    assert_eq!(peers.lock().unwrap().len(), 2, "the connection must not be reused");
    zap.wait_until_idle();
}

#[test]
fn u12_an_oversized_head_is_a_502_and_releases_everything() {
    let with =
        |n: usize| format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n{}\r\nok", "x: y\r\n".repeat(n - 1));
    let big = format!("HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 2\r\n\r\nok", "y".repeat(1 << 20));
    for (what, bytes, passes) in [
        ("1 MB", big, false),
        ("1000 headers", with(1000), false),
        ("101 headers", with(101), false),
        ("100 headers", with(100), true),
    ] {
        let a = Provider::start(move |_, stream| {
            let _ = stream.write_all(bytes.as_bytes());
            After::Keep
        });
        let zap = Zap::with(&retries(0), &[a.backend("a", "")]);
        let answer = zap.chat(CHAT);
        if passes {
            assert_eq!((answer.status, answer.text()), (200, "ok"), "{what}");
        } else {
            let found = (answer.status, answer.code());
            assert_eq!(found, (502, "upstream_invalid_response".to_owned()), "{what}");
            eventually("the upstream connection is closed", || a.connections() == 0);
        }
        zap.wait_until_idle();
    }
}

#[test]
fn u13_a_304_or_204_passes_without_a_body_and_both_connections_stay_open() {
    for (status, more) in
        [(304, "etag: x\r\n"), (304, "etag: x\r\ncontent-length: 50\r\n"), (204, "etag: x\r\n")]
    {
        let peers = Peers::default();
        let theirs = peers.clone();
        let a = Provider::start(move |_, stream| {
            note(&theirs, stream);
            let _ = stream.write_all(format!("HTTP/1.1 {status} X\r\n{more}\r\n").as_bytes());
            After::Keep
        });
        let zap = Zap::with(&format!("{QUICK}[server]\nworkers = 1\n"), &[a.backend("a", "")]);
        let mut client = zap.client();
        for _ in 0..3 {
            let answer = client.chat("", CHAT);
            assert_eq!((answer.status, answer.header("etag")), (status, Some("x")), "{more}");
            assert_eq!(answer.header("x-zap-attempts"), Some("1"), "{status} {more}");
            assert!(client.is_quiet(), "{status} {more}");
        }
        assert_eq!((a.count(), peers.lock().unwrap().len()), (3, 1), "{status} {more}");
        assert_eq!(sum(&zap, "zap_upstream_errors_total"), 0.0);
        zap.wait_until_idle();
    }
}

#[test]
fn u13_bytes_after_a_204_or_304_reach_no_client() {
    for status in [204, 304] {
        let (peers, n) = (Peers::default(), AtomicUsize::new(0));
        let theirs = peers.clone();
        let a = Provider::start(move |_, stream| {
            note(&theirs, stream);
            match n.fetch_add(1, Ordering::SeqCst) {
                0 => stream.write_all(format!("HTTP/1.1 {status} X\r\n\r\n{POISON}").as_bytes()).unwrap(),
                _ => reply(stream, 200, "", b"two"),
            }
            After::Keep
        });
        let zap = Zap::with(&format!("{QUICK}[server]\nworkers = 1\n"), &[a.backend("a", "")]);
        let mut client = zap.client();
        assert_eq!(client.chat("", CHAT).status, status);
        assert!(client.is_quiet());
        assert_eq!(client.chat("", CHAT).text(), "two", "{status}");
        assert_eq!(peers.lock().unwrap().len(), 2, "{status}: the connection must not be reused");
        zap.wait_until_idle();
    }
}

#[test]
fn u13_no_redirect_is_followed() {
    for status in [301, 302, 303, 308] {
        let b = Provider::named("b");
        let location = format!("location: http://{}/v1/chat/completions\r\n", b.address);
        let a = Provider::start(move |_, stream| {
            reply(stream, status, &location, b"elsewhere");
            After::Keep
        });
        let zap = Zap::with(QUICK, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
        let answer = zap.chat(CHAT);
        assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_redirect"), "{status}");
        assert_eq!(answer.header("location"), None, "{status}");
        assert_eq!((a.count(), b.count()), (1, 0), "{status}");
        zap.wait_until_idle();
    }
}

#[test]
fn u13_interim_responses_before_a_stream_are_dropped() {
    let a = Provider::start(|_, stream| {
        for interim in ["100 Continue\r\n", "102 Processing\r\n", "103 Early Hints\r\nlink: x\r\n"] {
            let _ = stream.write_all(format!("HTTP/1.1 {interim}\r\n").as_bytes());
        }
        start_events(stream);
        chunk(stream, "data: one\n\n");
        chunk(stream, "data: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with(QUICK, &[a.backend("a", "")]);
    let mut client = zap.client();
    for _ in 0..2 {
        let answer = client.chat("", STREAM);
        assert_eq!((answer.status, answer.header("link"), answer.whole), (200, None, true));
        assert_eq!(answer.text(), "data: one\n\ndata: [DONE]\n\n");
    }
    zap.wait_until_idle();
}

#[test]
fn u14_a_429_until_a_date_cools_down_its_backend_and_another_serves_at_once() {
    let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(60));
    let header = format!("retry-after: {date}\r\n");
    let a = Provider::start(move |_, stream| {
        reply(stream, 429, &header, b"slow down");
        After::Keep
    });
    let b = Provider::named("b");
    let zap = Zap::with(SLOW, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
    let (answer, took) = timed(|| zap.chat(CHAT));
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("b", Some("2")));
    assert!(took < millis(1_000), "{took:?}");
    (0..5).for_each(|_| assert_eq!(zap.chat(CHAT).text(), "b"));
    assert_eq!(a.count(), 1);
    let status = zap.client().get("/status").json();
    assert_eq!(status["backends"][0]["state"], "cooling");
    let secs = status["backends"][0]["cooling_secs"].as_f64().unwrap();
    assert!(secs > 45.0 && secs <= 60.0, "{secs}");
    assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0);
    assert_eq!(errors(&zap, "a", "upstream_rate_limited"), 1.0);
    zap.wait_until_idle();
}

#[test]
fn u15_a_request_that_always_fails_is_tried_three_times_and_gets_the_last_response_unchanged() {
    for status in [500, 529] {
        let n = Arc::new(AtomicUsize::new(0));
        let failing = || {
            let n = n.clone();
            Provider::start(move |_, stream| {
                let text = format!("answer {}", n.fetch_add(1, Ordering::SeqCst) + 1);
                reply(stream, status, "content-type: text/plain\r\nx-own: 1\r\n", text.as_bytes());
                After::Keep
            })
        };
        let (a, b) = (failing(), failing());
        let zap = Zap::with(QUICK, &[a.backend("a", ""), b.backend("b", "")]);
        let answer = zap.chat(CHAT);
        assert_eq!((answer.status, answer.text(), answer.whole), (status, "answer 3", true));
        assert_eq!((answer.header("x-own"), answer.header("content-type")), (Some("1"), Some("text/plain")));
        assert_eq!((answer.header("x-zap-attempts"), a.count() + b.count()), (Some("3"), 3));
        assert_eq!(sum(&zap, "zap_upstream_errors_total"), 3.0);
        assert_eq!(sum(&zap, "zap_retries_total"), 2.0);
        zap.wait_until_idle();
    }
}

#[test]
fn u16_a_client_error_is_not_counted_against_the_backend() {
    for status in [400, 404, 422, 501] {
        let a = Provider::fixed(status, "content-type: application/json\r\n", r#"{"error":1}"#);
        let b = Provider::named("b");
        let settings = "[health]\ninterval_secs = 600\nfailure_threshold = 1\n";
        let zap = Zap::with(settings, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
        for _ in 0..3 {
            let answer = zap.chat(CHAT);
            assert_eq!((answer.status, answer.text()), (status, r#"{"error":1}"#));
            assert_eq!(answer.header("x-zap-attempts"), Some("1"), "{status}");
        }
        assert_eq!((a.count(), b.count()), (3, 0), "{status}");
        assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0, "{status}");
        assert_eq!(sum(&zap, "zap_retries_total"), 0.0, "{status}");
        assert_eq!(sum(&zap, "zap_upstream_errors_total"), 0.0, "{status}");
        let shown = zap.client().get("/status").json();
        assert!(shown["backends"][0]["last_error"].is_null(), "{status}");
        zap.wait_until_idle();
    }
}

#[test]
fn u16_a_request_that_does_not_fit_the_model_goes_to_another_target_and_marks_nobody() {
    const JSON: &str = "content-type: application/json\r\n";
    for (status, error) in [
        (413, r#"{"error":1}"#),
        (404, r#"{"error":{"message":"no","code":"model_not_found"}}"#),
        (404, r#"{"type":"error","error":{"type":"not_found_error","message":"no"}}"#),
        (400, r#"{"error":{"message":"no","code":"model_not_supported"}}"#),
        (400, r#"{"error":{"message":"too long","code":"context_length_exceeded"}}"#),
        (400, r#"{"error":{"message":"too long","type":"exceed_context_size_error"}}"#),
    ] {
        let a = Provider::fixed(status, JSON, error);
        let b = Provider::named("b");
        let settings = "[health]\ninterval_secs = 600\nfailure_threshold = 1\n";
        let zap = Zap::with(settings, &[a.backend("a", "weight = 9"), b.backend("b", "")]);
        let mut asked_first = 0;
        for _ in 0..5 {
            let answer = zap.chat(CHAT);
            assert_eq!((answer.status, answer.text()), (200, "b"), "{error}");
            asked_first += usize::from(answer.header("x-zap-attempts") == Some("2"));
        }
        assert!(a.count() == asked_first && asked_first >= 4, "backend a stays in use: {error}");
        assert_eq!(errors(&zap, "a", "upstream_refused"), asked_first as f64, "{error}");
        assert_eq!(zap.metric("zap_backend_up{backend=\"a\"}"), 1.0, "{error}");
        zap.wait_until_idle();

        // Nobody serves it: the client gets the last answer as it came, and each target is asked once.
        let c = Provider::fixed(status, JSON, error);
        let zap = Zap::with(settings, &[a.backend("a", "weight = 9"), c.backend("c", "")]);
        for _ in 0..3 {
            let answer = zap.chat(CHAT);
            assert_eq!((answer.status, answer.text()), (status, error));
            assert_eq!(
                (answer.header("x-zap-attempts"), answer.header("x-zap-backend")),
                (Some("2"), Some("c"))
            );
        }
        for backend in ["a", "c"] {
            assert_eq!(zap.metric(&format!("zap_backend_up{{backend=\"{backend}\"}}")), 1.0, "{error}");
        }
        zap.wait_until_idle();
    }
}

#[test]
fn u17_a_refused_key_is_shown_nowhere() {
    for status in [401, 402, 403] {
        let headers = "x-echo: sk-CANARY\r\nwww-authenticate: Bearer sk-CANARY\r\n";
        let a = Provider::fixed(status, headers, "bad key sk-CANARY");
        let b = Provider::named("b");
        let key = r#"api_key = "sk-CANARY""#;
        let zap = Zap::with(QUICK, &[a.backend("a", &format!("weight = 9\n{key}")), b.backend("b", "")]);
        let answer = zap.chat(CHAT);
        assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("b", Some("2")), "{status}");
        assert!(!format!("{:?}", answer.headers).contains("CANARY"), "{status}");
        assert_eq!(a.seen()[0].header("authorization"), Some("Bearer sk-CANARY"));
        zap.wait_until_idle();

        let zap = Zap::with(QUICK, &[a.backend("a", key)]);
        let answer = zap.chat(CHAT);
        if status == 401 {
            assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_auth_error"));
        } else {
            assert_eq!(
                (answer.status, answer.text()),
                (status, "bad key ***"),
                "the error passes, with the key redacted"
            );
        }
        assert!(!format!("{:?}", answer.headers).contains("CANARY"), "{status}");
        assert!(!answer.text().contains("CANARY"), "{status}");
        for path in ["/metrics", "/status"] {
            assert!(!zap.client().get(path).text().contains("CANARY"), "{status}: {path}");
        }
        zap.wait_until_idle();
    }
}

/// `hello` as gzip, in a stored (uncompressed) block.
const GZIP: &[u8] = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x01\x05\0\xfa\xffhello\x86\xa6\x10\x36\x05\0\0\0";

#[test]
fn u18_an_unrequested_compressed_response_passes_unchanged() {
    for (status, more) in
        [(200, ""), (400, ""), (200, "api_key = \"sk-CANARY\""), (400, "api_key = \"sk-CANARY\"")]
    {
        let a = Provider::start(move |_, stream| {
            reply(stream, status, "content-type: application/json\r\ncontent-encoding: gzip\r\n", GZIP);
            After::Keep
        });
        let zap = Zap::with(QUICK, &[a.backend("a", more)]);
        let mut client = zap.client();
        for _ in 0..2 {
            let answer = client.chat("accept-encoding: gzip\r\n", CHAT);
            assert_eq!((answer.status, answer.header("content-encoding")), (status, Some("gzip")), "{more}");
            assert_eq!((&answer.body[..], answer.whole), (GZIP, true), "{status} {more}");
        }
        assert_eq!(a.seen()[0].header("accept-encoding"), Some("identity"));
        zap.wait_until_idle();
    }
}

#[test]
fn u18_a_compressed_stream_passes_unchanged() {
    let a = Provider::start(|_, stream| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n";
        let _ = stream.write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes());
        for piece in GZIP.chunks(10) {
            let size = format!("{:x}\r\n", piece.len());
            let _ = stream.write_all(&[size.as_bytes(), piece, &b"\r\n"[..]].concat());
        }
        end_chunks(stream);
        After::Keep
    });
    let zap = Zap::with(QUICK, &[a.backend("a", "")]);
    let mut client = zap.client();
    for _ in 0..2 {
        let answer = client.chat("", STREAM);
        assert_eq!((answer.status, answer.header("content-encoding")), (200, Some("gzip")));
        assert_eq!((&answer.body[..], answer.whole), (GZIP, true));
    }
    zap.wait_until_idle();
}

#[test]
fn u19_an_expired_certificate_is_a_tls_error_and_another_serves() {
    let named = || rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let mut expired = named();
    expired.not_before = rcgen::date_time_ymd(2019, 1, 1);
    expired.not_after = rcgen::date_time_ymd(2020, 1, 1);
    for (params, trusted) in [(named(), true), (expired, false)] {
        let (address, pem) = crate::support::tls_server::server_with(params);
        let text = crate::tls::backend(address, &format!("ca_file = \"{}\"", pem.display()));
        let zap = Zap::with(QUICK, std::slice::from_ref(&text));
        let answer = zap.chat(CHAT);
        if trusted {
            assert_eq!(
                (answer.status, answer.text()),
                (200, "secret"),
                "the certificate of the test is trusted"
            );
        } else {
            assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_tls_error"));
            assert_eq!(
                (answer.header("x-zap-attempts"), errors(&zap, "tls", "upstream_tls_error")),
                (Some("3"), 3.0)
            );
            let b = Provider::named("b");
            let beside = Zap::with(QUICK, &[text, b.backend("b", "")]);
            (0..2).for_each(|_| assert_eq!(beside.chat(CHAT).text(), "b"));
            beside.wait_until_idle();
        }
        zap.wait_until_idle();
        std::fs::remove_file(pem).unwrap();
    }
}

#[test]
fn u19_a_stalled_handshake_ends_after_connect_ms_and_never_falls_back_to_plain_text() {
    let heard = Arc::new(Mutex::new(Vec::<u8>::new()));
    let theirs = heard.clone();
    let mute = Raw::start(move |mut stream| {
        let mut buf = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut buf) {
            theirs.lock().unwrap().extend_from_slice(&buf[..n]);
        }
    });
    let text = crate::tls::backend(mute.address, r#"api_key = "sk-CANARY""#);
    let settings = format!("{QUICK}[timeouts]\nconnect_ms = 300\n");
    let b = Provider::named("b");
    let zap = Zap::with(&settings, &[text.clone(), b.backend("b", "")]);
    let (answer, took) = timed(|| zap.chat(CHAT));
    assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("b", Some("2")));
    assert!(took >= millis(300) && took < millis(1_500), "{took:?}");
    zap.wait_until_idle();

    let zap = Zap::with(&settings, &[text]);
    let answer = zap.chat(CHAT);
    assert_eq!((answer.status, answer.code().as_str()), (504, "upstream_timeout"));
    let heard = heard.lock().unwrap().clone();
    assert_eq!(heard.first(), Some(&0x16), "the first byte is that of a TLS handshake record");
    assert!(!heard.windows(9).any(|w| w == b"sk-CANARY"));
    zap.wait_until_idle();
}

#[test]
fn u21_a_name_that_does_not_resolve_leaves_the_others_serving() {
    let lost = "[[backends]]\nname = \"a\"\nurl = \"http://nowhere.invalid:8000\"\nweight = 9\n".to_owned();
    let b = Provider::named("b");
    let settings = "[timeouts]\nconnect_ms = 300\n[health]\ninterval_secs = 600\n";
    let zap = Zap::with(settings, &[lost, b.backend("b", "")]);
    let mut client = zap.client();
    for _ in 0..10 {
        let (answer, took) = timed(|| client.chat("", CHAT));
        assert_eq!((answer.status, answer.text()), (200, "b"));
        assert!(took < millis(1_500), "{took:?}");
    }
    // A resolver may refuse the name or time out.
    assert!(errors(&zap, "a", "upstream_unreachable") + errors(&zap, "a", "upstream_timeout") > 0.0);
    eventually("backend a is ejected", || zap.metric("zap_backend_up{backend=\"a\"}") == 0.0);
    zap.wait_until_idle();
}

/// Sends chats to a failing backend with healthy probes, and to one that serves, for six intervals between probes.
/// Returns how often the first one has changed its state.
fn changes_of_state(a: &Provider) -> usize {
    const UP: &str = "zap_backend_up{backend=\"a\"}";
    let b = Provider::named("b");
    let zap = Zap::with(
        "[health]\ninterval_secs = 1\nfailure_threshold = 1\n",
        &[a.backend("a", ""), b.backend("b", "")],
    );
    eventually("both backends are probed", || !a.probes().is_empty() && !b.probes().is_empty());
    let (since, window) = (Instant::now(), Duration::from_secs(6));
    let mut changes = 0;
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut client = zap.client();
            while since.elapsed() < window {
                let answer = client.chat("", CHAT);
                assert_eq!((answer.status, answer.text()), (200, "b"));
                std::thread::sleep(millis(10));
            }
        });
        let mut up = 1.0;
        while since.elapsed() < window {
            let now = zap.metric(UP);
            changes += usize::from(now != up);
            up = now;
            std::thread::sleep(millis(10));
        }
    });
    zap.wait_until_idle();
    changes
}

#[test]
fn u22_a_failing_backend_with_healthy_probes_is_tried_by_one_request_after_1_and_2_s() {
    let a = Provider::fixed(500, "", "a failed");
    assert_eq!(changes_of_state(&a), 1, "no probe brings it back");
    // The first failure ejects the backend for this model. The next trial would come after another 4 s.
    assert!((2..=3).contains(&a.count()), "{} failures", a.count());
}

#[test]
fn u22_a_backend_that_resets_requests_and_has_healthy_probes_changes_state_at_most_once_per_interval() {
    let a = Provider::start(|_, stream| reset(stream));
    let changes = changes_of_state(&a);
    assert!((1..=7).contains(&changes), "{changes} changes in 6 intervals");
    // A single failure ejects the backend: once at first, and once after each time it comes back.
    assert!((2..=4).contains(&a.count()), "{} failures", a.count());
}

#[test]
fn u23_a_backend_that_fails_fast_attracts_no_traffic() {
    let a = Provider::start(|_, stream| {
        std::thread::sleep(millis(1));
        reply(stream, 503, "", b"a failed");
        After::Keep
    });
    let b = Provider::start(|_, stream| {
        std::thread::sleep(millis(50));
        reply(stream, 200, "", b"b");
        After::Keep
    });
    // No backend is ejected, so only the load metric keeps traffic away. The budget allows all of the first retries.
    let settings = "[load_balancer]\nstrategy = \"least_loaded\"\n[retry]\nbudget_percent = 100\n\
        [health]\ninterval_secs = 600\nfailure_threshold = 1000\n";
    let zap = Zap::with(settings, &[a.backend("a", ""), b.backend("b", "")]);
    let (since, served) = (Instant::now(), AtomicUsize::new(0));
    let early = std::thread::scope(|s| {
        for _ in 0..40 {
            s.spawn(|| {
                let mut client = zap.client();
                while since.elapsed() < Duration::from_secs(4) {
                    let answer = client.chat("", CHAT);
                    assert_eq!((answer.status, answer.text()), (200, "b"));
                    served.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        std::thread::sleep(Duration::from_secs(1));
        (a.count(), served.load(Ordering::SeqCst))
    });
    let (failed, total) = (a.count() - early.0, served.load(Ordering::SeqCst) - early.1);
    assert!(total > 300, "{total} requests are too few to tell");
    assert!(failed * 50 < total, "{failed} of {total} first tries went to the failing backend");
    zap.wait_until_idle();
}
