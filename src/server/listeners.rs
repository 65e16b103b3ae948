//! The listeners: one of TCP for clients, one unix socket, or both; and the admin listener.

use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use socket2::SockRef;
use tokio::net;

use crate::client::peer::{Listener, Peer};
use crate::config::{Config, ServerTls};
use crate::server::inherited::Given;

/// Stands for a client of the unix socket: it runs on this machine.
const LOCAL: Peer = Peer { address: IpAddr::V4(Ipv4Addr::LOCALHOST), listener: Listener::Unix };

/// Bytes that the kernel takes of a response before they can be sent: a client that reads slowly costs as much. What is
/// on its way is not limited, so that a distant client gets all that its connection can carry.
const MAX_UNSENT: u32 = 32 * 1024;

/// Send buffer of a connection of the unix socket; the kernel takes twice as much for its own data.
const UNIX_SEND_BUFFER: usize = 64 * 1024;

/// An accepted client. The stream of a unix socket is wrapped as one of TCP: all that is done with it works on both.
pub(crate) type Client = (TcpStream, Peer);

/// TLS of a listener; `None`: it speaks plain HTTP.
pub(crate) fn tls_of(listener: Listener, config: &Config) -> Option<&ServerTls> {
    match listener {
        Listener::Admin => config.admin.tls.as_ref(),
        Listener::Tcp => config.tls.as_ref(),
        // A unix socket never leaves the machine.
        Listener::Unix => None,
    }
}

/// The listeners of a running process.
#[derive(Debug)]
pub(crate) struct Listeners {
    tcp: Option<net::TcpListener>,
    unix: Option<net::UnixListener>,
    admin: Option<net::TcpListener>,
}

impl Listeners {
    /// Takes the listeners into the current runtime.
    ///
    /// # Errors
    /// Returns the error of the system if a listener cannot be used.
    pub(crate) fn new(
        tcp: Option<TcpListener>,
        unix: Option<UnixListener>,
        admin: Option<TcpListener>,
    ) -> io::Result<Self> {
        let into_tcp = |listener: TcpListener| {
            listener.set_nonblocking(true)?;
            // Its connections inherit it. A system without the option serves slow readers with more memory.
            #[cfg(target_os = "linux")]
            let _ = SockRef::from(&listener).set_tcp_notsent_lowat(MAX_UNSENT);
            net::TcpListener::from_std(listener)
        };
        let into_unix = |listener: UnixListener| {
            listener.set_nonblocking(true)?;
            net::UnixListener::from_std(listener)
        };
        Ok(Listeners {
            tcp: tcp.map(into_tcp).transpose()?,
            unix: unix.map(into_unix).transpose()?,
            admin: admin.map(into_tcp).transpose()?,
        })
    }

    /// Accepts the next client. Dropping the future loses none.
    pub(crate) async fn client(&self) -> io::Result<Client> {
        match (&self.tcp, &self.unix) {
            (Some(tcp), None) => accept_tcp(tcp, Listener::Tcp).await,
            (None, Some(unix)) => accept_unix(unix).await,
            (Some(tcp), Some(unix)) => tokio::select! {
                client = accept_tcp(tcp, Listener::Tcp) => client,
                client = accept_unix(unix) => client,
            },
            (None, None) => std::future::pending().await,
        }
    }

    /// Accepts the next operator. Dropping the future loses none.
    pub(crate) async fn operator(&self) -> io::Result<Client> {
        match &self.admin {
            Some(admin) => accept_tcp(admin, Listener::Admin).await,
            None => std::future::pending().await,
        }
    }

    /// Closes the listeners for clients, but takes the clients that wait in the kernel's queues first: the kernel would
    /// reset them. The admin listener is dropped.
    pub(crate) fn close(self, mut take: impl FnMut(Client)) {
        // Any error means that no further client can be taken; most often the queue is empty.
        if let Some(listener) = self.tcp.and_then(|listener| listener.into_std().ok()) {
            while let Ok((client, peer)) = listener.accept() {
                let _ = client.set_nodelay(true);
                if client.set_nonblocking(true).is_ok() {
                    take((client, Peer { address: peer.ip(), listener: Listener::Tcp }));
                }
            }
        }
        if let Some(listener) = self.unix.and_then(|listener| listener.into_std().ok()) {
            while let Ok((client, _)) = listener.accept() {
                if client.set_nonblocking(true).is_ok() {
                    take((OwnedFd::from(client).into(), LOCAL));
                }
            }
        }
    }

    /// The listening sockets.
    pub(crate) fn sockets(&self) -> Vec<Given<BorrowedFd<'_>>> {
        let (tcp, unix) = (self.tcp.as_ref().map(|l| l.as_fd()), self.unix.as_ref().map(|l| l.as_fd()));
        let clients = tcp.into_iter().chain(unix).map(|socket| Given { socket, is_admin: false });
        let admin = self.admin.as_ref().map(|l| Given { socket: l.as_fd(), is_admin: true });
        clients.chain(admin).collect()
    }
}

async fn accept_tcp(socket: &net::TcpListener, listener: Listener) -> io::Result<Client> {
    let (client, peer) = socket.accept().await?;
    let _ = client.set_nodelay(true);
    Ok((client.into_std()?, Peer { address: peer.ip(), listener }))
}

async fn accept_unix(listener: &net::UnixListener) -> io::Result<Client> {
    let (client, _) = listener.accept().await?;
    let _ = SockRef::from(&client).set_send_buffer_size(UNIX_SEND_BUFFER);
    Ok((OwnedFd::from(client.into_std()?).into(), LOCAL))
}
