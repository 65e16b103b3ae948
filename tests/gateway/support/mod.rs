//! What every test stands on: Zap in the process, providers that do as told, clients down to the byte.

pub mod provider;

pub mod wire;

pub mod zap;

use std::time::{Duration, Instant};

pub use self::provider::Provider;
pub use self::wire::{Client, Response};
pub use self::zap::{File, Zap};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A chat that names no model.
pub const CHAT: &str = r#"{"messages":[{"role":"user","content":"hi"}]}"#;

/// The same, asking for a stream.
pub const STREAM: &str = r#"{"stream":true,"messages":[{"role":"user","content":"hi"}]}"#;

/// Waits until `done` says so.
pub fn eventually(what: &str, done: impl FnMut() -> bool) {
    within(PATIENCE, what, done);
}

/// Waits until `done` says so, for so long at most.
pub fn within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
