//! SIGUSR2: the program on disk takes the listeners, and no client notices.

use std::io::{BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::{CHAT, File, OK, Running, ask, config, provider};

/// A program of its own on disk, so that a test can replace it. Deleted on drop.
pub(super) struct Program(PathBuf);

impl Program {
    pub(super) fn new() -> Self {
        let path = std::env::temp_dir().join(format!("zap-upgrade-{:x}", fastrand::u64(..)));
        std::fs::hard_link(env!("CARGO_BIN_EXE_zap"), &path)
            .or_else(|_| std::fs::copy(env!("CARGO_BIN_EXE_zap"), &path).map(drop))
            .unwrap();
        Program(path)
    }

    fn command(&self, file: &File) -> Command {
        let mut command = Command::new(&self.0);
        command.stdin(Stdio::null()).env_remove("ZAP_CONFIG").args(["--config", file.path()]);
        command
    }

    /// Replaces the program, as a package manager does, while it runs.
    fn replace(&self, with: &Path) {
        std::fs::rename(with, &self.0).unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The newest process; killed on drop, since it is nobody's child.
pub(super) struct Newest(u32);

impl Newest {
    pub(super) fn signal(&self, name: &str) -> bool {
        let number = self.0.to_string();
        Command::new("kill")
            .args([&format!("-{name}"), &number])
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    }

    pub(super) fn id(&self) -> u32 {
        self.0
    }

    /// Upgrades, and waits until the next process has taken the listeners.
    pub(super) fn upgrade(&mut self, zap: &Running) {
        let taken = || {
            let log = zap.log.lock().unwrap();
            log.iter().filter(|line| line.contains("has taken the listeners")).cloned().collect::<Vec<_>>()
        };
        let before = taken().len();
        assert!(self.signal("USR2"));
        wait("the listeners are taken", || taken().len() > before);
        let line = taken().pop().unwrap();
        let (_, rest) = line.split_once("process ").unwrap();
        self.0 = rest.split(' ').next().unwrap().parse().unwrap();
    }

    pub(super) fn is_gone(&self) -> bool {
        !Path::new(&format!("/proc/{}", self.0)).exists()
    }
}

impl Drop for Newest {
    fn drop(&mut self) {
        self.signal("KILL");
    }
}

pub(super) fn newest(zap: &Running) -> Newest {
    Newest(zap.child.0.id())
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A provider of streams with an event every 20 ms, and of short answers.
fn streaming_provider() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut requests = BufReader::new(stream.try_clone().unwrap());
                while let Some((_, body)) = read_message(&mut requests) {
                    if !String::from_utf8_lossy(&body).contains("\"stream\":true") {
                        if stream.write_all(OK.as_bytes()).is_err() {
                            return;
                        }
                        continue;
                    }
                    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
                    let event = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n";
                    let mut write = |text: &str| stream.write_all(text.as_bytes()).is_ok();
                    let mut is_open = write(head);
                    for _ in 0..100 {
                        is_open = is_open && write(&format!("{:x}\r\n{event}\r\n", event.len()));
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    if !(is_open && write("e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")) {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Reads a head and its body with `content-length` or, in chunks, up to the end; `None` if the connection ends before.
fn read_message(from: &mut impl std::io::BufRead) -> Option<(String, Vec<u8>)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if from.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    let mut body = Vec::new();
    if head.contains("transfer-encoding: chunked") {
        loop {
            let mut size = String::new();
            from.read_line(&mut size).ok()?;
            let size = usize::from_str_radix(size.trim(), 16).ok()?;
            let mut chunk = vec![0; size + 2];
            from.read_exact(&mut chunk).ok()?;
            body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                return Some((head, body));
            }
        }
    }
    body.resize(length("content-length:").unwrap_or(0), 0);
    from.read_exact(&mut body).ok()?;
    Some((head, body))
}

/// A client that keeps its connection until a response says otherwise.
struct Client {
    address: SocketAddr,
    connection: Option<BufReader<TcpStream>>,
}

impl Client {
    fn new(address: SocketAddr) -> Self {
        Client { address, connection: None }
    }

    /// Sends a chat and reads the response. No failure is retried.
    fn chat(&mut self, body: &str) -> Result<String, String> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => BufReader::new(TcpStream::connect(self.address).map_err(|e| format!("connect: {e}"))?),
        };
        connection.get_ref().set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let text = format!("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        connection.get_mut().write_all(text.as_bytes()).map_err(|e| format!("write: {e}"))?;
        let (head, body) = read_message(&mut connection).ok_or("the connection ended before the response")?;
        if !head.starts_with("HTTP/1.1 200 ") {
            return Err(head);
        }
        if !head.contains("connection: close") {
            self.connection = Some(connection);
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}

#[test]
fn upgrades_under_load_fail_no_request_and_no_stream() {
    const UPGRADES: usize = 5;
    let program = Program::new();
    let text = config(streaming_provider(), "").replace("workers = 1", "workers = 2");
    let file = File::new(&format!("upgrade-{:x}", fastrand::u64(..)), &text);
    let mut zap = Running::start(&mut program.command(&file));
    let mut newest = newest(&zap);
    let first = newest.id();
    let (stop, served, streams) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let address = zap.address;
    std::thread::scope(|scope| {
        let mut clients = Vec::new();
        for number in 0..6 {
            let (stop, served, streams) = (&stop, &served, &streams);
            clients.push(scope.spawn(move || {
                let mut client = Client::new(address);
                while !stop.load(Ordering::SeqCst) {
                    match number {
                        // Streams of 2 s.
                        0 | 1 => {
                            let text = client.chat("{\"stream\":true,\"messages\":[]}")?;
                            if text.matches("content").count() != 100 || !text.ends_with("[DONE]\n\n") {
                                return Err(format!("a stream is not whole: {text}"));
                            }
                            streams.fetch_add(1, Ordering::SeqCst);
                            continue;
                        }
                        // A new connection for each request.
                        2 | 3 => client = Client::new(address),
                        _ => {}
                    }
                    client.chat(CHAT)?;
                    served.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok::<_, String>(())
            }));
        }
        let upgrades = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..UPGRADES {
                let (requests, before) =
                    (served.load(Ordering::SeqCst) + 100, streams.load(Ordering::SeqCst) + 1);
                wait("requests and streams are served", || {
                    served.load(Ordering::SeqCst) > requests && streams.load(Ordering::SeqCst) > before
                });
                newest.upgrade(&zap);
            }
        }));
        stop.store(true, Ordering::SeqCst);
        for client in clients {
            assert_eq!(client.join().unwrap(), Ok(()));
        }
        upgrades.unwrap();
    });
    assert_ne!(newest.id(), first);
    assert_eq!(zap.exit_code(), Some(0), "no request was cut");
    assert!(newest.signal("TERM"));
    wait("the last process ends", || newest.is_gone());
    // Two processes write to one pipe, so a line may be within another.
    let log = zap.log.lock().unwrap().join("\n");
    assert_eq!(log.matches("all requests finished").count(), UPGRADES + 1, "{log}");
}

#[test]
fn an_upgrade_that_fails_changes_nothing_and_the_log_says_why() {
    let program = Program::new();
    let text = config(provider(OK, Duration::ZERO), "");
    let file = File::new(&format!("upgrade-{:x}", fastrand::u64(..)), &text);
    let mut zap = Running::start(&mut program.command(&file));
    let chat = || assert!(ask(zap.address, "POST /chat HTTP/1.1", CHAT).ends_with("ok"));
    chat();
    zap.signal("USR1");
    std::fs::write(&file.0, text.replace("weight", "wieght")).unwrap();
    zap.signal("USR2");
    zap.line(
        "the upgrade failed; this process keeps serving: it exited with code 2; see its message in the log",
    );
    zap.line("did you mean `weight`");
    chat();
    std::fs::write(&file.0, &text).unwrap();
    let script = program.0.with_extension("next");
    std::fs::write(&script, "#!/bin/sh\nexit 7\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    program.replace(&script);
    zap.signal("USR2");
    zap.line("it exited with code 7");
    chat();
    std::fs::remove_file(&program.0).unwrap();
    zap.signal("USR2");
    zap.line("cannot be started: ");
    chat();
    // A stop ends a process that is not ready yet.
    std::fs::write(&script, "#!/bin/sh\nexec sleep 60\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    program.replace(&script);
    let started = || zap.log.lock().unwrap().iter().filter(|line| line.contains("started process ")).count();
    let before = started();
    zap.signal("USR2");
    wait("it is started", || started() > before);
    zap.signal("USR2");
    zap.line("an upgrade is already running");
    chat();
    zap.signal("TERM");
    assert_eq!(zap.exit_code(), Some(0));
}

#[test]
fn the_old_process_is_ready_until_its_last_connection_closes() {
    let program = Program::new();
    let file =
        File::new(&format!("upgrade-{:x}", fastrand::u64(..)), &config(provider(OK, Duration::ZERO), ""));
    let mut zap = Running::start(&mut program.command(&file));
    let mut newest = newest(&zap);
    let mut idle = TcpStream::connect(zap.address).unwrap();
    let ready = "GET /ready HTTP/1.1\r\nhost: a\r\n\r\n";
    idle.write_all(ready.as_bytes()).unwrap();
    let mut responses = BufReader::new(idle.try_clone().unwrap());
    assert!(read_message(&mut responses).unwrap().0.starts_with("HTTP/1.1 200 "));
    newest.upgrade(&zap);
    idle.write_all(ready.as_bytes()).unwrap();
    let (head, _) = read_message(&mut responses).unwrap();
    assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("connection: close"), "{head}");
    let mut rest = Vec::new();
    responses.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    assert_eq!(zap.exit_code(), Some(0));
    assert!(ask(zap.address, "GET /ready HTTP/1.1", "").starts_with("HTTP/1.1 200 "), "the new one serves");
}
