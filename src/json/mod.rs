//! JSON as bytes (RFC 8259): the scanner of request bodies, its results, and splices, which change a body without
//! copying the rest.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub(crate) mod scan;

pub(crate) mod members;

pub(crate) mod patch;
