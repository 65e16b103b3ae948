//! Proxies on the way to a backend: tunnels, forwarded requests, and what a proxy refuses.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::support::provider::blackhole;
use crate::support::tls_server::server_with;
use crate::support::{CHAT, File, Provider, Zap, eventually};

/// A proxy that answers each `CONNECT` with `answer`, and then passes bytes on to `to`.
struct Proxy {
    address: SocketAddr,
    /// The heads that it got.
    heads: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    fn start(answer: &'static str, to: Option<SocketAddr>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let kept = heads.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, heads) = (stream.unwrap(), kept.clone());
                std::thread::spawn(move || {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let mut byte = [0];
                        if !matches!(stream.read(&mut byte), Ok(1)) {
                            return;
                        }
                        head.push(byte[0]);
                    }
                    heads.lock().unwrap().push(String::from_utf8(head).unwrap());
                    // In two pieces: a head may come in any.
                    let (first, second) = answer.split_at(answer.len() / 2);
                    for piece in [first, second] {
                        let _ = stream.write_all(piece.as_bytes());
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                    if let Some(to) = to {
                        splice(stream, TcpStream::connect(to).unwrap());
                    }
                });
            }
        });
        Proxy { address, heads }
    }

    fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

/// Passes bytes on in both directions until one side closes.
fn splice(a: TcpStream, b: TcpStream) {
    let (mut from_a, mut to_a) = (a.try_clone().unwrap(), a);
    let (mut from_b, mut to_b) = (b.try_clone().unwrap(), b);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_a, &mut to_b);
        let _ = to_b.shutdown(Shutdown::Both);
    });
    let _ = std::io::copy(&mut from_b, &mut to_a);
    let _ = to_a.shutdown(Shutdown::Both);
}

const OPENED: &str = "HTTP/1.1 200 Connection established\r\nvia: test\r\n\r\n";

const QUICK: &str = "[retry]\nbase_delay_ms = 1\nmax_delay_ms = 1\n[timeouts]\nconnect_ms = 300\n\
    [health]\nfailure_threshold = 1000\n";

/// A backend of that name at `url` behind a proxy.
fn behind(proxy: SocketAddr, url: &str, more: &str) -> String {
    format!(
        "[[backends]]\nname = \"a\"\nurl = \"{url}\"\nweight = 1\nproxy = \"http://user:sk-pass@{proxy}\"\n{more}\n"
    )
}

#[test]
fn a_backend_with_tls_is_reached_through_a_tunnel_and_so_are_its_checks() {
    let (server, pem) = server_with(rcgen::CertificateParams::new(vec!["api.test".to_owned()]).unwrap());
    let proxy = Proxy::start(OPENED, Some(server));
    let more = format!("api_key = \"sk-CANARY\"\nca_file = \"{}\"", pem.display());
    let zap = Zap::with(QUICK, &[behind(proxy.address, "https://api.test", &more)]);
    eventually("the backend is checked", || !proxy.heads().is_empty());
    let mut client = zap.client();
    for _ in 0..3 {
        let answer = client.chat("", CHAT);
        assert_eq!((answer.status, answer.text()), (200, "secret"));
    }
    let heads = proxy.heads();
    assert_eq!(heads.len(), 2, "one tunnel for the check, one for the requests: {heads:?}");
    for head in heads {
        let agent = env!("CARGO_PKG_VERSION");
        // The name is looked up by the proxy, and the proxy sees no key.
        let want = format!(
            "CONNECT api.test:443 HTTP/1.1\r\nhost: api.test:443\r\nuser-agent: zap/{agent}\r\n\
             proxy-authorization: Basic dXNlcjpzay1wYXNz\r\n\r\n"
        );
        assert_eq!(head, want);
    }
    std::fs::remove_file(pem).unwrap();
}

#[test]
fn a_plain_backend_is_asked_in_absolute_form() {
    let proxy = Provider::named("through");
    let backend = behind(proxy.address, "http://api.test:8080/base", "api_key = \"sk-own\"");
    let zap = Zap::with("[health]\ninterval_secs = 1\n", &[backend]);
    let answer = zap.client().chat("proxy-authorization: sk-client\r\n", CHAT);
    assert_eq!((answer.status, answer.text()), (200, "through"));
    let seen = proxy.seen().remove(0);
    assert_eq!(seen.line, "POST http://api.test:8080/base/v1/chat/completions HTTP/1.1");
    assert_eq!(seen.header("host"), Some("api.test:8080"));
    assert_eq!(seen.header("authorization"), Some("Bearer sk-own"));
    assert_eq!(seen.headers.iter().filter(|(name, _)| name == "proxy-authorization").count(), 1);
    assert_eq!(seen.header("proxy-authorization"), Some("Basic dXNlcjpzay1wYXNz"));
    eventually("the backend is checked", || !proxy.probes().is_empty());
    let probe = proxy.probes().remove(0);
    assert_eq!(probe.line, "GET http://api.test:8080/base/health HTTP/1.1");
    assert_eq!(probe.header("proxy-authorization"), Some("Basic dXNlcjpzay1wYXNz"));
}

#[test]
fn what_a_proxy_refuses_is_a_failure_of_the_connection_with_a_clear_cause() {
    let (silent, _held) = blackhole();
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let wants_key = Provider::fixed(407, "proxy-authenticate: Basic\r\n", "no");
    let of = |answer| Proxy::start(answer, None).address;
    let credentials = "proxy: HTTP 407: the credentials in its URL are missing or wrong";
    for (proxy, url, code, cause) in [
        (
            of("HTTP/1.1 407 No\r\ncontent-length: 0\r\n\r\n"),
            "https://api.test",
            "upstream_unreachable",
            credentials,
        ),
        (
            of("HTTP/1.0 502 Bad\r\n\r\n"),
            "https://api.test",
            "upstream_unreachable",
            "proxy: HTTP 502 to CONNECT",
        ),
        (
            of("SSH-2.0-OpenSSH\r\n"),
            "https://api.test",
            "upstream_unreachable",
            "proxy: the answer to CONNECT is not HTTP",
        ),
        (
            of("HTTP/1.1 200 Yes\r\n\r\nahead"),
            "https://api.test",
            "upstream_unreachable",
            "proxy: the answer to CONNECT is not HTTP",
        ),
        (of("HTTP/1.1 2"), "https://api.test", "upstream_unreachable", "proxy: connection closed"),
        (Provider::closed_port(), "https://api.test", "upstream_unreachable", "proxy: connection refused"),
        (Provider::closed_port(), "http://api.test", "upstream_unreachable", "proxy: connection refused"),
        (silent, "https://api.test", "upstream_timeout", "connect through the proxy timed out after 0.3 s"),
        (
            mute.local_addr().unwrap(),
            "https://api.test",
            "upstream_timeout",
            "connect through the proxy timed out after 0.3 s",
        ),
        (wants_key.address, "http://api.test", "upstream_unreachable", credentials),
    ] {
        let b = Provider::named("b");
        let zap = Zap::with(QUICK, &[behind(proxy, url, ""), b.backend("b", "priority = 1")]);
        assert_eq!(zap.chat(CHAT).text(), "b", "{cause}: another backend serves");
        let error = zap.client().get("/status").json()["backends"][0]["last_error"].clone();
        let (shown_code, shown) = (error["code"].as_str().unwrap(), error["cause"].as_str().unwrap());
        assert_eq!((shown_code, shown), (code, cause), "{url}");
    }
}

#[test]
fn a_refused_check_ejects_a_plain_backend_too() {
    let proxy = Provider::named("a");
    proxy.set_health(407);
    let settings = "[health]\ninterval_secs = 1\nfailure_threshold = 1\n";
    let zap = Zap::with(settings, &[behind(proxy.address, "http://api.test", "")]);
    let state = || zap.client().get("/status").json()["backends"][0]["state"].clone();
    eventually("the backend is ejected", || state() == "ejected");
    // A backend without a proxy that answers 407 is alive.
    let direct = Provider::named("b");
    direct.set_health(407);
    let zap = Zap::with(settings, &[direct.backend("b", "")]);
    eventually("the backend is checked", || !direct.probes().is_empty());
    assert_eq!(zap.client().get("/status").json()["backends"][0]["state"], "healthy");
}

#[test]
fn a_reload_closes_the_connections_through_the_old_proxy() {
    let (old, new) = (Provider::named("old"), Provider::named("new"));
    let file = File::new();
    let zap = Zap::with_file(&file, "", &[behind(old.address, "http://api.test", "")]);
    let mut client = zap.client();
    assert_eq!(client.chat("", CHAT).text(), "old");
    file.write("", &[behind(new.address, "http://api.test", "")]);
    assert!(zap.reload());
    for _ in 0..3 {
        assert_eq!(client.chat("", CHAT).text(), "new");
    }
    assert_eq!(old.count(), 1);
}

#[test]
fn the_environment_names_the_proxy_but_never_for_this_machine() {
    let proxy = Provider::named("proxy");
    let direct = Provider::named("direct");
    let address = proxy.address.to_string();
    let env = move |name: &str| match name {
        "http_proxy" => Some(address.clone()),
        "NO_PROXY" => Some("exempt.test".to_owned()),
        _ => None,
    };
    let text = |url: &str| format!("[[backends]]\nname = \"a\"\nurl = \"{url}\"\nweight = 1\n");
    let zap = Zap::start_in(&text("http://api.test"), &env);
    assert_eq!(zap.chat(CHAT).text(), "proxy");
    let zap = Zap::start_in(&text(&format!("http://{}", direct.address)), &env);
    assert_eq!(zap.chat(CHAT).text(), "direct");
    let zap = Zap::start_in(&text("http://x.exempt.test"), &env);
    assert_eq!(zap.chat(CHAT).status, 502, "no such host");
    let zap = Zap::start_in(&format!("{}proxy = \"none\"\n", text("http://nowhere.invalid")), &env);
    assert_eq!(zap.chat(CHAT).status, 502, "no such host");
    assert_eq!(proxy.count(), 1);
}
