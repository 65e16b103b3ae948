//! The clients' side: one connection and the requests on it.

pub mod deadline;

pub mod conn;

pub mod serve;

pub mod body;

pub mod future_pool;
