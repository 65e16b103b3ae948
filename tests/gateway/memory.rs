//! The memory of request bodies is bounded: Zap stops reading them, and refuses the newest after a while.

use crate::support::provider::{After, Gate, chunk, end_chunks, start_events};
use crate::support::{CHAT, Client, Provider, STREAM, Zap, eventually, within};

const MIB: usize = 1 << 20;

/// A body of so many bytes.
fn body(length: usize) -> String {
    let around = "{\"messages\":[\"\"]}".len();
    format!("{{\"messages\":[\"{}\"]}}", "x".repeat(length - around))
}

fn buffered(zap: &Zap) -> usize {
    zap.metric("zap_buffered_bytes") as usize
}

/// Sends a request with a body of a MiB from another thread, since Zap may stop reading it.
fn post(zap: &Zap) -> Client {
    let client = zap.client();
    let mut writer = client.writer();
    std::thread::spawn(move || {
        let body = body(MIB);
        let head = format!("POST /chat HTTP/1.1\r\nhost: zap\r\ncontent-length: {}\r\n\r\n", body.len());
        // Zap may refuse the request and close the connection.
        let _ = std::io::Write::write_all(&mut writer, (head + &body).as_bytes());
    });
    client
}

#[test]
fn bodies_beyond_the_bound_wait_for_those_before_them() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let zap = Zap::with(&format!("[server]\nmax_buffered_bytes = {}\n", 4 * MIB), &[a.backend("a", "")]);
    let mut whole: Vec<_> = (0..4).map(|_| post(&zap)).collect();
    eventually("four are at the backend", || gate.waiting() == 4);
    assert_eq!(buffered(&zap), 4 * MIB);
    let mut late: Vec<_> = (0..3).map(|_| post(&zap)).collect();
    let mut small = zap.client();
    small.post("/chat", "", CHAT);
    // Nothing shows that a body is not read, but that it is not there after a while.
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!((gate.waiting(), buffered(&zap)), (4, 4 * MIB), "neither large nor small bodies are read");
    gate.open(8);
    for client in whole.iter_mut().chain(&mut late).chain([&mut small]) {
        assert_eq!(client.response().status, 200);
    }
    assert_eq!(a.count(), 8);
    zap.wait_until_idle();
    assert_eq!(buffered(&zap), 0);
}

#[test]
fn the_newest_body_that_waits_is_refused_and_the_others_go_on() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let zap = Zap::with(&format!("[server]\nmax_buffered_bytes = {}\n", 2 * MIB), &[a.backend("a", "")]);
    let mut whole = [post(&zap), post(&zap)];
    eventually("two are at the backend", || gate.waiting() == 2);
    let mut late = [post(&zap), post(&zap)];
    let refusals = || zap.metric("zap_rejected_total{reason=\"memory_full\"}");
    within(std::time::Duration::from_secs(20), "the newest is refused", || refusals() == 1.0);
    gate.open(3);
    assert!(whole.iter_mut().all(|client| client.response().status == 200), "what is whole is not lost");
    let answers = late.each_mut().map(Client::response);
    let refused = answers.iter().find(|answer| answer.status == 503).expect("one is refused");
    assert_eq!((refused.code().as_str(), refused.header("retry-after")), ("memory_full", Some("1")));
    assert_eq!(refused.header("connection"), Some("close"));
    assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), 1, "the other was only late");
    zap.wait_until_idle();
    assert_eq!(buffered(&zap), 0);
}

/// An event without content, of so many bytes, that a stream may begin with.
fn opening_event(length: usize) -> String {
    let event = |pad: &str| {
        format!("data: {{\"choices\":[{{\"delta\":{{\"role\":\"assistant\"}}}}],\"pad\":\"{pad}\"}}\n\n")
    };
    let around = event("").len();
    event(&"x".repeat(length - around))
}

/// A provider that sends such an event and the rest of the stream after `gate`.
fn slow_stream(gate: &Gate, length: usize) -> Provider {
    let gate = gate.clone();
    Provider::start(move |_, stream| {
        start_events(stream);
        chunk(stream, &opening_event(length));
        gate.pass();
        chunk(stream, "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\ndata: [DONE]\n\n");
        end_chunks(stream);
        After::Keep
    })
}

#[test]
fn the_beginning_of_a_stream_counts_while_it_is_held_back() {
    const LENGTH: usize = 20_000;
    let gate = Gate::default();
    let (a, b) = (slow_stream(&gate, LENGTH), slow_stream(&gate, LENGTH));
    // A stream is held back while another backend is left.
    let backends = [a.backend("a", ""), b.backend("b", "")];
    let zap = Zap::with("[stream]\nhold_secs = 30\n", &backends);
    let mut client = zap.client();
    client.post("/chat", "", STREAM);
    eventually("the event is held", || buffered(&zap) == STREAM.len() + LENGTH);
    assert!(client.is_quiet());
    gate.open(1);
    let response = client.response();
    assert!(response.text().contains("\"hi\"") && response.text().ends_with("[DONE]\n\n"));
    zap.wait_until_idle();
    assert_eq!(buffered(&zap), 0);
}

#[test]
fn at_the_bound_the_beginning_of_a_stream_is_not_held_back() {
    let (gate, full) = (Gate::default(), Gate::default());
    let held = Provider::gated(&full);
    let (a, b) = (slow_stream(&gate, 20_000), slow_stream(&gate, 20_000));
    let backends = [
        a.backend("a", "models = [\"m\"]"),
        b.backend("b", "models = [\"m\"]"),
        held.backend("held", "models = [\"large\"]"),
    ];
    // One worker, so that no other one keeps a part of the rest.
    let settings = format!("[server]\nworkers = 1\nmax_buffered_bytes = {MIB}\n[stream]\nhold_secs = 30\n");
    let zap = Zap::with(&settings, &backends);
    // It leaves room for a small body, and not for the event.
    let large = body(MIB - 10_000).replace("{\"messages\"", "{\"model\":\"large\",\"messages\"");
    let mut whole = zap.client();
    whole.post("/chat", "", &large);
    eventually("the large body is at its backend", || full.waiting() == 1);
    let mut client = zap.client();
    client.post("/chat", "", STREAM.replacen('{', "{\"model\":\"m\",", 1));
    let head = client.head();
    assert_eq!(head.status, 200);
    let first = client.chunk().expect("the event goes out");
    assert!(first.starts_with(b"data: ") && gate.waiting() == 1, "its backend has sent no content yet");
    gate.open(1);
    full.open(1);
    assert_eq!(whole.response().status, 200, "what is whole is not lost");
    while client.chunk().is_some_and(|chunk| !chunk.is_empty()) {}
    zap.wait_until_idle();
    assert_eq!(buffered(&zap), 0);
}
