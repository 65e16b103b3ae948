//! HTTP/1.1 as bytes (RFC 9112): checks of request heads, the headers that pass through Zap, the decoder of responses.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub(crate) mod accept;

pub(crate) mod head;

pub(crate) mod header_rules;

pub(crate) mod headers;

pub(crate) mod origin;

pub(crate) mod percent;

pub(crate) mod chunked;

pub(crate) mod decode;

pub(crate) mod coalesce;

pub(crate) mod header_map_pool;

pub(crate) mod trace_context;
