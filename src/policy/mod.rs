//! Decisions without I/O: the rules that Zap follows, as plain functions and types.
//!
//! No module here opens a socket, reads a clock, draws a random number or depends on a runtime. Time is an argument
//! ([`Nanos`](crate::time::Nanos)), and so is randomness; the result is a small type that names the decision. A lint
//! (`.clippy.toml`) enforces this. The modules are listed in the order in which a request meets them.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub(crate) mod key_hasher;

mod use_order;

pub(crate) mod byte_budget;

pub(crate) mod limit;

pub(crate) mod token_window;

pub(crate) mod reservation;

pub(crate) mod prices;

pub(crate) mod spend;

pub(crate) mod pattern;

pub(crate) mod route;

pub(crate) mod near;

pub(crate) mod allowance;

pub(crate) mod throttle;

pub(crate) mod lines;

pub(crate) mod queue;

pub(crate) mod latency;

pub(crate) mod balance;

pub(crate) mod choose;

pub(crate) mod dispatch;

pub(crate) mod breaker;

pub(crate) mod gate;

pub(crate) mod pair;

pub(crate) mod known_ids;

pub(crate) mod ratio;

pub(crate) mod retry;

pub(crate) mod quota;

mod sync;

#[cfg(all(test, zap_loom))]
mod races;
