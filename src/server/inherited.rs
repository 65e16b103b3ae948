//! Listening sockets that another process has opened: systemd, or the Zap that this one takes over from. They come as
//! open files from number 3 on, and `LISTEN_FDS` says how many.
//!
//! Between two Zaps `LISTEN_PID` is left out, since no process knows the id of the next one before it runs, and
//! `LISTEN_FDS_FIRST_FD` says at which number the files begin, since 3 may be in use. `LISTEN_FDNAMES` says which
//! socket is that of the admin listener.

use std::ffi::OsString;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::Command;

use listenfd::ListenFd;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

/// The first number for sockets on their way to another process: above those of the standard streams.
const FIRST: i32 = 3;

/// The variable that says `1` if the process must remove the file of the unix socket that it gets. Of the sockets of
/// systemd, systemd removes the files.
const OWNS_UNIX_VARIABLE: &str = "ZAP_OWNS_UNIX";

/// The variable with the names of the sockets, with a `:` between two.
const NAMES_VARIABLE: &str = "LISTEN_FDNAMES";

/// The name of the socket of the admin listener: `FileDescriptorName=` of its socket unit.
const ADMIN: &str = "admin";

/// The name of any other socket.
const CLIENTS: &str = "clients";

/// A listening socket for another process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Given<F> {
    pub(crate) socket: F,
    /// Whether it is that of the admin listener.
    pub(crate) is_admin: bool,
}

/// Sockets of another process.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    pub(crate) tcp: Option<TcpListener>,
    /// The socket with the name [`ADMIN`].
    pub(crate) admin: Option<TcpListener>,
    pub(crate) unix: Option<UnixListener>,
    /// Whether this process will own the file of the unix socket.
    pub(crate) owns_unix: bool,
    /// Whether the sockets are those of another Zap.
    pub(crate) is_upgrade: bool,
}

/// Takes the listening sockets of the environment: at most one of TCP for clients, one for the admin listener, and one
/// unix socket. Must be called before a thread is started.
///
/// # Errors
/// Returns a message if there is another socket, or one too many.
pub(crate) fn take() -> Result<Inherited, String> {
    let names = std::env::var(NAMES_VARIABLE).unwrap_or_default();
    let mut names = names.split(':');
    let mut given = ListenFd::from_env();
    let owns_unix = std::env::var_os(OWNS_UNIX_VARIABLE);
    let mut found = Inherited {
        is_upgrade: owns_unix.is_some(),
        owns_unix: owns_unix.is_some_and(|value| value == "1"),
        ..Inherited::default()
    };
    for index in 0..given.len() {
        let (number, is_admin) = (index + 1, names.next() == Some(ADMIN));
        let tcp_of_name = if is_admin { &mut found.admin } else { &mut found.tcp };
        match (given.take_tcp_listener(index), tcp_of_name.is_some(), found.unix.is_some()) {
            (Ok(tcp), false, _) => *tcp_of_name = tcp,
            (Err(_), _, false) if !is_admin => {
                let what = |e| format!("socket {number} of LISTEN_FDS cannot be used: {e}");
                found.unix = given.take_unix_listener(index).map_err(what)?;
            }
            (Err(_), _, _) if is_admin => {
                return Err(format!("socket {number} of LISTEN_FDS has the name {ADMIN} and must be of TCP"));
            }
            _ => {
                return Err(format!(
                    "socket {number} of LISTEN_FDS is one too many; Zap takes one TCP socket, one unix socket, and one \
                     TCP socket with the name {ADMIN}"
                ));
            }
        }
    }
    Ok(found)
}

/// Copies of the sockets for the new process. Drop it after the spawn: until then every child inherits them.
#[derive(Debug)]
pub(crate) struct Handover(#[expect(dead_code, reason = "open files")] Vec<OwnedFd>);

impl Handover {
    /// Copies `sockets` to consecutive numbers and names these in the environment of `command`. `owns_unix`: whether
    /// the process will own the file of the unix socket.
    ///
    /// # Errors
    /// Returns the error of the system if no more files can be opened.
    pub(crate) fn new<F: AsFd>(
        sockets: &[Given<F>],
        owns_unix: bool,
        command: &mut Command,
    ) -> io::Result<Self> {
        let mut first = FIRST;
        let copies = loop {
            let mut copies: Vec<OwnedFd> = Vec::new();
            for Given { socket, .. } in sockets {
                let lowest = copies.last().map_or(first, |copy| copy.as_raw_fd() + 1);
                copies.push(fcntl_dupfd_cloexec(socket, lowest)?);
            }
            let numbers: Vec<i32> = copies.iter().map(|copy| copy.as_raw_fd()).collect();
            let (Some(low), Some(high)) = (numbers.first(), numbers.last()) else { break copies };
            if (high - low) as usize + 1 == numbers.len() {
                break copies;
            }
            // Another file stands between them.
            first = *high;
        };
        for copy in &copies {
            fcntl_setfd(copy, FdFlags::empty())?;
        }
        let number = |n: usize| OsString::from(n.to_string());
        let first = copies.first().map_or(FIRST, |copy| copy.as_raw_fd());
        let names: Vec<_> =
            sockets.iter().map(|given| if given.is_admin { ADMIN } else { CLIENTS }).collect();
        command.env_remove("LISTEN_PID").env(NAMES_VARIABLE, names.join(":"));
        command.env(OWNS_UNIX_VARIABLE, if owns_unix { "1" } else { "0" });
        command.env("LISTEN_FDS", number(copies.len())).env("LISTEN_FDS_FIRST_FD", first.to_string());
        Ok(Handover(copies))
    }
}
