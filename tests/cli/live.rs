//! `zap check --live`, `zap example` and `ZAP_CONFIG`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use crate::{File, OK, config, provider, run, stderr, zap};

/// A provider that answers `GET path` with the first response whose path begins the request's, else 404. Each request
/// needs the key.
fn models_provider(responses: &'static [(&'static str, &'static str)]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut buf = [0; 8192];
            let n = stream.read(&mut buf).unwrap_or(0);
            let head = String::from_utf8_lossy(&buf[..n]).into_owned();
            let known = responses.iter().find(|(path, _)| head.starts_with(&format!("GET {path} ")));
            let (status, body) = match known {
                _ if !head.contains("authorization: Bearer sk-CANARY\r\n") => ("401 X", "no key: sk-CANARY"),
                Some((_, response)) => response.split_once('\n').unwrap(),
                None => ("404 X", "sk-CANARY"),
            };
            let length = body.len();
            let _ = write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}");
        }
    });
    address
}

/// What `check --live` prints below the first line of each backend, and its exit code.
fn live(text: &str) -> (Vec<String>, Option<i32>) {
    let file = File::new(&format!("live-{:x}", fastrand::u64(..)), text);
    let output = run(&["check", "--live", "--config", file.path()]);
    let out = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(!format!("{out}{}", stderr(&output)).contains("CANARY"), "{out}");
    assert!(out.starts_with(&format!("{}: valid, ", file.path())), "{out}{}", stderr(&output));
    (out.lines().skip(1).map(|line| line.trim().to_owned()).collect(), output.status.code())
}

#[test]
fn a_live_check_says_what_each_backend_answered() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let good = models_provider(&[
        ("/v1/models", "200 OK\n{\"data\":[{\"id\":\"gpt-4o\"},{\"id\":\"models/gemini\"}]}"),
        ("/health", "200 OK\nok"),
    ]);
    for (address, more, health, models, code) in [
        (good, "default_model = \"gpt-4o\"", "HTTP 200, up", "HTTP 200, 2 models", 0),
        (good, "models = [\"gemini\", \"gpt-*\"]", "HTTP 200, up", "HTTP 200, 2 models", 0),
        (
            good,
            "models = { a = \"gpt-5\" }",
            "HTTP 200, up",
            "HTTP 200, 2 models; it does not list \"gpt-5\"",
            0,
        ),
        (
            good,
            "health_path = \"/healthz?key=sk-CANARY\"",
            "HTTP 404, up, but the path does not exist; set `health_path`",
            "HTTP 200, 2 models",
            0,
        ),
        (
            good,
            "chat_path = \"/chat\"",
            "HTTP 200, up",
            "not asked, since `chat_path` does not end in `/chat/completions`",
            0,
        ),
        (
            good,
            "auth_header = \"api-key\"",
            "HTTP 401, it refuses the key; check `api_key` and `auth_header`",
            "not asked",
            1,
        ),
        (
            models_provider(&[("/health", "200 OK\nok")]),
            "",
            "HTTP 200, up",
            "HTTP 404, it lists no models",
            0,
        ),
        (
            models_provider(&[("/health", "200 OK\nok"), ("/v1/models", "200 OK\n<html>")]),
            "",
            "HTTP 200, up",
            "HTTP 200, but that is no list of models",
            0,
        ),
        (
            models_provider(&[("/health", "200 OK\nok"), ("/v1/models", "403 X\nsk-CANARY")]),
            "",
            "HTTP 200, up",
            "HTTP 403, it refuses the key, or this key may not do that; check `api_key`",
            1,
        ),
        (
            models_provider(&[("/health", "503 X\nno")]),
            "",
            "HTTP 503, the backend, or a proxy in front of it, is down",
            "not asked",
            1,
        ),
        (
            models_provider(&[("/health", "301 X\nno")]),
            "",
            "HTTP 301, it redirects, and Zap does not follow; set the address that it redirects to as `url`",
            "not asked",
            1,
        ),
        (closed, "", "failed: connection refused", "not asked", 1),
        (good, "health = { enabled = false }", "off", "HTTP 200, 2 models", 0),
        (
            good,
            "health = { path = \"/healthz\" }",
            "HTTP 404, up, but the path does not exist; set `health_path`",
            "HTTP 200, 2 models",
            0,
        ),
        (closed, "health = { enabled = false }", "off", "failed: connection refused", 1),
    ] {
        let (lines, status) = live(&format!("{}{more}\n", config(address, "")));
        let path = if more.contains("healthz") { "/healthz" } else { "/health" };
        let health = match health {
            "off" => "health  not asked, since `health.enabled` is false".to_owned(),
            health => format!("health  http://{address}{path}: {health}"),
        };
        let expected =
            ["a".to_owned(), health, format!("models  {models}"), format!("{code} of 1 backends failed")];
        assert_eq!((lines, status), (expected.to_vec(), Some(code)), "{more}");
    }
}

#[test]
fn a_live_check_asks_through_the_proxy() {
    let proxy = models_provider(&[
        ("http://provider.test/v1/models", "200 OK\n[{\"id\":\"a\"}]"),
        ("http://provider.test/health", "200 OK\nok"),
        ("http://closed.test/health", "407 X\nno"),
    ]);
    let backend = |host: &str| {
        format!(
            "[[backends]]\nname = \"a\"\nurl = \"http://{host}\"\nweight = 1\napi_key = \"sk-CANARY\"\n\
             proxy = \"http://{proxy}\"\n"
        )
    };
    let (lines, status) = live(&backend("provider.test"));
    assert_eq!((&*lines[1], status), ("health  http://provider.test/health: HTTP 200, up", Some(0)));
    assert_eq!(lines[2], "models  HTTP 200, 1 model");
    let (lines, status) = live(&backend("closed.test"));
    assert_eq!(status, Some(1));
    assert!(lines[1].starts_with("health  http://closed.test/health: failed: proxy"), "{lines:?}");
}

#[test]
fn a_live_check_asks_all_backends_at_once_and_faults_exit_with_2() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().map(|address| (address, silent)).unwrap();
    let backend =
        |i: u32| format!("[[backends]]\nname = \"b{i}\"\nurl = \"http://{}\"\nweight = 1\n", silent.0);
    let backends: String = (0..8).map(backend).collect();
    let since = Instant::now();
    let (lines, status) = live(&format!("[health]\ntimeout_secs = 1\n{backends}"));
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    assert_eq!(status, Some(1));
    assert_eq!(lines.iter().filter(|line| line.ends_with("failed: no answer within 1 s")).count(), 8);
    assert_eq!(lines.last().unwrap(), "8 of 8 backends failed");
    let file = File::new("live-faults", "[server]\nport = 70000\n");
    let output = run(&["check", "--live", "--config", file.path()]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
}

#[test]
fn check_prints_the_urls_of_each_backend_without_query_and_key() {
    let text = "[server]\nhost = \"127.0.0.1\"\n\
        [[backends]]\nname = \"a\"\nurl = \"https://api.example.com/v1\"\nweight = 1\napi_key = \"sk-CANARY\"\n\
        health_path = \"/v1/models?key=sk-CANARY\"\n\
        [[backends]]\nname = \"b\"\nurl = \"http://b:1/sk-CANARY/x\"\nweight = 1\nchat_path = \"/chat?v=1\"\n\
        [[backends]]\nname = \"c\"\nurl = \"http://c\"\nweight = 1\nhealth = { enabled = false }\n\
        [[backends]]\nname = \"d\"\nurl = \"http://d/v1\"\nweight = 1\nprotocols = [\"anthropic\"]\n";
    let file = File::new("urls", text);
    let output = run(&["check", "--config", file.path()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let out = String::from_utf8(output.stdout).unwrap();
    let expected = "valid, 4 backends\n  a\n    chat      https://api.example.com/v1/chat/completions\n    \
        health    https://api.example.com/v1/models\n  b\n    chat      http://b:1/***/x/chat\n    \
        health    http://b:1/***/x/health\n  c\n    chat      http://c/v1/chat/completions\n    \
        health    not checked, since `health.enabled` is false\n  d\n    messages  http://d/v1/messages\n    \
        health    http://d/health\n";
    assert_eq!(out.split_once(": ").unwrap().1, expected);
}

#[test]
fn an_example_of_every_provider_passes_the_check() {
    let list = String::from_utf8(run(&["example"]).stdout).unwrap();
    let (_, names) = list.split_once("prints other providers: ").unwrap();
    let names: Vec<&str> = names.lines().next().unwrap().trim_end_matches('.').split(", ").collect();
    assert_eq!(names.len(), 20, "{names:?}");
    let output = run(&[&["example"], &names[..]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let file = File::new("example", &String::from_utf8(output.stdout).unwrap());
    let unset = run(&["check", "--config", file.path()]);
    assert_eq!(unset.status.code(), Some(2));
    assert!(stderr(&unset).contains("`XAI_API_KEY`, which is unset or empty"), "{}", stderr(&unset));
    let keys = names.iter().map(|name| match *name {
        "azure" => "AZURE_OPENAI_API_KEY".to_owned(),
        "huggingface" => "HF_TOKEN".to_owned(),
        name => format!("{}_API_KEY", name.to_uppercase()),
    });
    let mut command = zap();
    command.args(["check", "--config", file.path()]).envs(keys.map(|key| (key, "sk-CANARY")));
    let output = command.output().unwrap();
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
    let unknown = run(&["example", "gorq"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(stderr(&unknown).contains("did you mean groq?"), "{}", stderr(&unknown));
}

#[test]
fn the_variable_zap_config_names_the_file() {
    let file = File::new("variable", &config(provider(OK, Duration::ZERO), ""));
    let check =
        |args: &[&str], variable: &str| zap().args(args).env("ZAP_CONFIG", variable).output().unwrap();
    let output = check(&["check"], file.path());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let output = check(&["check", "--config", file.path()], "/nowhere/zap.toml");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let output = check(&["check"], "/nowhere/zap.toml");
    assert_eq!(output.status.code(), Some(2));
    let missing = "no configuration file at /nowhere/zap.toml, which ZAP_CONFIG names";
    assert!(stderr(&output).contains(missing), "{}", stderr(&output));
}
