//! Pipelining and half-close: bytes that a client sends while its response is still being delivered.

use crate::support::provider::{After, Gate, reply};
use crate::support::{CHAT, Client, Provider, Zap, eventually};

/// Sends a response body of the size that the request asks for.
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
fn a_pipelined_request_and_a_half_close_are_seen_while_the_response_is_unread() {
    let a = sized();
    let zap = Zap::with("", &[a.backend("a", "")]);
    let running = || zap.metric("zap_in_flight{backend=\"a\"}");
    let begun = std::cell::Cell::new(0);
    let begin = |size| {
        let mut client = zap.client();
        ask(&mut client, size);
        begun.set(begun.get() + 1);
        eventually("the backend has the request", || a.count() == begun.get());
        client
    };
    // Returns whether Zap can write the whole response while the client reads nothing. In both cases the client must
    // get that response and the next one, and a half-close must end a third request.
    let fits = |size| {
        let mut client = begin(size);
        let fits = (0..20).any(|_| running() == 0.0);
        ask(&mut client, 3);
        begun.set(begun.get() + 1);
        for want in [size, 3] {
            let answer = client.response();
            assert_eq!((answer.status, answer.body.len(), answer.whole), (200, want, true), "{size}");
        }
        let leaving = begin(size);
        leaving.half_close();
        eventually("the request of the half-closed client has ended", || running() == 0.0);
        fits
    };
    // Bisect for the smallest response that the socket buffers cannot hold. Just below that size Zap has read the
    // response to its end and still holds the last bytes.
    let (mut low, mut high) = (1 << 10, 32 << 20);
    while high - low > 4 << 10 {
        let middle = (low + high) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    for back in 0..16 {
        fits(high.saturating_sub(back << 12));
    }
    zap.wait_until_idle();
}

/// Tests with a worker that can be stopped, so that it finds several events at once when it continues.
#[cfg(debug_assertions)]
mod at_once {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http::HeaderValue;
    use zap::internals::failpoint;

    use super::*;

    /// Zap with one worker, and a provider with one response. A test can stop both.
    struct Stage {
        zap: Zap,
        /// The provider waits at the gate before each response and counts its responses in `replied`.
        gate: Gate,
        replied: Arc<AtomicUsize>,
        _a: Provider,
    }

    impl Stage {
        fn new(headers: String, size: usize) -> Self {
            let (gate, replied) = (Gate::default(), Arc::new(AtomicUsize::new(0)));
            let (door, count) = (gate.clone(), replied.clone());
            let a = Provider::start(move |_, stream| {
                door.pass();
                // An empty body is an answer only if the request is refused.
                reply(stream, if size == 0 { 400 } else { 200 }, &headers, &vec![b'x'; size]);
                count.fetch_add(1, Ordering::Relaxed);
                After::Keep
            });
            let zap =
                Zap::with("[server]\nworkers = 1\n[health]\ninterval_secs = 600\n", &[a.backend("a", "")]);
            Stage { zap, gate, replied, _a: a }
        }

        /// Has the provider respond and `client` send `more` while the worker is stopped, so that the worker finds
        /// both at once.
        fn at_once(&self, id: &'static str, client: &mut Client, more: &str) {
            eventually("the provider has the request", || self.gate.waiting() == 1);
            let held = Gate::default();
            let hold = held.clone();
            failpoint::arm("try", HeaderValue::from_static(id), move || hold.pass());
            let mut other = self.zap.client();
            other.post("/chat", &format!("x-request-id: {id}\r\n"), CHAT);
            eventually("the worker is stopped", || held.waiting() == 1);
            client.send(more);
            self.gate.open(1);
            eventually("the response is sent", || self.replied.load(Ordering::Relaxed) == 1);
            held.open(1);
            eventually("the provider has the other request", || self.gate.waiting() == 1);
            eventually("the first request has ended", || {
                self.zap.metric("zap_in_flight{backend=\"a\"}") == 1.0
            });
        }
    }

    #[test]
    fn bytes_that_arrive_with_the_last_response_do_not_cause_a_reset() {
        // A reset would discard the bytes that the client has not received yet.
        let size = 40_000;
        let stage = Stage::new(String::new(), size);
        let mut client = Client::with_small_window(stage.zap.address);
        client.post("/chat", "connection: close\r\n", CHAT);
        stage.at_once("hold-close", &mut client, "\r\n");
        let answer = client.response();
        assert_eq!((answer.status, answer.body.len(), answer.whole), (200, size, true));
        assert_eq!(client.rest(), (Vec::new(), true));
    }

    #[test]
    fn a_request_that_arrives_with_the_previous_response_is_served() {
        // If the head fills hyper's write buffer, hyper writes before it drops the body.
        for (id, pad) in [("hold-small", 0), ("hold-large", 65_421)] {
            let stage = Stage::new(format!("x-pad: {}\r\n", "p".repeat(pad)), 0);
            let mut client = stage.zap.client();
            client.post("/chat", "", CHAT);
            stage.at_once(id, &mut client, "GET /health HTTP/1.1\r\nhost: zap\r\n\r\n");
            assert_eq!((client.response().status, client.response().status), (400, 200), "{pad}");
        }
    }
}
