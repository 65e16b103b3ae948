//! The unix socket for clients: a file that the process makes and removes.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::process::umask;

use crate::config::UnixSocket;

/// The file of a socket. It is removed when this value is dropped, if this process owns it.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Of several processes with the same socket, only one removes the file.
    pub(crate) is_owned: bool,
}

impl SocketFile {
    /// The file of a socket that another process still owns; `None` if it has no file.
    pub(crate) fn of_another(socket: &UnixListener) -> Option<Self> {
        let path = socket.local_addr().ok()?.as_pathname()?.to_owned();
        Some(SocketFile { path, is_owned: false })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_owned {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Opens the socket. Removes what an earlier process has left there, unless somebody listens. Must be called before a
/// thread is started, since it changes the umask for a moment.
///
/// # Errors
/// Returns a message if that fails.
pub(crate) fn listen(socket: &UnixSocket) -> Result<(UnixListener, SocketFile), String> {
    let path = &socket.path;
    let listener = match bind(path, socket.mode) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path).and_then(|()| bind(path, socket.mode))
        }
        listener => listener,
    };
    match listener {
        Ok(listener) => Ok((listener, SocketFile { path: path.clone(), is_owned: true })),
        Err(e) => Err(format!("cannot listen on the unix socket {}: {e}", path.display())),
    }
}

/// Makes the socket with exactly this mode, from its first moment on.
fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let before = umask(Mode::from_raw_mode(0o777 & !mode));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// Removes the socket of a process that is gone. Does not wait for one that is there: its queue may be full.
fn remove_stale(path: &Path) -> io::Result<()> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "there is a file that is no socket"));
    }
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&socket2::SockAddr::unix(path)?) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn only_the_socket_of_a_process_that_is_gone_is_replaced() {
        let path = std::env::temp_dir().join(format!("zap-unix-{:x}", fastrand::u64(..)));
        let socket = UnixSocket { path: path.clone(), mode: 0o640 };
        let (listener, mut file) = listen(&socket).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        let why = listen(&socket).unwrap_err();
        assert!(why.ends_with("another process listens there"), "{why}");
        drop(listener);
        file.is_owned = false;
        drop(file);
        assert!(path.exists());
        let (_listener, file) = listen(&socket).unwrap();
        drop(file);
        assert!(!path.exists());
        // A process whose queue is full listens too.
        let busy = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
        let address = socket2::SockAddr::unix(&path).unwrap();
        busy.bind(&address).unwrap();
        busy.listen(0).unwrap();
        let waiting = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
        waiting.connect(&address).unwrap();
        let why = listen(&socket).unwrap_err();
        assert!(why.ends_with("another process listens there"), "{why}");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let why = listen(&socket).unwrap_err();
        assert!(why.ends_with("there is a file that is no socket"), "{why}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        std::fs::remove_file(&path).unwrap();
    }
}
