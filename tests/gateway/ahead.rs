//! What a client sends while its answer is still under way.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::provider::{After, Gate, reply};
use crate::support::{CHAT, Client, Provider, Zap, eventually};

/// Answers with as many bytes as the request says.
fn sized() -> Provider {
    Provider::start(|seen, stream| {
        let body: serde_json::Value = serde_json::from_slice(&seen.body).unwrap();
        let size = body["size"].as_u64().unwrap() as usize;
        reply(stream, 200, "", &vec![b'x'; size]);
        After::Keep
    })
}

fn ask(client: &mut Client, size: usize) {
    client.post("/chat", "", format!("{{\"messages\":[],\"size\":{size}}}"));
}

#[test]
fn the_next_request_and_a_leave_come_through_while_an_answer_waits_for_its_client() {
    let a = sized();
    let zap = Zap::with("", &[a.backend("a", "")]);
    let running = || zap.metric("zap_in_flight{backend=\"a\"}");
    let begun = std::cell::Cell::new(0);
    let begin = |size| {
        let mut client = zap.client();
        ask(&mut client, size);
        begun.set(begun.get() + 1);
        eventually("it is asked", || a.count() == begun.get());
        client
    };
    // Whether Zap gets rid of the whole answer though nobody reads it; all that follows must come all the same.
    let fits = |size| {
        let mut client = begin(size);
        let fits = (0..20).any(|_| running() == 0.0);
        ask(&mut client, 3);
        begun.set(begun.get() + 1);
        for want in [size, 3] {
            let answer = client.response();
            assert_eq!((answer.status, answer.body.len(), answer.whole), (200, want, true), "{size}");
        }
        let leaver = begin(size);
        leaver.half_close();
        eventually("the leaver's place is free", || running() == 0.0);
        fits
    };
    // The size from which on an answer does not fit into the sockets, by halves: just below it, Zap has taken the answer
    // to its end and keeps the last bytes.
    let (mut low, mut high) = (1 << 10, 32 << 20);
    while high - low > 4 << 10 {
        let middle = (low + high) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    for back in 0..16 {
        fits(high.saturating_sub(back << 12));
    }
    zap.is_clean();
}

/// Set when it is dropped, also by a test that fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `test` while the one worker is kept so busy that what comes meanwhile is seen in one turn.
fn beside_large_bodies(zap: &Zap, test: impl FnOnce()) {
    let over = AtomicBool::new(false);
    // It is read to its end, which does not come, and goes no further.
    let large = format!("{{\"messages\":[],\"x\":\"{}", "é".repeat(128 << 10));
    std::thread::scope(|threads| {
        for _ in 0..3 {
            threads.spawn(|| {
                let mut client = zap.client();
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(client.chat("", &large).code(), "invalid_json");
                }
            });
        }
        let _over = Over(&over);
        test();
    });
}

/// Answers when the gate lets it.
fn gated(gate: &Gate, headers: String, size: usize) -> Provider {
    let gate = gate.clone();
    Provider::start(move |_, stream| {
        gate.pass();
        reply(stream, 200, &headers, &vec![b'x'; size]);
        After::Keep
    })
}

#[test]
fn what_comes_behind_the_last_request_does_not_turn_the_close_into_a_reset() {
    let gate = Gate::default();
    // It fits into the sockets, but a reset would throw away what the client has not received yet.
    let size = 300_000;
    let a = gated(&gate, String::new(), size);
    let zap = Zap::with("[server]\nworkers = 1\n", &[a.backend("a", "")]);
    beside_large_bodies(&zap, || {
        for round in 0..20 {
            let mut client = zap.client();
            client.post("/chat", "connection: close\r\n", CHAT);
            eventually("it waits", || gate.waiting() == 1);
            gate.open(1);
            client.try_send("\r\n");
            eventually("the answer has gone out", || zap.metric("zap_in_flight{backend=\"a\"}") == 0.0);
            let answer = client.response();
            assert_eq!((answer.status, answer.body.len(), answer.whole), (200, size, true), "round {round}");
            let (rest, clean) = client.rest();
            assert!(rest.is_empty() && clean, "round {round}");
        }
    });
    zap.is_clean();
}

#[test]
fn a_request_that_comes_with_the_answer_to_the_last_one_is_served() {
    let gate = Gate::default();
    // With a head so large hyper writes before it has let go of the body.
    for pad in [0, 65_300] {
        let a = gated(&gate, format!("x-pad: {}\r\n", "p".repeat(pad)), 0);
        let zap = Zap::with("[server]\nworkers = 1\n", &[a.backend("a", "")]);
        beside_large_bodies(&zap, || {
            for _ in 0..20 {
                let mut client = zap.client();
                client.post("/chat", "", CHAT);
                eventually("it waits", || gate.waiting() == 1);
                gate.open(1);
                client.send("GET /health HTTP/1.1\r\nhost: zap\r\n\r\n");
                assert_eq!((client.response().status, client.response().status), (200, 200), "{pad}");
            }
        });
        zap.is_clean();
    }
}
