//! Decisions without I/O: every rule that Zap follows, as plain functions and types.
//!
//! Nothing in here opens a socket, reads a clock, draws a random number or knows a runtime. Time comes in as
//! [`Nanos`], randomness as an argument, and what goes out is a small type that names the decision. A lint
//! (`.clippy.toml`) holds the wall. The modules stand in the order in which a request meets them.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod limit;

pub mod route;

pub mod near;

pub mod allowance;

pub mod queue;

pub mod balance;

pub mod choose;

pub mod dispatch;

pub mod breaker;

pub mod retry;

pub mod quota;

mod sync;

#[cfg(all(test, zap_loom))]
mod races;
