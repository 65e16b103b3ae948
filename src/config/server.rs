//! `[server]`: the listener and its limits.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use crate::config::unix_socket::UnixSocket;
use crate::http1::origin::{Hosts, Origins};

/// `[server]`: the listener and its limits.
#[derive(Clone, Debug)]
pub struct Server {
    /// Address to listen on; `"localhost"` is read as 127.0.0.1.
    pub host: IpAddr,
    /// Port to listen on; 0 lets the system pick one.
    pub port: u16,
    /// `server.unix`: a unix socket beside.
    pub unix: Option<UnixSocket>,
    /// `admin.host` and `admin.port`: the address of the admin listener; `None`: there is none.
    pub admin: Option<SocketAddr>,
    /// Whether `/metrics` needs no client key, if the listener has it.
    pub open_metrics: bool,
    /// Worker threads, 1 to 1024.
    pub workers: usize,
    /// Largest request body, in bytes.
    pub max_body_bytes: u64,
    /// Most bytes of all request bodies together; `None`: half of the memory that the process may use.
    pub max_buffered_bytes: Option<u64>,
    /// Most open client connections, over all workers.
    pub max_connections: usize,
    /// How long SIGTERM waits for running requests, in whole seconds; may be 0.
    pub drain: Duration,
    /// How long Zap serves all requests after SIGTERM, before the drain.
    pub drain_delay: Duration,
    /// Idle time after which a client connection is closed, in whole seconds.
    pub keep_alive: Duration,
    /// Peers whose `x-forwarded-for` header is trusted.
    pub trusted_proxies: Vec<IpNet>,
    /// The origins whose web pages may use Zap.
    pub cors_origins: Origins,
    /// The names that `Host` may have; empty: any.
    pub allowed_hosts: Hosts,
}

impl Server {
    /// The keys whose values differ in `other`, as the file spells them.
    pub fn changed_keys(&self, other: &Server) -> Vec<&'static str> {
        [
            ("server.host", self.host != other.host),
            ("server.port", self.port != other.port),
            ("server.unix", self.unix != other.unix),
            ("admin.host or admin.port", self.admin != other.admin),
            ("server.open_metrics", self.open_metrics != other.open_metrics),
            ("server.workers", self.workers != other.workers),
            ("server.max_body_bytes", self.max_body_bytes != other.max_body_bytes),
            ("server.max_buffered_bytes", self.max_buffered_bytes != other.max_buffered_bytes),
            ("server.max_connections", self.max_connections != other.max_connections),
            ("server.drain_secs", self.drain != other.drain),
            ("server.drain_delay_secs", self.drain_delay != other.drain_delay),
            ("server.keep_alive_secs", self.keep_alive != other.keep_alive),
            ("server.trusted_proxies", self.trusted_proxies != other.trusted_proxies),
            ("server.cors_origins", self.cors_origins != other.cors_origins),
            ("server.allowed_hosts", self.allowed_hosts != other.allowed_hosts),
        ]
        .into_iter()
        .filter_map(|(key, differs)| differs.then_some(key))
        .collect()
    }
}
