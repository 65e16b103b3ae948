//! HTTP/1.1 as bytes (RFC 9112): which request heads are served, which headers cross Zap, how an answer is read.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod head;

pub mod headers;

pub mod decode;

pub mod coalesce;

pub mod header_map_pool;
