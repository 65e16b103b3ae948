//! The peer of a client connection: its address and its listener.

use std::net::IpAddr;

/// The address of a client, and the listener that accepted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub address: IpAddr,
    pub listener: Listener,
}

/// A listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listener {
    /// The admin listener: it serves the pages for operators.
    Admin,
    /// The TCP listener for clients.
    Tcp,
    /// The unix socket for clients.
    Unix,
}
