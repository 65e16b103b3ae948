//! What a client sends while its answer is still under way.

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

/// With a worker that a test can stop, so that what comes meanwhile is there at once.
#[cfg(debug_assertions)]
mod at_once {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http::HeaderValue;
    use zap::internals::failpoint;

    use super::*;

    /// Zap with one worker, and a provider of one answer; both stand still as a test wants it.
    struct Stage {
        zap: Zap,
        /// The provider answers here, and has answered there.
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
                reply(stream, 200, &headers, &vec![b'x'; size]);
                count.fetch_add(1, Ordering::Relaxed);
                After::Keep
            });
            let zap =
                Zap::with("[server]\nworkers = 1\n[health]\ninterval_secs = 600\n", &[a.backend("a", "")]);
            Stage { zap, gate, replied, _a: a }
        }

        /// Lets `client` be answered and send `more` while the worker stands still, so that it finds both at once.
        fn at_once(&self, id: &'static str, client: &mut Client, more: &str) {
            eventually("it waits", || self.gate.waiting() == 1);
            let held = Gate::default();
            let hold = held.clone();
            failpoint::instead("try", HeaderValue::from_static(id), move || hold.pass());
            let mut other = self.zap.client();
            other.post("/chat", &format!("x-request-id: {id}\r\n"), CHAT);
            eventually("the worker stands still", || held.waiting() == 1);
            client.send(more);
            self.gate.open(1);
            eventually("the answer is there", || self.replied.load(Ordering::Relaxed) == 1);
            held.open(1);
            eventually("the other one waits", || self.gate.waiting() == 1);
            eventually("the answer has gone out", || self.zap.metric("zap_in_flight{backend=\"a\"}") == 1.0);
        }
    }

    #[test]
    fn what_comes_with_the_last_answer_does_not_turn_the_close_into_a_reset() {
        // A reset would throw away what the client has not received yet.
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
    fn a_request_that_comes_with_the_answer_to_the_last_one_is_served() {
        // With a head of its buffer's size hyper writes before it lets go of the body.
        for (id, pad) in [("hold-small", 0), ("hold-large", 65_430)] {
            let stage = Stage::new(format!("x-pad: {}\r\n", "p".repeat(pad)), 0);
            let mut client = stage.zap.client();
            client.post("/chat", "", CHAT);
            stage.at_once(id, &mut client, "GET /health HTTP/1.1\r\nhost: zap\r\n\r\n");
            assert_eq!((client.response().status, client.response().status), (200, 200), "{pad}");
        }
    }
}
