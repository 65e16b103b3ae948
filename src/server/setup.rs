//! Opens the listeners, and holds the options of the command line.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use crate::client::peer::Listener;
use crate::config::Server;
use crate::server::inherited;
use crate::server::supervisor::Supervisor;
use crate::server::unix_socket::{self, SocketFile};

/// Maximum number of connections that wait in the kernel until they are accepted.
const BACKLOG: i32 = 4096;

/// The listeners and the options of a process.
#[derive(Debug, Default)]
pub struct Setup {
    /// The listener for clients.
    pub(crate) tcp: Option<TcpListener>,
    /// The unix socket for clients.
    pub(crate) unix: Option<UnixListener>,
    /// The admin listener.
    pub(crate) admin: Option<TcpListener>,
    /// The file of the unix socket, if this process removes it.
    pub(crate) unix_file: Option<SocketFile>,
    pub(crate) options: Arc<Options>,
}

/// The options of a process.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// Whether `--watch` is set: files are watched whatever `reload.watch` says.
    pub(crate) watch: bool,
    /// Reports to systemd, or to the old Zap of an upgrade. A failure to send is ignored.
    pub(crate) supervisor: Supervisor,
}

impl Setup {
    /// What each listener listens on, in words.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = (String, Listener)> {
        let unix = self.unix.as_ref().and_then(|unix| {
            let address = unix.local_addr().ok()?;
            let path =
                address.as_pathname().map_or("without a name".into(), |path| path.display().to_string());
            Some((format!("the unix socket {path}"), Listener::Unix))
        });
        let tcp = address_of(self.tcp.as_ref()).map(|address| (address.to_string(), Listener::Tcp));
        let admin = address_of(self.admin.as_ref()).map(|address| (address.to_string(), Listener::Admin));
        tcp.into_iter().chain(unix).chain(admin)
    }

    /// The TCP listener that serves the page.
    pub(crate) fn page(&self) -> Option<(SocketAddr, Listener)> {
        let tcp = || Some((address_of(self.tcp.as_ref())?, Listener::Tcp));
        address_of(self.admin.as_ref()).map(|address| (address, Listener::Admin)).or_else(tcp)
    }
}

fn address_of(listener: Option<&TcpListener>) -> Option<SocketAddr> {
    listener?.local_addr().ok()
}

impl Setup {
    /// Adds the admin listener.
    #[must_use]
    pub fn with_admin(self, admin: Option<TcpListener>) -> Self {
        Setup { admin, ..self }
    }
}

impl From<TcpListener> for Setup {
    fn from(tcp: TcpListener) -> Self {
        Setup { tcp: Some(tcp), ..Setup::default() }
    }
}

/// Takes the listeners that another process has opened; if there are none, opens that of the configuration. Must be
/// called before a thread is started. `watch`: whether `--watch` is set.
///
/// # Errors
/// Returns a message if that fails.
pub(crate) fn open(server: &Server, watch: bool) -> Result<Setup, String> {
    let inherited = inherited::take()?;
    let tcp = match inherited.tcp {
        None if inherited.unix.is_none() => Some(listen(SocketAddr::new(server.host, server.port))?),
        given => given,
    };
    let admin = match (inherited.admin, server.admin) {
        (_, None) => None,
        // Who may use it is that of the new configuration, so the address must be, too.
        (Some(given), Some(address)) if !inherited.is_upgrade || is_at(&given, address) => Some(given),
        (_, Some(address)) => Some(listen(address)?),
    };
    let options = Options { watch, supervisor: Supervisor::from_env() };
    let (unix, unix_file) = match (inherited.unix, &server.unix) {
        (Some(given), _) if inherited.owns_unix => {
            let file = SocketFile::of_another(&given);
            (Some(given), file)
        }
        (None, Some(own)) => {
            let (listener, file) = unix_socket::listen(own)?;
            (Some(listener), Some(file))
        }
        (given, _) => (given, None),
    };
    Ok(Setup { tcp, unix, admin, unix_file, options: Arc::new(options) })
}

/// Whether `listener` was opened at `address`; port 0 stands for any.
fn is_at(listener: &TcpListener, address: SocketAddr) -> bool {
    let is = |own: SocketAddr| own.ip() == address.ip() && [0, own.port()].contains(&address.port());
    listener.local_addr().is_ok_and(is)
}

/// Opens a listener.
///
/// # Errors
/// Returns a message if the address cannot be used.
pub(crate) fn listen(address: SocketAddr) -> Result<TcpListener, String> {
    bind(address).map_err(|e| format!("cannot listen on {address}: {e}"))
}

/// Opens a listener with a long backlog. SO_REUSEADDR lets a restarted Zap bind the same address at once.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
