//! Tests of the program from the operator's side: arguments, messages, exit codes, signals and log lines.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // Tests fail by panicking.

mod causes;
mod chaos;
mod faults;
mod healthcheck;
mod live;
mod log;
mod manual;
mod mistakes;
mod openssl;
mod print;
mod shells;
mod supervised;

#[path = "../gateway/support/tls_server.rs"]
mod tls_server;
mod unix_socket;
mod upgrade;
mod watch;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn zap() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_zap"));
    command.stdin(Stdio::null()).current_dir(std::env::temp_dir());
    for key in ["GROQ_API_KEY", "CEREBRAS_API_KEY", "OPENAI_API_KEY", "ZAP_CONFIG"] {
        command.env_remove(key);
    }
    command
}

fn run(args: &[&str]) -> Output {
    zap().args(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A temporary file that is deleted on drop.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("zap-cli-{}-{name}.toml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        File(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// An event as the text format has it, since a test compares the message; another line as it is.
fn readable(line: String) -> String {
    let json = serde_json::from_str::<serde_json::Value>(&line).ok();
    let event = json.filter(|json| json["event"] != "request");
    let text = event.and_then(|json| {
        let of = |key: &str| json[key].as_str().map(str::to_owned);
        Some(format!("{} {} {}: {}", of("time")?, of("level")?, of("event")?, of("message")?))
    });
    text.unwrap_or(line)
}

/// A running Zap and the lines that it writes to stderr, events as [`readable`] text.
struct Running {
    child: KillOnDrop,
    address: SocketAddr,
    log: std::sync::Arc<std::sync::Mutex<Vec<String>>>,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = KillOnDrop(command.stderr(Stdio::piped()).spawn().unwrap());
        let mut lines = BufReader::new(child.0.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("Zap exited before it listened").unwrap();
            if let Some((_, address)) = line.split_once("listening on ") {
                break address.split(['"', ' ']).next().unwrap().parse().unwrap();
            }
        };
        let log = std::sync::Arc::<std::sync::Mutex<Vec<String>>>::default();
        let shared = log.clone();
        let lines = lines.map_while(Result::ok).map(readable);
        std::thread::spawn(move || lines.for_each(|line| shared.lock().unwrap().push(line)));
        Running { child, address, log }
    }

    fn with(config: &str) -> Self {
        let file = File::new(&format!("run-{:x}", fastrand::u64(..)), config);
        let mut command = zap();
        command.args(["--config", file.path()]);
        Running::start(&mut command)
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.0.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    fn exit_code(&mut self) -> Option<i32> {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if let Some(status) = self.child.0.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("Zap does not exit");
    }

    /// Waits for the first log line that contains `part`.
    fn line(&self, part: &str) -> String {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if let Some(line) = self.log.lock().unwrap().iter().find(|l| l.contains(part)) {
                return line.clone();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("no line contains {part}: {:#?}", self.log.lock().unwrap());
    }
}

/// A child process that is killed on drop, so that it ends even if the test fails.
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a request with `connection: close` and reads the whole response.
fn ask(address: SocketAddr, head: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let rest =
        format!("host: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(format!("{head}\r\n{rest}").as_bytes()).unwrap();
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

/// A provider that sends these bytes as the response to each chat after `wait`, and status 200 to health checks.
fn provider(response: &'static str, wait: Duration) -> SocketAddr {
    respond(move |is_check| {
        if is_check {
            return "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        }
        std::thread::sleep(wait);
        response
    })
}

/// A provider that sends `response(is_check)` to each health check or chat.
fn respond(response: impl Fn(bool) -> &'static str + Send + Sync + 'static) -> SocketAddr {
    let (listener, response) = (TcpListener::bind("127.0.0.1:0").unwrap(), std::sync::Arc::new(response));
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let response = response.clone();
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut buf = [0; 8192];
                let n = stream.read(&mut buf).unwrap();
                let _ = stream.write_all(response(buf[..n].starts_with(b"GET")).as_bytes());
            });
        }
    });
    address
}

fn config(backend: SocketAddr, more: &str) -> String {
    format!(
        "[server]\nhost = \"127.0.0.1\"\nport = 0\nworkers = 1\n{more}\n[[backends]]\nname = \"a\"\nurl = \"http://{backend}\"\nweight = 1\napi_key = \"sk-CANARY\"\n"
    )
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const CHAT: &str = "{\"messages\":[]}";

#[test]
fn help_prints_the_usage_and_bad_usage_exits_with_2() {
    let help = run(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    let usage = String::from_utf8(help.stdout).unwrap();
    assert!(usage.contains("zap demo [--port N]") && usage.contains("zap demo --chaos [--port N]"));
    let version = run(&["--version"]);
    let version = String::from_utf8(version.stdout).unwrap();
    let number = version.strip_prefix("zap ").unwrap().strip_prefix(env!("CARGO_PKG_VERSION")).unwrap();
    assert!(number == "\n" || number.starts_with(" (") && number.ends_with(")\n"), "{version}");
    let wrong = run(&["serve"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("unknown argument serve"));
}

#[test]
fn a_missing_configuration_is_reported_with_both_ways_to_start() {
    let missing = run(&["--config", "/nowhere/config.toml"]);
    assert_eq!(missing.status.code(), Some(2));
    for way in ["cp config.example.toml config.toml", "zap demo"] {
        assert!(stderr(&missing).contains(way), "{}", stderr(&missing));
    }
}

#[test]
fn a_ledger_that_cannot_be_opened_ends_the_start_with_2() {
    let notes = File::new("notes", "These are no rows.\n");
    let gone = "/nowhere/zap.db";
    for (path, cause) in [(gone, "nowhere"), (notes.path(), "it is not an SQLite file")] {
        let text = config(provider(OK, Duration::ZERO), &format!("[ledger]\npath = \"{path}\""));
        let file = File::new(&format!("ledger-{:x}", fastrand::u64(..)), &text);
        let output = run(&["--config", file.path()]);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(&format!("cannot use the ledger {path}: ")) && text.contains(cause), "{text}");
        assert!(!text.contains("listening on"), "{text}");
    }
    assert_eq!(std::fs::read_to_string(&notes.0).unwrap(), "These are no rows.\n");
}

#[test]
fn all_faults_of_a_configuration_are_reported_without_keys() {
    let text = "[server]\nport = 70000\nworker = 1\n[queue]\nmax_sise = 1\n[[backends]]\nurl = \"ftp://x\"\napi_key = \"sk-CANARY one\"\n";
    let file = File::new("faults", text);
    let since = Instant::now();
    for args in [&["--config", file.path()][..], &["check", "--config", file.path()]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2));
        let text = stderr(&output);
        for (line, part) in
            [(2, "70000"), (3, "workers"), (5, "max_size"), (6, "weight"), (7, "url"), (8, "api_key")]
        {
            let place = format!("{}:{line}:", file.path());
            assert!(text.lines().any(|l| l.starts_with(&place) && l.contains(part)), "{line} {part}: {text}");
        }
        assert!(!text.contains("sk-CANARY"));
    }
    assert!(since.elapsed() < Duration::from_secs(2));
}

#[test]
fn check_accepts_the_example_and_the_original_configuration() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/config.example.toml");
    let keys = ["GROQ_API_KEY", "CEREBRAS_API_KEY", "OPENAI_API_KEY"];
    let output =
        zap().args(["check", "--config", example]).envs(keys.map(|k| (k, "sk-CANARY"))).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let unset = run(&["check", "--config", example]);
    assert_eq!(unset.status.code(), Some(2));
    assert!(stderr(&unset).contains("GROQ_API_KEY"));

    let seed = "[server]\nhost = \"0.0.0.0\"\nport = 8000\n\n[queue]\nmax_size = 1000\ntimeout_secs = 300\n\n\
        [[backends]]\nname = \"one\"\nurl = \"http://127.0.0.1:9301\"\nweight = 2\nhealth_path = \"/health\"\napi_key = \"k1\"\ndefault_model = \"m\"\n\n\
        [[backends]]\nurl = \"http://127.0.0.1:9302/\"\nweight = 1\nchat_path = \"/v1/chat/completions\"\n\n\
        [rate_limit]\nrequests_per_minute = 60\n";
    let file = File::new("seed", seed);
    let output = run(&["check", "--config", file.path()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn check_warns_of_a_world_readable_file_with_keys() {
    use std::os::unix::fs::PermissionsExt;
    let file = File::new("open", &config("127.0.0.1:1".parse().unwrap(), ""));
    for (mode, warned) in [(0o644, true), (0o600, false)] {
        std::fs::set_permissions(&file.0, std::fs::Permissions::from_mode(mode)).unwrap();
        let output = run(&["check", "--config", file.path()]);
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(stderr(&output).contains("every user may read"), warned, "{mode:o}: {}", stderr(&output));
        assert!(!stderr(&output).contains("CANARY"));
    }
}

#[test]
fn check_warns_of_https_without_any_root_certificate() {
    for (url, more, warned) in [
        ("https://localhost:1", "", true),
        ("http://localhost:1", "", false),
        ("https://localhost:1", "ca_file = \"/dev/null\"\n", false),
    ] {
        let text = format!("[[backends]]\nurl = \"{url}\"\nweight = 1\n{more}");
        let file = File::new("roots", &text);
        let mut command = zap();
        command.args(["check", "--config", file.path()]);
        command.env("SSL_CERT_FILE", "/dev/null").env("SSL_CERT_DIR", "/dev/null");
        let output = command.output().unwrap();
        let has_warned = stderr(&output).contains("warning: the system has no root certificates");
        assert_eq!(has_warned, warned, "{url} {more}: {}", stderr(&output));
    }
}

#[test]
fn a_port_in_use_exits_with_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let file = File::new(
        "port",
        &config(taken.local_addr().unwrap(), "").replace("port = 0", &format!("port = {port}")),
    );
    let output = run(&["--config", file.path()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot listen on"));
}

#[test]
fn the_demo_balances_two_to_one_streams_and_exits_on_a_signal() {
    let mut command = zap();
    command.args(["demo", "--port", "0"]).stdout(Stdio::piped());
    let mut demo = Running::start(&mut command);
    let mut names = Vec::new();
    for _ in 0..6 {
        let response = ask(demo.address, "POST /v1/chat/completions HTTP/1.1", CHAT);
        names.push(if response.contains("provider alpha") { 'a' } else { 'b' });
    }
    assert_eq!(names.iter().collect::<String>(), "abaaba");
    let stream = ask(demo.address, "POST /chat HTTP/1.1", "{\"stream\":true,\"messages\":[]}");
    assert!(stream.contains("\"content\":\"Hello \"") && stream.contains("data: [DONE]"), "{stream}");
    demo.signal("INT");
    assert_eq!(demo.exit_code(), Some(0));
    let mut printed = String::new();
    demo.child.0.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
    assert!(
        printed.contains(&format!("curl -s http://{}/v1/chat/completions -d", demo.address)),
        "{printed}"
    );
}

#[test]
fn the_demo_answers_embeddings_and_responses_as_such() {
    let mut command = zap();
    let demo = Running::start(command.args(["demo", "--port", "0"]).stdout(Stdio::null()));
    let body = |text: &str| serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap();
    let post = |path: &str, text: &str| ask(demo.address, &format!("POST {path} HTTP/1.1"), text);
    let answer: serde_json::Value =
        body(&post("/v1/embeddings", "{\"model\":\"m\",\"input\":[\"a\",\"b\"]}"));
    assert_eq!((&answer["object"], answer["data"].as_array().unwrap().len()), (&"list".into(), 2));
    assert_eq!(answer["data"][1]["embedding"].as_array().unwrap().len(), 8);
    assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 0);
    let base64: serde_json::Value =
        body(&post("/v1/embeddings", "{\"model\":\"m\",\"input\":\"a\",\"encoding_format\":\"base64\"}"));
    assert_eq!(base64["data"][0]["embedding"].as_str().unwrap().len(), 44, "8 numbers of 4 bytes");
    let answer: serde_json::Value = body(&post("/v1/responses", "{\"model\":\"m\",\"input\":\"hi\"}"));
    assert_eq!((&answer["object"], &answer["status"]), (&"response".into(), &"completed".into()));
    assert!(answer["output"][0]["content"][0]["text"].as_str().unwrap().starts_with("Hello from"));
    let stream = post("/v1/responses", "{\"model\":\"m\",\"input\":\"hi\",\"stream\":true}");
    assert!(
        stream.contains("event: response.created\n") && stream.contains("event: response.completed\n"),
        "{stream}"
    );
    let metrics = ask(demo.address, "GET /metrics HTTP/1.1", "");
    for endpoint in ["embeddings", "responses"] {
        let sample =
            format!("zap_requests_total{{endpoint=\"{endpoint}\",backend=\"alpha\",status=\"200\"}}");
        assert!(metrics.contains(&sample), "{sample}");
    }
}

#[test]
fn the_demo_counts_tokens_and_cost() {
    let mut command = zap();
    let demo = Running::start(command.args(["demo", "--port", "0"]).stdout(Stdio::null()));
    let answer = ask(demo.address, "POST /v1/chat/completions HTTP/1.1", CHAT);
    assert!(answer.contains("\"completion_tokens\":17"), "{answer}");
    let stream = ask(demo.address, "POST /chat HTTP/1.1", "{\"stream\":true,\"messages\":[]}");
    assert!(stream.contains("data: [DONE]") && !stream.contains("usage"), "{stream}");
    let metrics = ask(demo.address, "GET /metrics HTTP/1.1", "");
    let value = |series: &str| -> f64 {
        let sample = metrics.lines().find_map(|line| line.strip_prefix(series));
        sample.unwrap_or_else(|| panic!("no {series} in {metrics}")).trim().parse().unwrap()
    };
    for backend in ["alpha", "beta"] {
        let labels = format!("backend=\"{backend}\",model=\"mock-{backend}\"");
        assert!(value(&format!("zap_tokens_total{{{labels},type=\"input\"}}")) > 0.0);
        assert_eq!(value(&format!("zap_tokens_total{{{labels},type=\"output\"}}")), 17.0);
        assert!(value(&format!("zap_cost_usd_total{{{labels}}}")) > 0.0);
        assert_eq!(value(&format!("zap_usage_missing_total{{backend=\"{backend}\"}}")), 0.0);
    }
    let asked = "{\"stream\":true,\"stream_options\":{\"include_usage\":true},\"messages\":[]}";
    let stream = ask(demo.address, "POST /chat HTTP/1.1", asked);
    assert!(stream.contains("\"usage\":null") && stream.contains("\"completion_tokens\":17"), "{stream}");
}

#[test]
fn sigterm_drains_and_a_second_one_cuts() {
    let slow = provider(OK, Duration::from_millis(600));
    let mut zap = Running::with(&config(slow, ""));
    let address = zap.address;
    let request = std::thread::spawn(move || ask(address, "POST /chat HTTP/1.1", CHAT));
    zap_is_busy(&zap);
    zap.signal("TERM");
    zap.line("drain: ");
    assert!(request.join().unwrap().ends_with("ok"));
    assert_eq!(zap.exit_code(), Some(0));

    let endless = provider(OK, Duration::from_secs(20));
    let mut zap = Running::with(&config(endless, "drain_delay_secs = 1"));
    let mut client = TcpStream::connect(zap.address).unwrap();
    client
        .write_all(
            format!("POST /chat HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{CHAT}", CHAT.len())
                .as_bytes(),
        )
        .unwrap();
    zap_is_busy(&zap);
    zap.signal("TERM");
    zap.line("drain: shutting down: requests are served for 1 s more; a second signal cuts all requests");
    zap.line("new requests are refused; requests running: 1, cut after 30 s or by a second signal");
    // Reported every 5 s.
    zap.line("requests still running: 1");
    zap.signal("TERM");
    assert_eq!(zap.exit_code(), Some(1));
}

fn zap_is_busy(zap: &Running) {
    let end = Instant::now() + Duration::from_secs(10);
    while !ask(zap.address, "GET /metrics HTTP/1.1", "").contains("zap_in_flight{backend=\"a\"} 1\n") {
        assert!(Instant::now() < end, "the request never reached the backend");
    }
}

#[test]
fn sighup_reloads_the_file_and_logs_the_result() {
    let (a, b) = (provider(OK, Duration::ZERO), provider(OK.replace("ok", "OK").leak(), Duration::ZERO));
    let file = File::new("reload", &config(a, ""));
    let mut command = zap();
    command.args(["--config", file.path()]);
    let mut zap = Running::start(&mut command);
    let chat = || ask(zap.address, "POST /chat HTTP/1.1", CHAT);
    assert!(chat().ends_with("ok"));
    let more = "drain_secs = 3\n[ledger]\npath = \"zap.db\"";
    std::fs::write(&file.0, config(b, more).replace("port = 0", "port = 1")).unwrap();
    zap.signal("HUP");
    zap.line("the new configuration is in effect: 1 backends");
    let warning = zap.line("needs a restart");
    assert!(warning.contains("server.port, server.drain_secs, ledger.path changed"), "{warning}");
    assert!(chat().ends_with("OK"));
    std::fs::write(&file.0, config(a, "[queue]\nmax_sise = 1")).unwrap();
    zap.signal("HUP");
    let refused = zap.line("the old configuration stays in effect");
    assert!(refused.contains("reload.toml:6: ") && refused.contains("max_size"), "{refused}");
    assert!(!refused.contains("CANARY"));
    assert!(chat().ends_with("OK"));
    std::fs::remove_file(&file.0).unwrap();
    zap.signal("HUP");
    zap.line("there is no file at");
    assert!(chat().ends_with("OK"));
    zap.signal("TERM");
    assert_eq!(zap.exit_code(), Some(0));
}

#[test]
fn every_request_is_logged_as_one_json_line_without_keys_or_control_characters() {
    let response = "HTTP/1.1 200 OK\r\nx-request-id: req_1\r\ncontent-length: 2\r\n\r\nok";
    let zap = Running::with(&config(provider(response, Duration::ZERO), ""));
    let head = "POST /chat HTTP/1.1\r\nauthorization: Bearer sk-CLIENT\r\nx-request-id: line-1";
    ask(zap.address, head, "{\"messages\":[],\"model\":\"m\\r\\n\\u001b[31m\\u009b\"}");
    let line = zap.line("line-1");
    let json: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(json["model"], "m\r\n\u{1b}[31m\u{9b}");
    for (key, want) in [
        ("path", serde_json::json!("/chat")),
        ("stream", serde_json::json!(false)),
        ("status", serde_json::json!(200)),
        ("backend", serde_json::json!("a")),
        ("bytes", serde_json::json!(2)),
        ("end", serde_json::json!("complete")),
        ("upstream_request_id", serde_json::json!("req_1")),
        ("method", serde_json::json!("POST")),
        ("peer", serde_json::json!("127.0.0.1")),
        ("code", serde_json::Value::Null),
    ] {
        assert_eq!(json[key], want, "{key} in {line}");
    }
    let attempt = json["attempts"][0].as_array().unwrap();
    assert_eq!(attempt[..3], [serde_json::json!("a"), serde_json::json!("200"), serde_json::Value::Null]);
    assert!(attempt[3].as_f64().unwrap() <= json["ttfb_ms"].as_f64().unwrap(), "{line}");
    for key in ["time", "client", "queue_ms", "ttfb_ms", "total_ms"] {
        assert!(!json[key].is_null(), "{key} in {line}");
    }
    ask(zap.address, "GET /a%c2%9b%0a HTTP/1.1\r\nx-request-id: line-2", "");
    let odd: serde_json::Value = serde_json::from_str(&zap.line("line-2")).unwrap();
    assert_eq!(odd["path"], "/a%c2%9b%0a");
    assert!(odd["upstream_request_id"].is_null());
    assert_eq!((&odd["method"], &odd["code"]), (&"GET".into(), &"unknown_url".into()));
    let long = format!("{} /chat HTTP/1.1\r\nx-request-id: line-3", "M".repeat(300));
    ask(zap.address, &long, "");
    let long: serde_json::Value = serde_json::from_str(&zap.line("line-3")).unwrap();
    assert_eq!((&long["method"], &long["code"]), (&"M".repeat(256).into(), &"method_not_allowed".into()));
    ask(zap.address, "GET nowhere HTTP/1.1", "");
    let bad: serde_json::Value = serde_json::from_str(&zap.line("\"bad_request\"")).unwrap();
    assert_eq!((&bad["method"], &bad["peer"]), (&serde_json::Value::Null, &"127.0.0.1".into()));
    let all = zap.log.lock().unwrap().join("\n");
    assert!(!all.contains("sk-C") && all.chars().all(|c| c == '\n' || !c.is_control()), "{all:?}");
}

#[test]
fn a_line_names_the_client_and_every_candidate_that_was_passed_over() {
    let good = provider(OK, Duration::ZERO);
    let busy = provider(
        "HTTP/1.1 429 X\r\nretry-after: 30\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        Duration::ZERO,
    );
    let failing =
        provider("HTTP/1.1 500 X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", Duration::ZERO);
    let backend = |name: &str, at: SocketAddr, more: &str| {
        format!("[[backends]]\nname = \"{name}\"\nurl = \"http://{at}\"\n{more}\n")
    };
    let text = [
        config(
            good,
            "[health]\nfailure_threshold = 1\n[[client_keys]]\nname = \"team\"\nkey = \"sk-CLIENT\"",
        ),
        backend("busy", busy, "weight = 9"),
        backend("failing", failing, "weight = 9"),
        backend("spent", good, "weight = 9\nrequests_per_minute = 1"),
        backend("unlikely", good, "weight = 1\npriority = 7"),
        backend("other", good, "weight = 9\nmodels = [\"other\"]"),
    ]
    .concat();
    let zap = Running::with(&text);
    let chat = |id: usize| {
        let head = format!("POST /chat HTTP/1.1\r\nx-api-key: sk-CLIENT\r\nx-request-id: line-{id}.");
        assert!(ask(zap.address, &head, CHAT).ends_with("ok"));
        serde_json::from_str::<serde_json::Value>(&zap.line(&format!("line-{id}."))).unwrap()
    };
    let tried = |line: &serde_json::Value| {
        let pairs = |key: &str| -> Vec<String> {
            line[key]
                .as_array()
                .unwrap()
                .iter()
                .map(|p| format!("{} {}", p[0], p[1]).replace('"', ""))
                .collect()
        };
        (pairs("attempts"), pairs("passed"))
    };
    // Each candidate that fails is listed as `tried`. After four requests all three are unavailable.
    for id in 0..4 {
        let (attempts, passed) = tried(&chat(id));
        for attempt in &attempts[..attempts.len() - 1] {
            let name = attempt.split(' ').next().unwrap();
            // A target that has to wait is passed over for that, and may be tried again later.
            let why = if name == "busy" { "busy cooling " } else { &format!("{name} tried") };
            assert!(passed.iter().any(|p| p.starts_with(why)), "{attempts:?} {passed:?}");
        }
    }
    let line = chat(9);
    assert_eq!((line["client"].as_str(), line["backend"].as_str()), (Some("team"), Some("a")));
    let (attempts, mut passed) = tried(&line);
    assert_eq!(attempts, ["a 200"]);
    passed.sort();
    assert_eq!(passed.len(), 3, "{passed:?}");
    assert!(passed[0].starts_with("busy cooling ") && passed[0].ends_with('s'), "{passed:?}");
    assert_eq!(passed[1], "failing ejected", "by the strikes of its pair");
    assert!(passed[2].starts_with("spent quota 5") || passed[2] == "spent quota 60.0s", "{passed:?}");
    let refused =
        ask(zap.address, "POST /chat HTTP/1.1\r\nauthorization: Bearer sk-WRONG\r\nx-request-id: no", CHAT);
    assert!(refused.starts_with("HTTP/1.1 401 ") && refused.contains("invalid_api_key"), "{refused}");
    let metrics = ask(zap.address, "GET /metrics HTTP/1.1", "");
    assert!(metrics.contains("zap_client_requests_total{client=\"team\"} 5\n"), "{metrics}");
    let all = [zap.log.lock().unwrap().join("\n"), metrics, refused].concat();
    assert!(!all.contains("sk-C") && !all.contains("sk-W"), "{all}");
}

#[test]
fn the_cooldown_in_a_line_is_the_time_left_at_the_check() {
    let busy = provider(
        "HTTP/1.1 429 X\r\nretry-after: 30\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        Duration::ZERO,
    );
    let slow = provider(OK, Duration::from_millis(1_500));
    let text = [
        config(slow, "[queue]\nmax_in_flight = 1"),
        format!("[[backends]]\nname = \"busy\"\nurl = \"http://{busy}\"\nweight = 9\n"),
    ]
    .concat();
    let zap = Running::with(&text);
    let address = zap.address;
    let first = std::thread::spawn(move || ask(address, "POST /chat HTTP/1.1\r\nx-request-id: first.", CHAT));
    // The second request waits in the queue while the first is served.
    let is_queued = || ask(address, "GET /status HTTP/1.1", "").contains("\"queue_depth\":1");
    let second =
        std::thread::spawn(move || ask(address, "POST /chat HTTP/1.1\r\nx-request-id: second.", CHAT));
    while !is_queued() {
        assert!(!first.is_finished(), "the second request was not queued");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(first.join().unwrap().ends_with("ok") && second.join().unwrap().ends_with("ok"));
    let lines = ["first.", "second."].map(|id| zap.line(id));
    let lines = lines.map(|line| serde_json::from_str::<serde_json::Value>(&line).unwrap());
    let is_queued = |line: &&serde_json::Value| line["queue_ms"].as_f64() > Some(1_000.0);
    let line = lines.iter().find(is_queued).expect("one of the requests waited");
    let cooling = line["passed"].as_array().unwrap().iter().find(|p| p[0] == "busy").unwrap();
    let secs = cooling[1].as_str().unwrap().trim_start_matches("cooling ").trim_end_matches('s');
    let (secs, queued) = (secs.parse::<f64>().unwrap(), line["queue_ms"].as_f64().unwrap() / 1e3);
    assert!(queued > 1.0 && secs < 30.3 - queued, "{line}");
}

#[test]
fn request_lines_can_be_disabled() {
    let text = config(provider(OK, Duration::ZERO), "[log]\nrequests = false");
    let mut zap = Running::with(&text);
    ask(zap.address, "POST /chat HTTP/1.1\r\nx-request-id: silent", CHAT);
    zap.signal("TERM");
    assert_eq!(zap.exit_code(), Some(0));
    zap.line(" info stop: all requests finished");
    assert!(!zap.log.lock().unwrap().iter().any(|l| l.contains("silent")));
}

#[test]
fn a_full_stderr_does_not_stop_requests() {
    let backend = provider(OK, Duration::ZERO);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = config(backend, "").replace("port = 0", &format!("port = {port}"));
    let file = File::new("full", &text);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let _child = KillOnDrop(zap().args(["--config", file.path()]).stderr(full).spawn().unwrap());
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let end = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < end, "Zap does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..5 {
        assert!(ask(address, "POST /chat HTTP/1.1", CHAT).ends_with("ok"));
    }
    while !ask(address, "GET /metrics HTTP/1.1", "").lines().any(|l| {
        l.strip_prefix("zap_log_lines_dropped_total ").is_some_and(|n| n.parse::<u64>().unwrap() >= 5)
    }) {
        assert!(Instant::now() < end, "the lost lines were not counted");
    }
}
