//! `zap healthcheck` against a running Zap, and against what is none.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use super::{File, OK, Running, config, provider, respond, run, stderr, zap};

/// The exit code and the message of a health check with this configuration.
fn checked(text: &str) -> (Option<i32>, String) {
    let file = File::new(&format!("healthcheck-{:x}", fastrand::u64(..)), text);
    let output = run(&["healthcheck", "--config", file.path()]);
    assert_eq!(output.stdout.len(), 0);
    (output.status.code(), stderr(&output))
}

fn at(url: &str) -> (Option<i32>, String) {
    let output = run(&["healthcheck", "--config", "/nowhere", "--url", url]);
    (output.status.code(), stderr(&output))
}

#[test]
fn a_running_zap_is_healthy_also_behind_a_file_that_has_new_faults() {
    let hosts = "allowed_hosts = [\"zap.example\"]";
    let zap = Running::with(&config(provider(OK, Duration::ZERO), hosts));
    let port = zap.address.port();
    for text in [
        format!("[server]\nport = {port}\n"),
        format!("[server]\nhost = \"127.0.0.1\"\nport = {port}\nworkers = 0\n[[backends]]\nwat = 1\n"),
    ] {
        assert_eq!(checked(&text), (Some(0), String::new()), "{text}");
    }
    assert_eq!(at(&format!("http://localhost:{port}/health")), (Some(0), String::new()));
    assert_eq!(at(&format!("http://127.0.0.1:{port}/ready")), (Some(0), String::new()));
    let (code, message) = at(&format!("http://127.0.0.1:{port}/nothing"));
    assert_eq!(code, Some(1));
    assert!(message.contains("/nothing: HTTP 4"), "{message}");
}

#[test]
fn the_variable_names_the_file() {
    let running = Running::with(&config(provider(OK, Duration::ZERO), ""));
    let file = File::new("healthcheck-variable", &format!("[server]\nport = {}\n", running.address.port()));
    let output = zap().arg("healthcheck").env("ZAP_CONFIG", file.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn each_failure_exits_with_1_and_says_why() {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (code, message) = checked(&format!("[server]\nport = {}\n", unused.port()));
    let want = format!("zap: http://127.0.0.1:{}/health: connection refused\n", unused.port());
    assert_eq!((code, message), (Some(1), want));

    let not_http: SocketAddr = respond(|_| "SSH-2.0-OpenSSH\r\n");
    let broken: SocketAddr = respond(|_| "HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n");
    for (url, part) in [
        (format!("http://{not_http}/"), "not HTTP"),
        (format!("http://{broken}/"), "HTTP 503"),
        ("ftp://127.0.0.1:1/".into(), "must begin with http://"),
        ("\u{1b}[31m".into(), "\\u{1b}[31m: not a URL"),
    ] {
        let (code, message) = at(&url);
        assert!(code == Some(1) && message.contains(part), "{url}: {message}");
    }
    for (text, part) in [
        ("[server]\nport = 0\n", "use --url"),
        ("[server]\nport = 70000\n", ":2: `server.port` is 70000"),
        ("[server\n", ":1:"),
    ] {
        let (code, message) = checked(text);
        assert!(code == Some(1) && message.contains(part), "{text}: {message}");
    }
    let missing = run(&["healthcheck", "--config", "/nowhere/config.toml"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(stderr(&missing).contains("/nowhere/config.toml"), "{}", stderr(&missing));
}

#[test]
fn a_zap_that_hangs_fails_within_its_time() {
    // The kernel takes the connection, and nothing reads from it.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let slow = TcpListener::bind("127.0.0.1:0").unwrap();
    let urls = [
        format!("http://{}/health", silent.local_addr().unwrap()),
        format!("https://{}/health", slow.local_addr().unwrap()),
    ];
    // The head of a TLS record, and then its body byte by byte: no single read waits long.
    std::thread::spawn(move || {
        let (mut client, _) = slow.accept().unwrap();
        client.write_all(&[22, 3, 3, 0x40, 0]).unwrap();
        while client.write_all(&[2]).is_ok() {
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    std::thread::scope(|scope| {
        for url in &urls {
            scope.spawn(move || {
                let since = Instant::now();
                let (code, message) = at(url);
                assert!(code == Some(1) && message.contains("no response within 3 s"), "{message}");
                assert!(since.elapsed() < Duration::from_secs(5));
            });
        }
    });
}
