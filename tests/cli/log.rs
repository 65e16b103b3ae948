//! The log as a whole: one format for all lines, the start, probes, and what a person sees at a terminal.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

use super::{CHAT, File, KillOnDrop, OK, ask, config, provider, respond, zap};

/// A Zap with all that it writes to stderr and stdout.
struct Logged {
    child: KillOnDrop,
    address: SocketAddr,
    text: Arc<Mutex<String>>,
}

impl Logged {
    /// Starts Zap with a file of this text.
    fn start(file: &File) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut command = zap();
        command.args(["--config", file.path()]).stdout(writer.try_clone().unwrap()).stderr(writer);
        Logged::collect(command, reader)
    }

    /// Starts Zap with a terminal as its stderr.
    fn at_a_terminal(file: &File, env: &[(&str, &str)]) -> Self {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap().into_string().unwrap();
        let stderr = std::fs::File::options().read(true).write(true).open(name).unwrap();
        let mut command = zap();
        command.args(["--config", file.path()]).stderr(OwnedFd::from(stderr));
        command.env_remove("NO_COLOR").env("TERM", "xterm").envs(env.iter().copied());
        Logged::collect(command, std::fs::File::from(terminal))
    }

    fn collect(mut command: std::process::Command, mut reader: impl Read + Send + 'static) -> Self {
        let child = KillOnDrop(command.stdin(Stdio::null()).spawn().unwrap());
        drop(command);
        let text = Arc::<Mutex<String>>::default();
        let shared = text.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // At the end of the process a terminal fails.
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                shared.lock().unwrap().push_str(std::str::from_utf8(&buffer[..n]).unwrap());
            }
        });
        let mut logged = Logged { child, address: ([127, 0, 0, 1], 0).into(), text };
        let line = logged.wait_for("listening on ");
        let address = line.split("listening on ").nth(1).unwrap();
        logged.address = address.split(['"', ' ', '\r']).next().unwrap().parse().unwrap();
        logged
    }

    /// Waits for a whole line that contains `part`.
    fn wait_for(&self, part: &str) -> String {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            let text = self.text.lock().unwrap().clone();
            let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
            if let Some(line) = whole.lines().find(|line| line.contains(part)) {
                return line.to_owned();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("no line contains {part}: {}", self.text.lock().unwrap());
    }

    fn signal(&self, name: &str) {
        let id = self.child.0.id().to_string();
        assert!(
            std::process::Command::new("kill").args([&format!("-{name}"), &id]).status().unwrap().success()
        );
    }

    /// Stops Zap, and returns all that it wrote.
    fn stop(mut self) -> String {
        self.signal("TERM");
        self.wait_for("all requests finished");
        self.child.0.wait().unwrap();
        self.text.lock().unwrap().clone()
    }
}

/// A configuration with a route, client keys, a good backend and one that fails.
fn full(log: &str) -> File {
    let failing = respond(|_| "HTTP/1.1 500 X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let more = format!(
        "[log]\n{log}\n[health]\nfailure_threshold = 2\ninterval_secs = 1\n\
         [[client_keys]]\nname = \"team\"\nkey = \"sk-CLIENT\"\n\
         [models.smart]\ntargets = [{{ backend = \"failing\" }}, {{ backend = \"a\", model = \"small\", priority = 1 }}]\n"
    );
    let text = config(provider(OK, Duration::ZERO), &more);
    let failing = format!("[[backends]]\nname = \"failing\"\nurl = \"http://{failing}\"\nweight = 1\n");
    File::new(&format!("log-{:x}", fastrand::u64(..)), &format!("{text}{failing}"))
}

/// Drives Zap through all that it logs in normal life: checks, a failover, a refusal, a reload and a drain.
fn exercise(zap: &Logged, file: &File) {
    zap.wait_for("backend a is up");
    zap.wait_for("backend failing is down");
    let chat = "POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer sk-CLIENT\r\nx-request-id: id-";
    let smart = "{\"messages\":[],\"model\":\"smart\"}";
    assert!(ask(zap.address, &format!("{chat}1"), smart).ends_with("ok"));
    assert!(ask(zap.address, "POST /chat HTTP/1.1\r\nx-request-id: id-2", CHAT).contains("invalid_api_key"));
    assert!(ask(zap.address, "GET nowhere HTTP/1.1", "").contains("400"));
    zap.signal("HUP");
    zap.wait_for("the new configuration is in effect");
    std::fs::write(&file.0, "[server]\nprot = 1\n").unwrap();
    zap.signal("HUP");
    zap.wait_for("the old configuration stays in effect");
}

#[test]
fn with_json_every_line_is_an_object_and_the_manual_has_its_members() {
    for log in ["format = \"json\"", "requests = true"] {
        let file = full(log);
        let zap = Logged::start(&file);
        exercise(&zap, &file);
        let text = zap.stop();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
            .collect();
        let mut members = BTreeSet::new();
        for line in &lines {
            let object = line.as_object().unwrap();
            for key in ["time", "level", "event"] {
                assert!(object[key].is_string(), "{line}");
            }
            if line["event"] != "request" {
                members.extend(
                    object.keys().filter(|key| !["time", "level", "event"].contains(&&***key)).cloned(),
                );
            }
        }
        assert_eq!(super::manual::names("operations", "member of an event"), members);
        let events = super::manual::names("operations", "event");
        for line in &lines {
            assert!(events.contains(line["event"].as_str().unwrap()), "{line}");
        }
        let of = |event: &str| lines.iter().filter(|line| line["event"] == event).collect::<Vec<_>>();
        assert_eq!(lines[0]["file"], file.path());
        assert!(lines[0]["version"].as_str().unwrap().starts_with(env!("CARGO_PKG_VERSION")));
        let backends = of("backend");
        assert_eq!((backends[0]["backend"].as_str(), backends[0]["key"].as_bool()), (Some("a"), Some(true)));
        assert_eq!(backends[1]["key"], false);
        assert!(backends[0]["url"].as_str().unwrap().ends_with("/v1/chat/completions"));
        assert_eq!(of("route")[0]["targets"], serde_json::json!(["failing", "a as small"]));
        assert_eq!(of("client_keys")[0]["clients"], serde_json::json!(["team"]));
        let up = of("health_check").into_iter().find(|line| line["backend"] == "a").unwrap();
        assert_eq!((&up["result"], &up["status"]), (&"ok".into(), &200.into()));
        let requests = of("request");
        let served = requests.iter().find(|line| line["request_id"] == "id-1").unwrap();
        assert_eq!((&served["upstream_model"], &served["level"]), (&"small".into(), &"info".into()));
        assert!(requests.iter().any(|line| line["code"] == "invalid_api_key"));
        for event in ["reload", "drain", "stop", "backend_down"] {
            assert!(!of(event).is_empty(), "{event}: {text}");
        }
        assert!(!text.contains("sk-C"), "{text}");
    }
}

#[test]
fn with_text_every_line_is_text_with_the_time_the_level_and_the_event() {
    let file = full("format = \"text\"");
    let zap = Logged::start(&file);
    exercise(&zap, &file);
    let text = zap.stop();
    for line in text.lines() {
        let [time, level, event] = line.splitn(4, ' ').take(3).collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        assert!(time.len() == 24 && time.ends_with('Z'), "{line}");
        assert!(["info", "warn", "error"].contains(&level) && event.ends_with(':'), "{line}");
    }
    let request = text.lines().find(|line| line.contains("id id-1")).unwrap();
    for part in [
        " info request: 200 POST /v1/chat/completions from a in ",
        ", model smart, sent as small, ",
        "2 bytes; tries: a 200 in ",
        "; client team at 127.0.0.1; passed over: failing ejected (HTTP 500",
    ] {
        assert!(request.contains(part), "{part}: {request}");
    }
    let refused = text.lines().find(|line| line.contains("id id-2")).unwrap();
    assert!(refused.contains(" info request: 401 POST /chat invalid_api_key in "), "{refused}");
    assert!(!text.contains("sk-C") && !text.contains('\u{1b}'), "{text}");
}

#[test]
fn at_a_terminal_lines_are_short_and_coloured_unless_no_color_is_set() {
    const ESCAPE: char = '\u{1b}';
    for (log, env, is_json, is_coloured) in [
        ("requests = true", &[][..], false, true),
        ("requests = true", &[("NO_COLOR", "1")], false, false),
        ("requests = true", &[("TERM", "dumb")], false, false),
        ("format = \"text\"", &[], false, true),
        ("format = \"json\"", &[], true, false),
    ] {
        let file = full(log);
        let zap = Logged::at_a_terminal(&file, env);
        exercise(&zap, &file);
        let text = zap.stop();
        assert_eq!(text.contains(ESCAPE), is_coloured, "{log} {env:?}: {text}");
        for line in text.lines() {
            assert_eq!(serde_json::from_str::<Value>(line).is_ok(), is_json, "{line}");
        }
        let request = text.lines().find(|line| line.contains("/v1/chat/completions") && line.contains("200"));
        let request = request.unwrap_or_else(|| panic!("no request: {text}"));
        if !is_json {
            assert!(!request.contains("id-1") && !request.contains("request:"), "{request}");
        }
        if is_coloured {
            assert!(request.contains("\u{1b}[32m200\u{1b}[0m POST"), "{request}");
        }
    }
}

#[test]
fn probes_are_logged_only_if_asked_for_or_refused() {
    const PROBES: [&str; 6] = ["/health", "/ready", "/metrics", "/status", "/usage", "/"];
    for (more, want) in [("", false), ("probes = true", true)] {
        let text = config(provider(OK, Duration::ZERO), &format!("[log]\nformat = \"json\"\n{more}"));
        let file = File::new(&format!("probes-{:x}", fastrand::u64(..)), &text);
        let zap = Logged::start(&file);
        for path in PROBES {
            let answer = ask(zap.address, &format!("GET {path} HTTP/1.1\r\nx-request-id: id{path}."), "");
            assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
        }
        ask(zap.address, "PUT /status HTTP/1.1\r\nx-request-id: id-refused", "");
        ask(zap.address, "GET /v1/models HTTP/1.1\r\nx-request-id: id-models", "");
        let text = zap.stop();
        for path in PROBES {
            assert_eq!(text.contains(&format!("\"id{path}.\"")), want, "{path}: {text}");
        }
        assert!(text.contains("\"id-refused\"") && text.contains("\"id-models\""), "{text}");
    }
}

#[test]
fn the_start_of_many_backends_is_bounded() {
    let a = provider(OK, Duration::ZERO);
    let backend = |i| format!("[[backends]]\nname = \"b{i}\"\nurl = \"http://{a}\"\nweight = 1\n");
    let backends: String = (0..119).map(backend).collect();
    let file = File::new(&format!("many-{:x}", fastrand::u64(..)), &format!("{}{backends}", config(a, "")));
    let zap = Logged::start(&file);
    zap.wait_for("and 70 more backends are up");
    let text = zap.stop();
    assert_eq!(text.matches("\"event\":\"backend\"").count(), 51, "{text}");
    assert!(text.contains("\"message\":\"and 70 more backends\""), "{text}");
    assert_eq!(text.matches("\"event\":\"health_check\"").count(), 51, "{text}");
}

#[test]
fn what_ends_the_start_is_a_line_of_the_log_too() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("port = {}", taken.local_addr().unwrap().port());
    let (port, ledger) =
        (|text: String| text.replace("port = 0", &port), "[ledger]\npath = \"/nowhere/zap.db\"\n");
    let backend = provider(OK, Duration::ZERO);
    for (text, code, message) in [
        (port(config(backend, "")), 1, "cannot listen on "),
        (config(backend, ledger), 2, "cannot use the ledger "),
    ] {
        let file = File::new(&format!("end-{:x}", fastrand::u64(..)), &text);
        let output = zap().args(["--config", file.path()]).output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        let line: Value = serde_json::from_str(super::stderr(&output).trim_end()).unwrap();
        assert_eq!((&line["level"], &line["event"]), (&"error".into(), &"stop".into()), "{line}");
        assert!(line["message"].as_str().unwrap().starts_with(message), "{line}");
    }
}
