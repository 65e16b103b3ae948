//! The clients' side: one connection and the requests on it.

pub mod deadline;

pub mod conn;

pub mod serve;

pub mod exchange;

pub mod body;

pub mod respond;

pub mod load;

pub mod future_pool;
