//! What Zap knows of the API that it serves: endpoints, events of streams, what providers say of their limits.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod endpoint;

pub mod events;

pub mod responses;

pub mod error_event;

pub mod rate_limits;

pub mod redact;

pub use self::endpoint::Endpoint;
