//! `server.unix`: the unix socket beside the listener.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::openssl::Folder;
use super::upgrade::{Newest, newest};
use super::{CHAT, File, OK, Running, ask, config, provider, run, stderr, zap};

/// A path that is deleted on drop.
pub(super) struct Socket(pub(super) PathBuf);

impl Socket {
    pub(super) fn new() -> Self {
        Socket(std::env::temp_dir().join(format!("zap-unix-{:x}", fastrand::u64(..))))
    }

    /// A configuration with this path as `server.unix`.
    pub(super) fn configuration(&self) -> File {
        let more = format!("unix = {:?}\nunix_mode = \"600\"", self.0);
        File::new(&format!("unix-{:x}", fastrand::u64(..)), &config(provider(OK, Duration::ZERO), &more))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Sends a chat and reads the whole response.
pub(super) fn chat(path: &Path) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let head = "POST /chat HTTP/1.1\r\nhost: a\r\nconnection: close";
    write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{CHAT}", CHAT.len()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

pub(super) fn wait_for_end(newest: &Newest) {
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while !newest.is_gone() {
        assert!(std::time::Instant::now() < end, "the process does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_unix_socket_serves_beside_the_listener_over_an_upgrade_and_is_removed_at_the_end() {
    let socket = Socket::new();
    let file = socket.configuration();
    let mut command = zap();
    let mut zap_ = Running::start(command.args(["--config", file.path()]));
    zap_.line(&format!("listening on the unix socket {}", socket.0.display()));
    assert_eq!(socket.0.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(chat(&socket.0).ends_with("ok"));
    assert!(ask(zap_.address, "POST /chat HTTP/1.1", CHAT).ends_with("ok"));
    let second = zap().args(["--config", file.path()]).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("another process listens there"), "{}", stderr(&second));

    // A new process that fails leaves the socket.
    let text = std::fs::read_to_string(&file.0).unwrap();
    std::fs::write(&file.0, format!("{text}[ledger]\npath = \"/nowhere/zap.db\"\n")).unwrap();
    zap_.signal("USR2");
    zap_.line("the upgrade failed");
    assert!(chat(&socket.0).ends_with("ok"));
    std::fs::write(&file.0, text).unwrap();
    let mut newest = newest(&zap_);
    newest.upgrade(&zap_);
    assert_eq!(zap_.exit_code(), Some(0));
    assert!(chat(&socket.0).ends_with("ok"), "the old process has left the socket");
    assert!(newest.signal("TERM"));
    wait_for_end(&newest);
    assert!(!socket.0.exists());
}

#[test]
fn the_socket_of_a_process_that_was_killed_is_replaced() {
    let socket = Socket::new();
    let file = socket.configuration();
    for _ in 0..2 {
        let mut command = zap();
        let zap = Running::start(command.args(["--config", file.path()]));
        zap.line("listening on the unix socket");
        assert!(chat(&socket.0).ends_with("ok"));
        drop(zap);
        assert!(socket.0.exists(), "it was killed");
    }
}

#[test]
fn a_unix_socket_speaks_plain_http_beside_a_listener_with_tls() {
    let (socket, folder) = (Socket::new(), Folder::new());
    folder.make("zap.test", "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1");
    let path = folder.0.join("zap.test").display().to_string();
    let entry =
        format!("[[server.tls]]\ncert = \"{path}.pem\"\nkey = \"{path}.key\"\nclient_ca = \"{path}.pem\"\n");
    let zap =
        Running::with(&config(provider(OK, Duration::ZERO), &format!("unix = {:?}\n{entry}", socket.0)));
    let line = zap.line("listening on the unix socket");
    assert!(!line.contains("TLS"), "{line}");
    assert!(chat(&socket.0).ends_with("ok"));
    let plain = run(&["healthcheck", "--url", &format!("http://{}/health", zap.address)]);
    assert!(stderr(&plain).contains("HTTP 400"), "TCP speaks TLS: {}", stderr(&plain));
}
