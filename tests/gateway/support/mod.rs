//! Test support: Zap inside the test process, scripted providers, and a client with control of every byte.

pub(crate) mod ledger;

pub(crate) mod lies;

pub(crate) mod provider;

pub(crate) mod tls_client;

pub(crate) mod tls_server;

pub(crate) mod wire;

pub(crate) mod zap;

use std::time::{Duration, Instant};

pub(crate) use self::ledger::Ledger;
pub(crate) use self::provider::Provider;
pub(crate) use self::wire::{Client, Response};
pub(crate) use self::zap::{File, Zap};

/// The time after which a wait in a test fails.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

/// A chat request body without a model.
pub(crate) const CHAT: &str = r#"{"messages":[{"role":"user","content":"hi"}]}"#;

/// A chat request body that asks for a stream.
pub(crate) const STREAM: &str = r#"{"stream":true,"messages":[{"role":"user","content":"hi"}]}"#;

/// Waits until `done` returns true; panics after [`TIMEOUT`].
pub(crate) fn eventually(what: &str, done: impl FnMut() -> bool) {
    within(TIMEOUT, what, done);
}

/// Asserts what `retry-after` says of a wait of `secs` that began after `since`.
pub(crate) fn assert_wait(response: &Response, secs: u64, since: Instant) {
    let wait: u64 = response.header("retry-after").unwrap().parse().unwrap();
    let least = secs.saturating_sub(since.elapsed().as_secs());
    assert!((least..=secs).contains(&wait), "{wait} s, should be {least} to {secs}");
}

/// Waits until `done` returns true; panics after `limit`.
pub(crate) fn within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
