//! What the command line gives to the server beside the configuration.

use std::net::TcpListener;

/// The listener and the options of a process.
#[derive(Debug)]
pub struct Setup {
    /// The listener for clients.
    pub(crate) tcp: TcpListener,
    /// Whether `--watch` is set: files are watched whatever `reload.watch` says.
    pub(crate) watch: bool,
}

impl From<TcpListener> for Setup {
    fn from(tcp: TcpListener) -> Self {
        Setup { tcp, watch: false }
    }
}
