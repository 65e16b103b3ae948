//! Faults that need a real process: open files, memory, signals and stderr.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::{CHAT, File, KillOnDrop, OK, Running, ask, config, provider, zap};

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The value of a series in `/metrics`.
fn metric(address: SocketAddr, series: &str) -> f64 {
    let text = ask(address, "GET /metrics HTTP/1.1", "");
    let line = text.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series}")).parse().unwrap()
}

fn assert_idle(address: SocketAddr) {
    wait_until("the gauges are idle", || {
        let active = "zap_upstream_connections{backend=\"a\",state=\"active\"}";
        [active, "zap_in_flight{backend=\"a\"}", "zap_queue_depth"].iter().all(|s| metric(address, s) == 0.0)
    });
}

impl Running {
    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.0.id())).unwrap()
    }

    /// Anonymous memory in KiB.
    fn rss_anon(&self) -> u64 {
        let status = self.proc("status");
        let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// CPU time so far, in ticks of 10 ms.
    fn ticks(&self) -> u64 {
        let stat = self.proc("stat");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

/// A provider that sends an endless stream, with a pause of `pace` between chunks, and `OK` to other requests. Returns
/// its address and the number of open streams.
fn endless_provider(pace: Duration) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let open = Arc::<AtomicUsize>::default();
    let count = open.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, open) = (stream.unwrap(), count.clone());
            std::thread::spawn(move || {
                let mut buf = [0; 8192];
                let n = stream.read(&mut buf).unwrap_or(0);
                if !buf[..n].windows(6).any(|w| w == b"stream") {
                    let _ = stream.write_all(OK.as_bytes());
                    return;
                }
                open.fetch_add(1, Ordering::SeqCst);
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
                let mut going = stream.write_all(head.as_bytes()).is_ok();
                let chunk = format!("{:x}\r\ndata: {}\n\n\r\n", 8000 + 8, "x".repeat(8000));
                while going {
                    going = stream.write_all(chunk.as_bytes()).is_ok();
                    std::thread::sleep(pace);
                }
                open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    (address, open)
}

const STREAM: &str = "{\"stream\":true,\"messages\":[]}";

fn start_stream(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let head = format!("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{STREAM}", STREAM.len());
    stream.write_all(head.as_bytes()).unwrap();
    stream
}

#[test]
fn o05_with_64_files_no_thread_spins_and_streams_continue() {
    let (backend, open) = endless_provider(Duration::from_millis(20));
    let file = File::new("files", &config(backend, "[health]\ninterval_secs = 1"));
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "ulimit -n 64; exec \"$0\" --config \"$1\"", env!("CARGO_BIN_EXE_zap"), file.path()]);
    let zap = Running::start(command.stdin(Stdio::null()));
    let mut running = start_stream(zap.address);
    wait_until("the stream has started", || open.load(Ordering::SeqCst) == 1);
    let crowd: Vec<_> = (0..200).map(|_| TcpStream::connect(zap.address).unwrap()).collect();
    let (ticks, since) = (zap.ticks(), Instant::now());
    let mut buf = [0; 65536];
    while since.elapsed() < Duration::from_secs(3) {
        assert!(running.read(&mut buf).unwrap() > 0, "the stream continues");
    }
    let used = zap.ticks() - ticks;
    assert!(used <= 15 + 15, "{used} ticks in 3 s, including the work of the stream");
    drop(crowd);
    let since = Instant::now();
    assert!(ask(zap.address, "POST /chat HTTP/1.1", CHAT).ends_with("ok"));
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    assert!(running.read(&mut buf).unwrap() > 0, "the stream still continues");
    drop(running);
    wait_until("the upstream stream is closed", || open.load(Ordering::SeqCst) == 0);
    assert_idle(zap.address);
    let log = zap.log.lock().unwrap().join("\n");
    assert!(!log.contains("backend_down"), "a lack of files must not eject a backend: {log}");
    assert!(log.lines().filter(|l| l.contains(" accept: ")).count() <= 2, "{log}");
}

/// A provider that keeps connections open. Returns its address and the number of open connections.
fn keep_alive_provider() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let open = Arc::<AtomicUsize>::default();
    let count = open.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, open) = (stream.unwrap(), count.clone());
            std::thread::spawn(move || {
                open.fetch_add(1, Ordering::SeqCst);
                let mut buf = [0; 8192];
                while stream.read(&mut buf).is_ok_and(|n| n > 0) && stream.write_all(OK.as_bytes()).is_ok() {}
                open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    (address, open)
}

/// Starts Zap with at most `files` open files and the backends a and b. Each serves the model of its name.
fn with_files(files: u32, a: SocketAddr, b: SocketAddr) -> Running {
    let b = format!("[[backends]]\nname = \"b\"\nurl = \"http://{b}\"\nweight = 1\nmodels = [\"b\"]\n");
    let text = format!("{}models = [\"a\"]\n{b}", config(a, "[health]\ninterval_secs = 3600"));
    let file = File::new(&format!("files-{files}"), &text);
    let mut command = std::process::Command::new("sh");
    let run = format!("ulimit -n {files}; exec \"$0\" --config \"$1\"");
    command.args(["-c", &run, env!("CARGO_BIN_EXE_zap"), file.path()]);
    Running::start(command.stdin(Stdio::null()))
}

/// Sends a chat for this model on a keep-alive connection. Returns the status.
fn chat_for(stream: &mut TcpStream, model: &str) -> String {
    let body = format!("{{\"model\":\"{model}\",\"messages\":[]}}");
    let head = format!("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    let (mut response, mut buf) = (Vec::new(), [0; 4096]);
    while !response.ends_with(b"\r\n\r\nok") && !response.ends_with(b"}") {
        let n = stream.read(&mut buf).unwrap();
        assert!(n > 0);
        response.extend_from_slice(&buf[..n]);
    }
    String::from_utf8_lossy(&response[9..12]).into_owned()
}

#[test]
fn o05_idle_connections_are_closed_for_another_backend_and_for_clients() {
    let ((a, open_a), (b, open_b)) = (keep_alive_provider(), keep_alive_provider());
    let zap = with_files(128, a, b);
    let mut clients: Vec<_> = (0..30).map(|_| TcpStream::connect(zap.address).unwrap()).collect();
    for (model, open) in [("a", &open_a), ("b", &open_b)] {
        // All requests are parallel, so that each has its own connection.
        std::thread::scope(|s| {
            let ask = |client| s.spawn(move || assert_eq!(chat_for(client, model), "200", "{model}"));
            clients.iter_mut().map(ask).collect::<Vec<_>>().into_iter().for_each(|t| t.join().unwrap());
        });
        assert!(open.load(Ordering::SeqCst) > 0);
    }
    let since = Instant::now();
    assert!(ask(zap.address, "GET /health HTTP/1.1", "").starts_with("HTTP/1.1 200 "));
    assert!(since.elapsed() < Duration::from_millis(500), "{:?}", since.elapsed());
    let open = || open_a.load(Ordering::SeqCst) + open_b.load(Ordering::SeqCst);
    wait_until("both pools use at most half of the files", || open() <= 46);
}

#[test]
fn o05_with_no_free_file_idle_connections_are_closed_and_the_client_is_served() {
    let ((a, open), (b, _)) = (keep_alive_provider(), keep_alive_provider());
    let zap = with_files(256, a, b);
    let mut clients: Vec<_> = (0..40).map(|_| TcpStream::connect(zap.address).unwrap()).collect();
    for _ in 0..20 {
        std::thread::scope(|s| {
            for client in &mut clients {
                s.spawn(|| assert_eq!(chat_for(client, "a"), "200"));
            }
        });
        if open.load(Ordering::SeqCst) >= 10 {
            break;
        }
    }
    let idle = open.load(Ordering::SeqCst);
    assert!(idle >= 10, "{idle} connections for 40 parallel requests");
    // Limit the number of files to those open now.
    let pid = zap.child.0.id();
    let used = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let used: Vec<u64> = used.map(|f| f.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    let files = (0..).find(|n| !used.contains(n)).unwrap();
    let pid = rustix::process::Pid::from_raw(pid as i32);
    let limit = rustix::process::Rlimit { current: Some(files), maximum: Some(files) };
    rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit).unwrap();
    let since = Instant::now();
    assert!(ask(zap.address, "GET /health HTTP/1.1", "").starts_with("HTTP/1.1 200 "));
    assert!(since.elapsed() < Duration::from_millis(500), "{:?}", since.elapsed());
    assert!(open.load(Ordering::SeqCst) < idle);
    assert!(zap.line(" accept").contains("cannot accept connections"));
}

#[test]
fn o12_a_large_fleet_that_goes_down_does_not_delay_clients() {
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let backend = |i: u32| {
        format!("[[backends]]\nname = \"b{i}\"\nurl = \"http://{dead}\"\nweight = {}\n", 1 + i * 7 % 100)
    };
    let settings = "[server]\nhost = \"127.0.0.1\"\nport = 0\nworkers = 1\n[health]\nfailure_threshold = 1\n";
    let all: Vec<_> = (0..1000).map(backend).collect();
    let zap = Running::with(&format!("{settings}{}", all.concat()));
    // A machine that is busy delays a small fleet too.
    let small = Running::with(&config(provider(OK, Duration::ZERO), ""));
    let (start, mut slowest) = (Instant::now(), [Duration::ZERO; 2]);
    while start.elapsed() < Duration::from_secs(4) {
        for (zap, slowest) in [&zap, &small].into_iter().zip(&mut slowest) {
            let since = Instant::now();
            assert!(ask(zap.address, "GET /health HTTP/1.1", "").starts_with("HTTP/1.1 200 "));
            *slowest = since.elapsed().max(*slowest);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    zap.line("backend_down");
    let [large, small] = slowest;
    assert!(large < small + Duration::from_millis(500), "{large:?}, with one backend {small:?}");
}

#[test]
fn u10_an_endless_stream_takes_no_memory_and_ends_with_its_client() {
    let (backend, open) = endless_provider(Duration::ZERO);
    let zap = Running::with(&config(backend, ""));
    let mut client = start_stream(zap.address);
    let mut buf = vec![0; 1 << 20];
    let mut read = |limit: usize| {
        let mut sum = 0;
        while sum < limit {
            let n = client.read(&mut buf).unwrap();
            assert!(n > 0);
            sum += n;
        }
    };
    read(64 << 20);
    let before = zap.rss_anon();
    read(512 << 20);
    let after = zap.rss_anon();
    assert!(after <= before + 1024, "{before} KiB before, {after} KiB after");
    drop(client);
    let since = Instant::now();
    wait_until("the upstream stream is closed", || open.load(Ordering::SeqCst) == 0);
    assert!(since.elapsed() < Duration::from_millis(250), "{:?}", since.elapsed());
    assert_idle(zap.address);
}

#[test]
fn c08_readers_that_stop_cost_little_memory() {
    const READERS: u64 = 40;
    let (backend, open) = endless_provider(Duration::ZERO);
    let zap = Running::with(&config(backend, ""));
    drop(start_stream(zap.address));
    assert_idle(zap.address);
    let before = zap.rss_anon();
    let readers: Vec<_> = (0..READERS).map(|_| start_stream(zap.address)).collect();
    wait_until("all streams have started", || open.load(Ordering::SeqCst) == READERS as usize);
    // Wait until the socket buffers are full and the process is idle.
    let (mut last, mut since) = (zap.ticks(), Instant::now());
    while since.elapsed() < Duration::from_millis(300) {
        std::thread::sleep(Duration::from_millis(20));
        if zap.ticks() > last + 1 {
            (last, since) = (zap.ticks(), Instant::now());
        }
    }
    let each = (zap.rss_anon() - before) / READERS;
    // What Zap may hold, and one unfinished event of the provider.
    assert!(each <= 64 + 8, "{each} KiB per reader");
    drop(readers);
    assert_idle(zap.address);
}

#[test]
fn c09_a_body_without_an_end_takes_no_more_memory_than_the_limit() {
    let backend = provider(OK, Duration::ZERO);
    let zap = Running::with(&config(backend, "max_body_bytes = 1048576"));
    assert!(ask(zap.address, "POST /chat HTTP/1.1", CHAT).ends_with("ok"));
    let before = zap.rss_anon();
    for size in [1usize, 65536] {
        let mut stream = TcpStream::connect(zap.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(b"POST /chat HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
        let chunk = format!("{size:x}\r\n{}\r\n", " ".repeat(size)).repeat((65536 / size).max(1));
        let mut max_rss = 0;
        // The write fails once the request is refused.
        for _ in 0..40 {
            if stream.write_all(chunk.as_bytes()).is_err() {
                break;
            }
            max_rss = max_rss.max(zap.rss_anon());
        }
        assert!(max_rss < before + 4096, "{before} KiB before, {max_rss} KiB at most, with chunks of {size}");
        let mut response = String::new();
        let _ = stream.read_to_string(&mut response);
        assert!(response.starts_with("HTTP/1.1 413 "), "{response}");
    }
    assert_idle(zap.address);
}

#[test]
fn c19_noise_does_not_fill_the_log() {
    let zap = Running::with(&config(provider(OK, Duration::ZERO), ""));
    let since = Instant::now();
    for i in 0..300u32 {
        let mut stream = TcpStream::connect(zap.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let noise =
            [&b"\x16\x03\x01\x02\x00\x01\x00\n\n"[..], b"\x00\xff\xfe\n\x1b]0;x\x07\n", b"SSH-2.0-x\r\n\r\n"];
        stream.write_all(noise[i as usize % 3]).unwrap();
        let mut response = Vec::new();
        let _ = stream.read_to_end(&mut response);
        assert!(response.starts_with(b"HTTP/1.1 400 "), "{}", String::from_utf8_lossy(&response));
    }
    let seconds = since.elapsed().as_secs() as usize + 1;
    assert!(ask(zap.address, "POST /chat HTTP/1.1\r\nx-request-id: last", CHAT).ends_with("ok"));
    zap.line("\"last\"");
    let log = zap.log.lock().unwrap();
    let lines = log.iter().filter(|l| l.contains("\"status\":400")).count();
    assert!((1..=10 * (seconds + 1)).contains(&lines), "{lines} lines in {seconds} s");
    assert!(log.iter().all(|l| l.chars().all(|c| !c.is_control())));
    drop(log);
    let lost = metric(zap.address, "zap_log_lines_dropped_total");
    assert_eq!(lost as usize + lines, 300, "each request has a line or is counted as dropped");
    assert_idle(zap.address);
}

#[test]
fn o10_a_stopped_process_does_not_blame_backends() {
    let (backend, open) = endless_provider(Duration::from_millis(20));
    let zap = Running::with(&config(
        backend,
        "[health]\ninterval_secs = 1\ntimeout_secs = 1\n[timeouts]\nstream_idle_secs = 2",
    ));
    let mut stream = start_stream(zap.address);
    let mut buf = [0; 65536];
    assert!(stream.read(&mut buf).unwrap() > 0);
    zap.signal("STOP");
    std::thread::sleep(Duration::from_secs(4));
    zap.signal("CONT");
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(3) {
        assert!(stream.read(&mut buf).unwrap() > 0, "the stream continues");
    }
    assert!(ask(zap.address, "POST /chat HTTP/1.1", CHAT).ends_with("ok"));
    assert_eq!(metric(zap.address, "zap_backend_up{backend=\"a\"}"), 1.0);
    assert!(!zap.log.lock().unwrap().join("\n").contains("backend_down"));
    drop(stream);
    wait_until("the stream is closed", || open.load(Ordering::SeqCst) == 0);
    assert_idle(zap.address);
}

#[test]
fn o11_a_closed_or_unread_stderr_does_not_stop_requests() {
    let backend = provider(OK, Duration::ZERO);
    let port = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for kind in ["closed", "reader gone", "not read"] {
        let port = port();
        let text = config(backend, "").replace("port = 0", &format!("port = {port}"));
        let file = File::new(&format!("stderr-{port}"), &text);
        let mut command = zap();
        command.args(["--config", file.path()]);
        let mut held: Option<OwnedFd> = None;
        let child = match kind {
            "closed" => {
                let mut sh = std::process::Command::new("sh");
                let run = "exec \"$0\" --config \"$1\" 2>&-";
                sh.args(["-c", run, env!("CARGO_BIN_EXE_zap"), file.path()]);
                sh.stdin(Stdio::null()).spawn()
            }
            _ => {
                let (reader, writer) = std::io::pipe().unwrap();
                if kind == "not read" {
                    held = Some(reader.into());
                }
                command.stderr(writer).spawn()
            }
        };
        let _child = KillOnDrop(child.unwrap());
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        wait_until("Zap listens", || TcpStream::connect(address).is_ok());
        // Write more lines than fit into a pipe.
        let id = "x".repeat(120);
        for _ in 0..if kind == "not read" { 400 } else { 5 } {
            let head = format!("POST /chat HTTP/1.1\r\nx-request-id: {id}");
            assert!(ask(address, &head, CHAT).ends_with("ok"), "{kind}");
        }
        assert_idle(address);
        drop(held);
    }
}

#[test]
fn s01_no_failure_writes_a_backends_key_to_the_log() {
    const CUT: &str = "HTTP/1.1 200 sk-CANARY\r\ncontent-type: text/event-stream\r\ncontent-length: 99\r\n\r\ndata: sk-CANARY\n\n";
    let quick = "[health]\nfailure_threshold = 1\n[retry]\nmax_retries = 0";
    for (response, event, end, status) in [
        (
            "HTTP/1.1 500 sk-CANARY\r\nx: sk-CANARY\r\ncontent-length: 9\r\n\r\nsk-CANARY",
            "backend_down",
            "complete",
            500,
        ),
        (
            "HTTP/1.1 401 sk-CANARY\r\ncontent-length: 9\r\n\r\nsk-CANARY",
            "backend_misconfigured",
            "upstream_error",
            502,
        ),
        ("HTTP/9 sk-CANARY\r\n\r\nsk-CANARY", "backend_down", "upstream_error", 502),
        ("", "backend_down", "upstream_error", 502),
        ("HTTP/1.1 302 Found\r\nlocation: http://sk-CANARY/\r\n\r\n", "start", "upstream_error", 502),
        (CUT, "backend_down", "upstream_error", 200),
    ] {
        let zap = Running::with(&config(provider(response, Duration::ZERO), quick));
        let sent = ask(zap.address, "POST /chat HTTP/1.1\r\nx-request-id: line-1", CHAT);
        let line: serde_json::Value = serde_json::from_str(&zap.line("line-1")).unwrap();
        assert_eq!((&line["status"], &line["end"]), (&status.into(), &end.into()), "{line} {sent}");
        if event != "start" {
            assert!(zap.line(event).contains(": backend a "), "the event names the backend");
        }
        let metrics = ask(zap.address, "GET /metrics HTTP/1.1", "");
        let state = ask(zap.address, "GET /status HTTP/1.1", "");
        let all = [zap.log.lock().unwrap().join("\n"), metrics, state].concat();
        assert!(!all.contains("CANARY"), "{all}");
    }
}

#[test]
fn a_line_tells_that_a_backend_was_full_or_that_the_client_disconnected() {
    let slow = provider(OK, Duration::from_secs(2));
    let more = "[[backends]]\nname = \"b\"\nurl = \"http://HERE\"\nweight = 1\npriority = 7\n";
    let more = more.replace("HERE", &provider(OK, Duration::ZERO).to_string());
    let zap = Running::with(&format!("{}max_in_flight = 1\n{more}", config(slow, "")));
    let mut held = TcpStream::connect(zap.address).unwrap();
    let head = "POST /chat HTTP/1.1\r\nhost: a\r\nx-request-id: line-0\r\ncontent-length";
    held.write_all(format!("{head}: {}\r\n\r\n{CHAT}", CHAT.len()).as_bytes()).unwrap();
    wait_until("a is busy", || metric(zap.address, "zap_in_flight{backend=\"a\"}") == 1.0);
    ask(zap.address, "POST /chat HTTP/1.1\r\nx-request-id: line-1", CHAT);
    let line: serde_json::Value = serde_json::from_str(&zap.line("line-1")).unwrap();
    assert_eq!(line["passed"], serde_json::json!([["a", "full"]]));
    drop(held);
    let line: serde_json::Value = serde_json::from_str(&zap.line("line-0")).unwrap();
    assert_eq!((&line["status"], &line["end"]), (&499.into(), &"client_gone".into()), "{line}");
}

#[test]
fn s04_control_characters_are_escaped_in_the_log() {
    let zap = Running::with(&config(provider(OK, Duration::ZERO), ""));
    for (id, head) in [
        ("line-a", "POST /chat HTTP/1.1\r\nx-request-id: line-a\r\nauthorization: Bearer a\u{9b}31mb"),
        ("line-b", "GET /%0d%0a%1b HTTP/1.1\r\nx-request-id: line-b"),
    ] {
        ask(zap.address, head, CHAT);
        let line = zap.line(id);
        assert!(line.chars().all(|c| !c.is_control()), "{line:?}");
        let _: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(zap.log.lock().unwrap().iter().filter(|l| l.contains(id)).count(), 1);
    }
    // A head with raw control characters is refused and not logged.
    let before = zap.log.lock().unwrap().len();
    for head in [
        "GET /\u{1b}[31m HTTP/1.1",
        "GET /\u{9b}31m\u{85} HTTP/1.1",
        "GET / HTTP/1.1\r\nx-request-id: a\u{1b}b",
        "GET /a\rb HTTP/1.1",
    ] {
        let response = ask(zap.address, head, "");
        assert!(response.starts_with("HTTP/1.1 400 "), "{head:?}: {response}");
    }
    ask(zap.address, "GET /v1/models HTTP/1.1\r\nx-request-id: last", "");
    zap.line("\"last\"");
    let log = zap.log.lock().unwrap();
    for line in &log[before..] {
        // An event is text here: that of the first health check.
        assert!(line.contains(" health_check: ") || serde_json::from_str::<serde_json::Value>(line).is_ok());
        assert!(line.chars().all(|c| !c.is_control()) && !line.contains("31m"), "{line:?}");
    }
}

/// Builds `machine.c`, a library for LD_PRELOAD that replaces functions of libc. Needs `cc`, which Rust uses as linker.
fn preload_library() -> PathBuf {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli/machine.c");
    let out =
        std::env::temp_dir().join(format!("zap-machine-{}-{:x}.so", std::process::id(), fastrand::u64(..)));
    let mut cc = std::process::Command::new("cc");
    assert!(cc.args(["-shared", "-fPIC", "-o"]).arg(&out).args([source, "-ldl"]).status().unwrap().success());
    out
}

#[test]
fn o10_a_wall_clock_that_jumps_an_hour_changes_nothing() {
    let (library, switch) = (preload_library(), File::new("clock", ""));
    std::fs::remove_file(&switch.0).unwrap();
    let busy = provider(
        "HTTP/1.1 429 X\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        Duration::ZERO,
    );
    let second = format!("[[backends]]\nname = \"busy\"\nurl = \"http://{busy}\"\nweight = 1\n");
    let settings = "[health]\ninterval_secs = 1\n[rate_limit]\nrequests_per_minute = 7";
    let text = config(provider(OK, Duration::ZERO), settings) + &second;
    let file = File::new("clock-config", &text);
    let mut command = zap();
    command
        .args(["--config", file.path()])
        .env("LD_PRELOAD", &library)
        .env("TEST_CLOCK_AN_HOUR_OFF", &switch.0);
    let zap = Running::start(&mut command);
    let hour = |line: &str| line.split("T").nth(1).unwrap()[..2].parse::<u32>().unwrap();
    let chat = |id: &str| ask(zap.address, &format!("POST /chat HTTP/1.1\r\nx-request-id: {id}"), CHAT);
    (0..4).for_each(|_| assert!(chat("id-before").ends_with("ok")));
    let before = hour(&zap.line("id-before"));
    std::fs::write(&switch.0, "").unwrap();
    assert!(chat("id-after").ends_with("ok"));
    assert_eq!((before + 1) % 24, hour(&zap.line("id-after")), "log timestamps follow the wall clock");
    (0..2).for_each(|_| assert!(chat("id-more").ends_with("ok")));
    assert!(chat("id-over").starts_with("HTTP/1.1 429 "), "the rate-limit window is still the same");
    std::fs::remove_file(&switch.0).unwrap();
    assert!(chat("id-over").starts_with("HTTP/1.1 429 "));
    // Health checks continue as scheduled, and all backends are up.
    let probed = metric(zap.address, "zap_backend_up{backend=\"a\"}")
        + metric(zap.address, "zap_backend_up{backend=\"busy\"}");
    assert_eq!(probed, 2.0);
    assert!(!zap.log.lock().unwrap().join("\n").contains("backend_down"));
    assert_idle(zap.address);
    let _ = std::fs::remove_file(library);
}

#[test]
fn u21_new_connections_follow_a_changed_dns_record() {
    let (library, switch) = (preload_library(), File::new("name", ""));
    std::fs::remove_file(&switch.0).unwrap();
    // Two providers at two addresses with the same port. Each closes the connection after a response.
    let serve = |listener: TcpListener, name: &'static str| {
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let mut buf = [0; 8192];
                let _ = stream.read(&mut buf);
                let _ =
                    write!(stream, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 3\r\n\r\n{name}");
            }
        });
    };
    let first = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = first.local_addr().unwrap().port();
    serve(first, "one");
    serve(TcpListener::bind(("127.0.0.2", port)).unwrap(), "two");
    let text = config(([127, 0, 0, 1], port).into(), "").replace("127.0.0.1:", "moving.test:");
    let file = File::new("name-config", &text.replace("host = \"moving", "host = \"127.0.0.1"));
    let mut command = zap();
    command.args(["--config", file.path()]).env("LD_PRELOAD", &library).env("TEST_NAME_HAS_MOVED", &switch.0);
    let zap = Running::start(&mut command);
    let chat = || ask(zap.address, "POST /chat HTTP/1.1", CHAT);
    (0..3).for_each(|_| assert!(chat().ends_with("one")));
    std::fs::write(&switch.0, "").unwrap();
    (0..3).for_each(|_| assert!(chat().ends_with("two")));
    assert_idle(zap.address);
    let _ = std::fs::remove_file(library);
}
