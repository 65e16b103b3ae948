//! An upgrade: the program on disk is started anew with the same arguments, takes the listening sockets, and says when
//! it accepts clients. The sockets are never closed, so no client notices.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::server::inherited::{Given, Handover};
use crate::server::supervisor::{PARENT_VARIABLE, READY};

/// How long the new process may take until it accepts clients.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a process that has closed its end may take to exit, so that its exit code can be named.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// How often its exit is polled meanwhile.
const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The new process. Dropping this value kills it, unless it is [ready](Self::ready).
#[derive(Debug)]
pub(crate) struct Next {
    child: Child,
    link: UnixStream,
    limit: Duration,
    /// When `limit` has passed.
    end: Instant,
    is_ready: bool,
}

impl Next {
    /// Starts the program on disk with the arguments of this process and `sockets`. `owns_unix`: whether this process
    /// owns the file of the unix socket. Must be called within a runtime.
    ///
    /// # Errors
    /// Returns a message if it cannot be started.
    pub(crate) fn start<F: AsFd>(sockets: &[Given<F>], owns_unix: bool) -> Result<Self, String> {
        if std::process::id() == 1 {
            return Err("process 1 of a container cannot be replaced: the container ends with it".into());
        }
        let mut arguments = std::env::args_os();
        // As it was called: a link to the newest version is followed again.
        let program = arguments.next().map_or_else(own_path, Ok);
        let program = program.map_err(|e| format!("the program cannot be found: {e}"))?;
        let mut command = Command::new(&program);
        command.args(arguments);
        let name = program.display();
        Next::run(command, (sockets, owns_unix), READY_TIMEOUT)
            .map_err(|e| format!("{name} cannot be started: {e}"))
    }

    fn run<F: AsFd>(
        mut command: Command,
        (sockets, owns_unix): (&[Given<F>], bool),
        limit: Duration,
    ) -> io::Result<Self> {
        let (ours, theirs) = net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let link = UnixStream::from_std(ours)?;
        let handover = Handover::new(sockets, owns_unix, &mut command)?;
        command
            .env(PARENT_VARIABLE, std::process::id().to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)));
        let child = command.spawn()?;
        drop(handover);
        Ok(Next { child, link, limit, end: Instant::now() + limit, is_ready: false })
    }

    /// The id of the process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it accepts clients. May be dropped and called again.
    ///
    /// # Errors
    /// Returns why it does not, after at most 30 s and the time that it takes to exit.
    pub(crate) async fn ready(&mut self) -> Result<(), String> {
        let Ok(is_ready) = timeout_at(self.end, self.receive_ready()).await else {
            return Err(format!("it was not ready within {} s and was killed", self.limit.as_secs()));
        };
        self.is_ready = is_ready;
        if is_ready { Ok(()) } else { Err(self.end().await) }
    }

    /// Waits for the ready byte. Returns `false` if the new process closed the socket.
    async fn receive_ready(&self) -> bool {
        loop {
            if self.link.ready(Interest::READABLE).await.is_err() {
                return false;
            }
            let mut byte = [0];
            match self.link.try_read(&mut byte) {
                Ok(1) if byte == [READY] => return true,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                _ => return false,
            }
        }
    }

    /// How the process ended.
    async fn end(&mut self) -> String {
        let exit = async {
            loop {
                if let Ok(Some(status)) = self.child.try_wait() {
                    return status;
                }
                sleep(EXIT_POLL_INTERVAL).await;
            }
        };
        match timeout(EXIT_TIMEOUT, exit).await.map(|status| (status, status.code())) {
            Ok((_, Some(code))) => format!("it exited with code {code}; see its message in the log"),
            Ok((status, None)) => format!("it was ended by a {status}"),
            Err(_) => "it did not start, and was killed".into(),
        }
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        if !self.is_ready {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn own_path() -> io::Result<OsString> {
    std::env::current_exe().map(OsString::from)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn within<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    fn shell(script: &str, limit: Duration) -> Next {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let given = |i| Given { socket: TcpListener::bind("127.0.0.1:0").unwrap(), is_admin: i == 2 };
        let sockets: Vec<_> = (0..3).map(given).collect();
        Next::run(command, (&sockets, false), limit).unwrap()
    }

    #[test]
    fn a_new_process_is_ready_or_its_end_is_named() {
        within(async {
            let limit = Duration::from_secs(10);
            for (script, want) in [
                ("printf R >&0", Ok(())),
                ("exit 2", Err("it exited with code 2; see its message in the log")),
                ("printf X >&0; exit 3", Err("it exited with code 3; see its message in the log")),
                ("kill -9 $$", Err("it was ended by a signal: 9 (SIGKILL)")),
            ] {
                assert_eq!(shell(script, limit).ready().await, want.map_err(str::to_owned), "{script}");
            }
            let mut silent = shell("exec sleep 60", Duration::from_millis(50));
            let why = silent.ready().await.unwrap_err();
            assert!(why.contains("was killed"), "{why}");
            let id = silent.id();
            drop(silent);
            assert!(!std::path::Path::new(&format!("/proc/{id}")).exists(), "it is gone");
        });
    }

    #[test]
    fn the_sockets_are_consecutive_open_files_of_the_new_process_alone() {
        within(async {
            let script = "i=0; while [ $i -lt $LISTEN_FDS ]; do \
                          case $(readlink /proc/$$/fd/$((LISTEN_FDS_FIRST_FD + i))) in socket:*) ;; *) exit 9;; esac; \
                          i=$((i + 1)); done; [ $i = 3 ] && [ -z \"$LISTEN_PID\" ] && [ $LISTEN_FDNAMES = clients:clients:admin ] && printf R >&0";
            assert_eq!(shell(script, Duration::from_secs(10)).ready().await, Ok(()));
        });
    }
}
