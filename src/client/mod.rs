//! The client's side of Zap: connections, and the exchanges on them.

pub(crate) mod deadline;

mod client_io;

mod stream;

pub(crate) mod handshake;

mod progress;

mod reader;

pub(crate) mod conn;

pub(crate) mod connection_limit;

pub(crate) mod peer;

pub(crate) mod serve;

pub(crate) mod exchange;

pub(crate) mod body;

pub(crate) mod respond;

pub(crate) mod load;

pub(crate) mod future_pool;
