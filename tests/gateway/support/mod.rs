//! What every test stands on: Zap in the process, providers that do as told, clients down to the byte.

pub(crate) mod provider;

pub(crate) mod wire;

pub(crate) mod zap;

use std::time::{Duration, Instant};

pub(crate) use self::provider::Provider;
pub(crate) use self::wire::{Client, Response};
pub(crate) use self::zap::{File, Zap};

/// How long anything may take before a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// A chat that names no model.
pub(crate) const CHAT: &str = r#"{"messages":[{"role":"user","content":"hi"}]}"#;

/// The same, asking for a stream.
pub(crate) const STREAM: &str = r#"{"stream":true,"messages":[{"role":"user","content":"hi"}]}"#;

/// Waits until `done` says so.
pub(crate) fn eventually(what: &str, done: impl FnMut() -> bool) {
    within(PATIENCE, what, done);
}

/// Waits until `done` says so, for so long at most.
pub(crate) fn within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
