//! Zap under systemd: sockets that it opens, and what Zap tells it.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::faults::wait_until;
use super::unix_socket::{Socket, chat, wait_for_end};
use super::upgrade::newest;
use super::{CHAT, File, OK, Running, ask, config, provider, stderr, zap};

/// The socket that systemd listens on; deleted on drop.
struct Systemd {
    path: PathBuf,
    socket: UnixDatagram,
}

impl Systemd {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("zap-systemd-{:x}", fastrand::u64(..)));
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Systemd { path, socket }
    }

    fn next(&self) -> String {
        let mut buffer = [0; 256];
        let length = self.socket.recv(&mut buffer).expect("Zap says nothing");
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Starts Zap as systemd does: with `socket` as open file 3.
fn activated(socket: OwnedFd, file: &File) -> Command {
    let mut command = shell("exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", file);
    command.stdin(Stdio::from(socket));
    command
}

/// Runs `script` with the command line of Zap as its arguments.
fn shell(script: &str, file: &File) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_zap"), "--config", file.path()]);
    command.env_remove("ZAP_CONFIG");
    command
}

#[test]
fn systemd_opens_the_socket_and_hears_of_start_reload_upgrade_and_stop() {
    // Nothing listens on the port of the configuration.
    let text = config(provider(OK, Duration::ZERO), "").replace("port = 0", "port = 1");
    let file = File::new(&format!("systemd-{:x}", fastrand::u64(..)), &text);
    let systemd = Systemd::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut command = activated(listener.into(), &file);
    let mut zap = Running::start(command.env("NOTIFY_SOCKET", &systemd.path));
    assert_eq!(zap.address, address);
    assert_eq!(systemd.next(), "READY=1");
    assert!(ask(address, "POST /chat HTTP/1.1", CHAT).ends_with("ok"));
    for text in [&*text, "bad"] {
        std::fs::write(&file.0, text).unwrap();
        zap.signal("HUP");
        let reloading = systemd.next();
        assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
        assert_eq!(systemd.next(), "READY=1");
    }
    std::fs::write(&file.0, &text).unwrap();
    let mut newest = newest(&zap);
    newest.upgrade(&zap);
    assert_eq!(
        systemd.next(),
        format!("MAINPID={}\nREADY=1", newest.id()),
        "the old process alone is believed"
    );
    assert_eq!(zap.exit_code(), Some(0));
    assert!(ask(address, "POST /chat HTTP/1.1", CHAT).ends_with("ok"));
    assert!(newest.signal("TERM"));
    assert_eq!(systemd.next(), "STOPPING=1");
}

#[test]
fn a_socket_of_another_process_is_not_taken_and_a_strange_one_is_refused() {
    let file =
        File::new(&format!("systemd-{:x}", fastrand::u64(..)), &config(provider(OK, Duration::ZERO), ""));
    let mut command = zap();
    let zap =
        Running::start(command.args(["--config", file.path()]).env("LISTEN_FDS", "1").env("LISTEN_PID", "1"));
    assert!(ask(zap.address, "POST /chat HTTP/1.1", CHAT).ends_with("ok"));
    let strange = activated(UnixDatagram::unbound().unwrap().into(), &file).output().unwrap();
    assert_eq!(strange.status.code(), Some(1));
    assert!(
        stderr(&strange).contains("\"message\":\"socket 1 of LISTEN_FDS cannot be used: "),
        "{}",
        stderr(&strange)
    );
}

#[test]
fn the_file_of_a_socket_that_systemd_has_opened_stays_over_upgrades() {
    let socket = Socket::new();
    let file = socket.configuration();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let unix = UnixListener::bind(&socket.0).unwrap();
    // The sockets come as the standard input and output, since these have a number in every process.
    let mut command =
        shell("exec 3<&0 4<&1 </dev/null >/dev/null; LISTEN_PID=$$ LISTEN_FDS=2 exec \"$@\"", &file);
    command.stdin(Stdio::from(OwnedFd::from(tcp))).stdout(Stdio::from(OwnedFd::from(unix)));
    let mut zap = Running::start(&mut command);
    drop(command);
    zap.line(&format!("listening on the unix socket {}", socket.0.display()));
    let mut newest = newest(&zap);
    for _ in 0..2 {
        newest.upgrade(&zap);
        assert!(chat(&socket.0).ends_with("ok"));
    }
    assert_eq!(zap.exit_code(), Some(0));
    assert!(newest.signal("TERM"));
    wait_for_end(&newest);
    assert!(socket.0.exists(), "systemd listens there");
}

#[test]
fn systemd_opens_the_socket_of_the_admin_listener_by_its_name() {
    let text = config(provider(OK, Duration::ZERO), "[admin]\nport = 1\ntoken = \"zt-1\"");
    let file = File::new(&format!("systemd-{:x}", fastrand::u64(..)), &text);
    let (clients, admin) =
        (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let operators = admin.local_addr().unwrap();
    let script = "exec 3<&0 4<&1 </dev/null >/dev/null; \
                  LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=admin:zap.socket exec \"$@\"";
    let mut command = shell(script, &file);
    command.stdin(Stdio::from(OwnedFd::from(admin))).stdout(Stdio::from(OwnedFd::from(clients)));
    let zap = Running::start(&mut command);
    drop(command);
    zap.line(&format!("listening on {operators} for operators"));
    let mut newest = newest(&zap);
    for _ in 0..2 {
        let status = ask(operators, "GET /status HTTP/1.1\r\nauthorization: Bearer zt-1", "");
        assert!(status.starts_with("HTTP/1.1 200 "), "{status}");
        assert!(ask(operators, "GET /status HTTP/1.1", "").starts_with("HTTP/1.1 401 "));
        assert!(ask(operators, "GET /ready HTTP/1.1", "").starts_with("HTTP/1.1 200 "));
        assert!(ask(zap.address, "GET /status HTTP/1.1", "").starts_with("HTTP/1.1 404 "));
        assert!(ask(zap.address, "POST /chat HTTP/1.1", CHAT).ends_with("ok"));
        // The configuration that systemd's socket overrode is not that of an upgrade.
        std::fs::write(&file.0, text.replace("port = 1", &format!("port = {}", operators.port()))).unwrap();
        newest.upgrade(&zap);
    }
    std::fs::write(&file.0, text.replace("port = 1\ntoken = \"zt-1\"", "host = \"127.0.0.2\"\nport = 0"))
        .unwrap();
    newest.upgrade(&zap);
    let is_gone = || TcpStream::connect(operators).is_err();
    wait_until("the new process does not serve at the old address without the token", is_gone);
}
