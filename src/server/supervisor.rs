//! Reports start, reload and stop: to systemd over `NOTIFY_SOCKET`, or to the old Zap during an upgrade.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};

use rustix::time::{ClockId, clock_gettime};

/// The variable with the socket of systemd: a path, or an abstract name after `@`.
const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";

/// The variable with the process id of the Zap that this one takes over from. Its standard input is a socket to that
/// one.
pub(crate) const PARENT_VARIABLE: &str = "ZAP_UPGRADE_FROM";

/// What the new process writes to the old one when it accepts clients.
pub(crate) const READY: u8 = b'R';

/// Reports to systemd, or to the old Zap of an upgrade. A failure to send is ignored.
#[derive(Debug, Default)]
pub(crate) struct Supervisor {
    systemd: Option<(UnixDatagram, SocketAddr)>,
    parent: Option<UnixStream>,
}

impl Supervisor {
    /// Reads the environment.
    pub(crate) fn from_env() -> Self {
        let systemd = std::env::var_os(SOCKET_VARIABLE).and_then(|name| Supervisor::systemd(&name));
        Supervisor { systemd, parent: Supervisor::parent() }
    }

    fn systemd(name: &OsString) -> Option<(UnixDatagram, SocketAddr)> {
        let address = match name.as_bytes().split_first()? {
            (b'@', name) => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(name),
        };
        let socket = UnixDatagram::unbound().ok()?;
        // A supervisor that does not read must not stop Zap.
        socket.set_nonblocking(true).ok()?;
        Some((socket, address.ok()?))
    }

    /// The socket to the Zap that this one takes over from, if that is still the parent process.
    fn parent() -> Option<UnixStream> {
        let id: i32 = std::env::var(PARENT_VARIABLE).ok()?.parse().ok()?;
        (rustix::process::getppid()?.as_raw_pid() == id).then_some(())?;
        let socket = io::stdin().as_fd().try_clone_to_owned().ok()?;
        Some(UnixStream::from(socket))
    }

    /// Zap accepts clients. The Zap that it takes over from tells systemd.
    pub(crate) fn ready(&self) {
        match &self.parent {
            Some(parent) => drop((&*parent).write_all(&[READY])),
            None => self.tell("READY=1"),
        }
    }

    /// A reload begins; [`reloaded`](Self::reloaded) ends it.
    pub(crate) fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.tv_sec * 1_000_000 + now.tv_nsec / 1000));
    }

    /// A reload has ended, applied or rejected.
    pub(crate) fn reloaded(&self) {
        self.tell("READY=1");
    }

    /// Zap stops.
    pub(crate) fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// The process `id` serves from now on.
    pub(crate) fn handed_over(&self, id: u32) {
        self.tell(&format!("MAINPID={id}\nREADY=1"));
    }

    fn tell(&self, text: &str) {
        if let Some((socket, address)) = &self.systemd {
            let _ = socket.send_to_addr(text.as_bytes(), address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_is_told_over_a_path_and_an_abstract_name() {
        let path = std::env::temp_dir().join(format!("zap-notify-{:x}", fastrand::u64(..)));
        let name = format!("zap-notify-{:x}", fastrand::u64(..));
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (socket, variable) in [
            (UnixDatagram::bind(&path).unwrap(), path.clone().into_os_string()),
            (UnixDatagram::bind_addr(&abstract_name).unwrap(), format!("@{name}").into()),
        ] {
            let supervisor = Supervisor { systemd: Supervisor::systemd(&variable), parent: None };
            supervisor.ready();
            supervisor.reloading();
            supervisor.reloaded();
            supervisor.handed_over(7);
            supervisor.stopping();
            let next = || {
                let mut buffer = [0; 256];
                let length = socket.recv(&mut buffer).unwrap();
                String::from_utf8(buffer[..length].to_vec()).unwrap()
            };
            assert_eq!(next(), "READY=1");
            let reloading = next();
            let time = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
            assert!(time.parse::<u64>().unwrap() > 0);
            assert_eq!([next(), next(), next()], ["READY=1", "MAINPID=7\nREADY=1", "STOPPING=1"]);
        }
        std::fs::remove_file(&path).unwrap();
        for nobody in ["", "@", "/nowhere/socket"] {
            let supervisor = Supervisor { systemd: Supervisor::systemd(&nobody.into()), parent: None };
            supervisor.ready();
        }
    }
}
