//! Requests of web pages: preflights, the headers that let a page read a response, foreign origins, allowed hosts.

use crate::support::provider::{After, chunk, end_chunks, reply, start_events};
use crate::support::{CHAT, File, Provider, Response, STREAM, Zap};

const LISTED: &str = "[server]\ncors_origins = [\"https://app.example\", \"app://obsidian.md\"]\n";

const KEYS: &str = "[[client_keys]]\nname = \"team\"\nkey = \"zk-team\"\n";

const PREFLIGHT: &str = "access-control-request-method: POST\r\n";

/// A provider that lets its own site read its responses.
fn own_site() -> Provider {
    Provider::start(|seen, stream| {
        let own = "access-control-allow-origin: https://own.example\r\naccess-control-expose-headers: x-own\r\n\
            access-control-allow-credentials: true\r\nvary: accept\r\n";
        if seen.body.windows(13).any(|w| w == b"\"stream\":true") {
            start_events(stream);
            chunk(stream, "data: {\"choices\":[{\"delta\":{\"content\":\"one\"}}]}\n\n");
            chunk(stream, "data: [DONE]\n\n");
            end_chunks(stream);
        } else {
            let status = if seen.body.windows(4).any(|w| w == b"\"404") { 404 } else { 200 };
            reply(stream, status, own, b"{\"id\":1}");
        }
        After::Keep
    })
}

/// Sends a request without a body.
fn send(zap: &Zap, line: &str, headers: &str) -> Response {
    let mut client = zap.client();
    client.send(format!("{line} HTTP/1.1\r\nhost: zap.example:8000\r\n{headers}\r\n"));
    client.response()
}

/// The values of all headers of CORS, and of `vary`.
fn cors(answer: &Response) -> Vec<(&str, &str)> {
    let is_cors = |name: &str| name.starts_with("access-control-") || name == "vary";
    answer.headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).filter(|(n, _)| is_cors(n)).collect()
}

fn assert_readable(answer: &Response, origin: &str, what: &str) {
    // `*` stands for all headers, since there is no `access-control-allow-credentials`.
    assert_eq!(answer.header("access-control-expose-headers"), Some("*"), "{what}");
    assert_eq!(answer.header("access-control-allow-origin"), Some(origin), "{what}");
    assert!(answer.headers.contains(&("vary".into(), "origin".into())), "{what}");
    assert_eq!(answer.header("access-control-allow-credentials"), None, "{what}");
}

#[test]
fn a_preflight_of_a_listed_origin_is_answered_without_a_key() {
    let a = own_site();
    let zap = Zap::with(&format!("{LISTED}{KEYS}"), &[a.backend("a", "")]);
    for (path, methods) in [
        ("/v1/chat/completions", "POST"),
        ("/chat", "POST"),
        ("/v1/models", "GET, HEAD"),
        ("/v1/models/x/y", "GET, HEAD"),
        ("/health", "GET, HEAD"),
        ("/v1/nothing", "GET, HEAD, POST"),
    ] {
        for origin in ["https://app.example", "app://obsidian.md"] {
            let asked = "access-control-request-headers: authorization,content-type,x-stainless-os\r\n";
            let answer =
                send(&zap, &format!("OPTIONS {path}"), &format!("origin: {origin}\r\n{PREFLIGHT}{asked}"));
            assert_eq!(answer.status, 204, "{path}");
            assert_readable(&answer, origin, path);
            assert_eq!(answer.header("access-control-allow-methods"), Some(methods), "{path}");
            let headers = answer.header("access-control-allow-headers");
            assert_eq!(headers, Some("authorization,content-type,x-stainless-os"));
            assert_eq!(answer.header("access-control-max-age"), Some("86400"));
            assert_eq!(answer.header("access-control-allow-private-network"), None);
            assert!(answer.header("x-request-id").is_some() && answer.header("content-length").is_none());
        }
    }
    let private =
        format!("origin: app://obsidian.md\r\n{PREFLIGHT}access-control-request-private-network: true\r\n");
    let answer = send(&zap, "OPTIONS /chat", &private);
    assert_eq!((answer.status, answer.header("access-control-allow-private-network")), (204, Some("true")));
    assert_eq!(answer.header("access-control-allow-headers"), None);
    // Neither an OPTIONS that is no preflight nor that of another origin.
    let listed = "origin: https://app.example\r\n";
    for (headers, readable) in [
        (listed.to_owned(), true),
        (PREFLIGHT.to_owned(), false),
        (format!("origin: https://other.example\r\n{PREFLIGHT}"), false),
        (format!("origin: null\r\n{PREFLIGHT}"), false),
        (private.replace("app://", "http://"), false),
    ] {
        let answer = send(&zap, "OPTIONS /chat", &headers);
        assert_eq!((answer.status, answer.code().as_str()), (401, "invalid_api_key"), "{headers}");
        if readable {
            assert_readable(&answer, "https://app.example", "an OPTIONS");
        } else {
            assert_eq!(cors(&answer), [("vary", "origin")], "{headers}");
        }
    }
    assert_eq!(a.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn a_page_of_a_listed_origin_reads_every_answer() {
    let a = own_site();
    let limit = "[rate_limit]\nrequests_per_minute = 100\n";
    let zap = Zap::with(&format!("{LISTED}{limit}{KEYS}"), &[a.backend("a", "models = [\"m\"]")]);
    let origin = "origin: https://app.example\r\n";
    let key = format!("{origin}authorization: Bearer zk-team\r\n");
    let mut client = zap.client();
    let body = |text: &str| CHAT.replacen('{', &format!("{{\"model\":\"m\",\"x\":\"{text}\","), 1);
    let mut ask = |path: &str, headers: &str, body: &str| {
        client.post(path, headers, body);
        client.response()
    };
    for (path, headers, text, status) in [
        ("/chat", &key, body("1"), 200),
        ("/chat", &key, STREAM.replacen('{', "{\"model\":\"m\",", 1), 200),
        ("/chat", &key, body("404"), 404),
        ("/chat", &key, CHAT.replacen('{', "{\"model\":\"n\",", 1), 404),
        ("/chat", &key, "[]".to_owned(), 400),
        ("/v1/models", &key, String::new(), 405),
        ("/v1/nothing", &key, String::new(), 404),
        ("/chat", &origin.to_owned(), body("1"), 401),
        ("/health", &origin.to_owned(), String::new(), 405),
    ] {
        let answer = ask(path, headers, &text);
        assert_eq!(answer.status, status, "{path} {text}");
        assert_readable(&answer, "https://app.example", &format!("{path} {text}"));
        // The provider's own header stays.
        let own = answer.headers.iter().any(|(n, v)| n == "vary" && v == "accept");
        let is_of_provider = status != 401 && (text == body("1") || text == body("404"));
        assert_eq!(own, is_of_provider, "{path} {text}");
    }
    for path in ["/health", "/ready", "/metrics", "/status"] {
        assert_readable(&send(&zap, &format!("GET {path}"), origin), "https://app.example", path);
    }
    // With client keys, a page of another origin is served and cannot read the response.
    for origin in ["origin: https://other.example\r\n", "origin: null\r\n", ""] {
        let mut client = zap.client();
        let answer = client.chat(&format!("{origin}authorization: Bearer zk-team\r\n"), body("1"));
        assert_eq!(
            (answer.status, cors(&answer)),
            (200, vec![("vary", "accept"), ("vary", "origin")]),
            "{origin}"
        );
    }
    zap.wait_until_idle();
}

#[test]
fn a_star_stands_for_all_origins() {
    let a = own_site();
    let zap = Zap::with("[server]\ncors_origins = [\"*\"]\n", &[a.backend("a", "")]);
    for origin in ["https://any.example", "null", "app://x"] {
        let answer = zap.client().chat(&format!("origin: {origin}\r\nsec-fetch-site: cross-site\r\n"), CHAT);
        assert_eq!(answer.status, 200, "{origin}");
        assert_readable(&answer, "*", origin);
        let answer = send(&zap, "OPTIONS /chat", &format!("origin: {origin}\r\n{PREFLIGHT}"));
        assert_eq!(answer.status, 204, "{origin}");
        assert_readable(&answer, "*", origin);
    }
    assert_eq!(zap.client().chat("sec-fetch-site: cross-site\r\n", CHAT).status, 200);
}

#[test]
fn without_client_keys_a_foreign_page_is_refused_but_at_probes() {
    let a = own_site();
    let host = "zap.example:8000";
    for (settings, listed) in [("", false), (LISTED, true)] {
        let zap = Zap::with(settings, &[a.backend("a", "")]);
        let foreign = [
            "origin: https://other.example\r\n".to_owned(),
            "origin: null\r\n".to_owned(),
            "origin: http://zap.example\r\n".to_owned(),
            "origin: http://zap.example:8001\r\n".to_owned(),
            format!("origin: app://{host}\r\n"),
            "sec-fetch-site: cross-site\r\n".to_owned(),
            "sec-fetch-site: cross-site\r\nsec-fetch-mode: navigate\r\n".to_owned(),
            format!("origin: https://other.example\r\n{PREFLIGHT}"),
        ];
        for headers in &foreign {
            for line in [
                "POST /chat",
                "OPTIONS /chat",
                "GET /v1/models",
                "GET /status",
                "GET /metrics",
                "GET /usage",
                "GET /nothing",
                "HEAD /v1/models",
            ] {
                let mut client = zap.client();
                client.send(format!("{line} HTTP/1.1\r\nhost: {host}\r\n{headers}\r\n"));
                let mut answer = client.head();
                assert_eq!(answer.status, 403, "{line} {headers}");
                assert_eq!(cors(&answer).is_empty(), !listed, "{line} {headers}");
                assert_eq!(answer.header("access-control-allow-origin"), None, "{line} {headers}");
                if !line.starts_with("HEAD") {
                    client.body(&mut answer);
                    assert_eq!(answer.code(), "origin_not_allowed", "{line} {headers}");
                }
            }
            for path in ["/health", "/ready"] {
                assert_eq!(send(&zap, &format!("GET {path}"), headers).status, 200, "{path} {headers}");
            }
        }
        let refused = zap.metric("zap_rejected_total{reason=\"origin_not_allowed\"}");
        assert_eq!(refused, 8.0 * foreign.len() as f64);
        for headers in [
            "",
            "origin: http://zap.example:8000\r\nsec-fetch-site: same-origin\r\n",
            "origin: https://zap.example:8000\r\n",
            "origin: http://ZAP.example:8000\r\nsec-fetch-site: cross-site\r\n",
            "sec-fetch-site: none\r\n",
            "sec-fetch-site: same-origin\r\n",
            // Node's fetch.
            "sec-fetch-mode: cors\r\n",
        ] {
            assert_eq!(send(&zap, "GET /v1/models", headers).status, 200, "{headers}");
        }
        let page = "origin: https://app.example\r\nsec-fetch-site: cross-site\r\n";
        assert_eq!(send(&zap, "GET /v1/models", page).status, if listed { 200 } else { 403 });
        zap.wait_until_idle();
    }
    assert_eq!(a.count(), 0);
}

#[test]
fn a_host_that_is_not_allowed_is_misdirected() {
    let a = Provider::named("a");
    let hosts = "[server]\nallowed_hosts = [\"zap.example\", \"B:8000\", \"[::1]\", \"127.0.0.1\"]\n";
    for settings in [hosts.to_owned(), format!("{hosts}{KEYS}")] {
        let zap = Zap::with(&settings, &[a.backend("a", "")]);
        let ask = |host: &str, line: &str| {
            let mut client = zap.client();
            client.send(format!("{line} HTTP/1.1\r\nhost: {host}\r\n\r\n"));
            client.response()
        };
        for host in ["zap.example", "ZAP.Example:1234", "b:8000", "[::1]:8000", "127.0.0.1:8000"] {
            assert_ne!(ask(host, "GET /status").status, 421, "{host}");
        }
        for host in ["evil.example", "evil.example:8000", "b", "b:80", "[::2]", "127.0.0.2", "x.zap.example"]
        {
            for line in ["GET /status", "GET /metrics", "POST /chat", "GET /v1/models", "GET /nothing"] {
                let answer = ask(host, line);
                let got = (answer.status, answer.code());
                assert_eq!(got, (421, "misdirected_request".to_owned()), "{host} {line}");
            }
            for path in ["/health", "/ready"] {
                assert_eq!(ask(host, &format!("GET {path}")).status, 200, "{host} {path}");
            }
        }
        let mut old = zap.client();
        old.send("GET /status HTTP/1.0\r\n\r\n");
        assert_eq!(old.response().status, 421);
    }
    assert_eq!(a.count(), 0);
}

#[test]
fn a_reload_leaves_the_origins_as_they_are() {
    let a = Provider::named("a");
    let file = File::new();
    let zap = Zap::with_file(&file, LISTED, &[a.backend("a", "")]);
    file.write("", &[a.backend("a", "")]);
    assert!(zap.reload());
    let answer = zap.client().chat("origin: https://app.example\r\n", CHAT);
    assert_eq!(answer.status, 200);
    assert_readable(&answer, "https://app.example", "after a reload");
}

#[test]
#[cfg(debug_assertions)]
fn a_page_reads_the_answer_to_a_request_that_panicked() {
    let a = Provider::named("a");
    let zap = Zap::with(LISTED, &[a.backend("a", "")]);
    zap::internals::failpoint::arm_panic("try", http::HeaderValue::from_static("bug-cors"));
    let answer = zap.client().chat("origin: app://obsidian.md\r\nx-request-id: bug-cors\r\n", CHAT);
    assert_eq!((answer.status, answer.code().as_str()), (500, "internal_error"));
    assert_readable(&answer, "app://obsidian.md", "a panic");
    zap.wait_until_idle();
}
