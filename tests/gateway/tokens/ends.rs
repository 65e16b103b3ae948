//! However a request ends, nothing of its limits stays reserved.

use zap::internals::Order;

use super::*;
use crate::support::Ledger;

const KEY: &str = "authorization: Bearer zk-team\r\n";

/// Members of a stream that may have 400 output tokens.
const STREAM: &str = ",\"stream\":true,\"max_tokens\":400";

/// The client's limits, then the backend's.
const LIMITS: [(&str, &str, u64, u64); 2] = [("clients", "team", 1000, 100), ("backends", "a", 2000, 200)];

/// Zap with a limit of tokens and a budget for the client and for the backend.
fn start(a: &Provider) -> Zap {
    let [client, backend] = LIMITS.map(|(_, _, tokens, usd)| {
        format!("tokens_per_minute = {tokens}\n{}", budget(&usd.to_string(), "month"))
    });
    Zap::with_log(&keys(&client), &[a.backend("a", &format!("{PRICES}{backend}"))])
}

/// Waits until all is left of all limits but these tokens and their price.
fn wait_settled(zap: &Zap, [input, _, output, _]: Counts) {
    zap.wait_until_idle();
    let spent = input * 1_000_000 + output * 10_000_000;
    for (owners, name, tokens, budget) in LIMITS {
        let want = (tokens - input - output, (usd(spent), usd(budget * 1_000_000_000 - spent)));
        let mut found = None;
        eventually(&format!("{owners}: only {input} and {output} tokens are used"), || {
            let now = (left(zap, owners, name), state(zap, owners, name));
            let is_settled = now == want;
            found = Some(now);
            is_settled
        });
        assert_eq!(found, Some(want));
    }
}

/// The first events of a stream.
fn begin(stream: &mut TcpStream) {
    start_events(stream);
    chunk(stream, &ALL[1].events("some words", true, None).0);
}

#[test]
fn a_stream_that_ends_early_pays_for_what_came() {
    let a = Provider::start(|seen, stream| {
        begin(stream);
        if used(seen) == 1 {
            wait_closed(stream);
        }
        After::Close
    });
    for is_left in [false, true] {
        let zap = start(&a);
        let mut client = zap.client();
        client.post("/chat", KEY, body(u64::from(is_left), STREAM));
        let mut answer = client.head();
        assert_eq!(token_headers(&answer)[1], "500", "100 and 400 are reserved");
        if is_left {
            assert!(!client.chunk().unwrap().is_empty());
            assert_eq!(left(&zap, "clients", "team"), 500);
            drop(client);
        } else {
            client.body(&mut answer);
        }
        let (counts, source) = logged(&zap.lines(1)[0]).unwrap();
        assert_eq!((source.as_str(), counts[0], counts[2] > 0), ("estimate", INPUT, true), "{counts:?}");
        wait_settled(&zap, counts);
    }
}

#[test]
fn a_stream_that_a_drain_cuts_is_in_the_ledger_as_far_as_it_came() {
    let a = Provider::start(|_, stream| {
        begin(stream);
        wait_closed(stream);
        After::Close
    });
    let ledger = Ledger::new();
    let settings = ["[server]\ndrain_secs = 0\n", &ledger.settings(), &keys(&budget("10", "month"))].concat();
    let backend = [a.backend("a", PRICES)];
    let zap = Zap::with(&settings, &backend);
    let mut client = zap.client();
    client.post("/chat", KEY, body(1, STREAM));
    client.head();
    assert!(!client.chunk().unwrap().is_empty());
    assert_eq!(state(&zap, "clients", "team").1, "5.900000000", "4.1 USD are reserved");
    zap.order(Order::Drain);
    assert!(!zap.join(), "the stream is cut");
    let [requests, estimated, cost] = ["requests", "estimated", "cost_nano_usd"].map(|sum| ledger.sum(sum));
    assert_eq!((requests, estimated), (1, 1));
    assert!((100_000_000..500_000_000).contains(&cost), "{cost}");
    let cost = cost as u64;
    let next = Zap::with(&settings, &backend);
    assert_eq!(state(&next, "clients", "team"), (usd(cost), usd(10_000_000_000 - cost)));
}

#[cfg(debug_assertions)]
#[test]
fn a_request_that_panics_leaves_nothing_reserved() {
    use zap::internals::failpoint::arm_panic;

    let gate = Gate::default();
    let held = gate.clone();
    let a = Provider::start(move |_, stream| {
        begin(stream);
        held.pass();
        chunk(stream, DONE);
        end_chunks(stream);
        After::Keep
    });
    let zap = start(&a);
    arm_panic("try", http::HeaderValue::from_static("tokens-try"));
    let broken = zap.client().chat(&format!("{KEY}x-request-id: tokens-try\r\n"), body(1, STREAM));
    assert_eq!((broken.status, broken.code().as_str()), (500, "internal_error"));
    wait_settled(&zap, Counts::default());

    let mut client = zap.client();
    client.post("/chat", &format!("{KEY}x-request-id: tokens-body\r\n"), body(1, STREAM));
    let mut cut = client.head();
    assert!(!client.chunk().unwrap().is_empty());
    arm_panic("body", http::HeaderValue::from_static("tokens-body"));
    gate.open(1);
    client.body(&mut cut);
    assert!(!cut.whole);
    let lines = zap.lines(2);
    let (counts, source) = logged(&lines[1]).unwrap();
    assert_eq!((source.as_str(), counts[0]), ("estimate", INPUT), "{counts:?}");
    wait_settled(&zap, counts);
}
