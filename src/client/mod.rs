//! The clients' side: one connection and the requests on it.

pub(crate) mod deadline;

mod client_io;

pub(crate) mod conn;

pub(crate) mod serve;

pub(crate) mod exchange;

pub(crate) mod body;

pub(crate) mod respond;

pub(crate) mod load;

pub(crate) mod future_pool;
