//! Decisions without I/O: every rule that Zap follows, as plain functions and types.
//!
//! Nothing in here opens a socket, reads a clock, draws a random number or knows a runtime. Time comes in as
//! [`Nanos`], randomness as an argument, and what goes out is a small type that names the decision. A lint
//! (`.clippy.toml`) holds the wall. The modules stand in the order in which a request meets them.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod head;

pub mod headers;

pub mod limit;

pub mod fields;

pub mod scan;

pub mod route;

pub mod near;

pub mod allowance;

pub mod queue;

pub mod balance;

pub mod choose;

pub mod dispatch;

pub mod breaker;

pub mod patch;

pub mod retry;

pub mod quota;

pub mod advertised;

pub mod events;

pub mod redact;

pub mod responses;

mod sync;

#[cfg(all(test, zap_loom))]
mod races;

/// Monotonic time in nanoseconds since the process started.
pub type Nanos = u64;

/// One second in [`Nanos`].
pub const SECOND: Nanos = 1_000_000_000;

/// One millisecond in [`Nanos`].
pub const MILLI: Nanos = 1_000_000;
