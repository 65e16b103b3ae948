//! JSON as bytes (RFC 8259): the scanner of request bodies, what it finds, and the splice that changes a body without
//! copying the rest.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub(crate) mod scan;

pub(crate) mod members;

pub(crate) mod patch;
