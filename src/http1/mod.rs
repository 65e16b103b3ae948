//! HTTP/1.1 as bytes (RFC 9112): which request heads are served, which headers cross Zap, how an answer is read.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub(crate) mod head;

pub(crate) mod headers;

pub(crate) mod decode;

pub(crate) mod coalesce;

pub(crate) mod header_map_pool;
