//! Chunked request bodies: the connection stays open behind them, and no byte of a body is ever read as a request.

use crate::support::{CHAT, Client, Provider, Zap};

const HEAD: &str = "POST /chat HTTP/1.1\r\nhost: zap\r\ntransfer-encoding: chunked\r\n\r\n";

const HEALTH: &str = "GET /health HTTP/1.1\r\nhost: a\r\n\r\n";

/// `body` in chunks of `size` bytes, without a head.
fn chunks(body: &str, size: usize) -> String {
    let pieces = body.as_bytes().chunks(size).map(|p| (p.len(), String::from_utf8_lossy(p)));
    let pieces: String = pieces.map(|(n, piece)| format!("{n:X}\r\n{piece}\r\n")).collect();
    format!("{pieces}0\r\n\r\n")
}

fn assert_ok(client: &mut Client, body: &str, what: &str) {
    let answer = client.response();
    assert_eq!((answer.status, answer.header("connection")), (200, None), "{what}");
    assert!(answer.text() == body, "{what}");
}

#[test]
fn a_connection_serves_many_chunked_requests() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let mut client = zap.client();
    let large = format!("{{\"messages\":[\"{}\"]}}", "x".repeat(200_000));
    for (body, size) in [(CHAT, 1), (CHAT, 1000), (&large, 70_000), (&large, 7), (&large, 8192), (CHAT, 3)] {
        // The head alone, then the chunks, then the end alone, as most clients send it.
        let text = chunks(body, size);
        let (data, end) = text.split_at(text.len() - 5);
        for part in [HEAD, data, end] {
            client.send(part);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        assert_ok(&mut client, body, &format!("{} in chunks of {size}", body.len()));
        client.send([HEAD, &text].concat());
        assert_ok(&mut client, body, &format!("{} in chunks of {size}, at once", body.len()));
    }
    assert_eq!(client.get("/health").status, 200);
    zap.wait_until_idle();
}

#[test]
fn chunked_requests_may_be_pipelined_and_cut_anywhere() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    // A head that is larger than hyper's first buffer, and trailers.
    let wide = format!(
        "POST /chat HTTP/1.1\r\nhost: zap\r\nx: {}\r\ntransfer-encoding: chunked\r\n\r\n",
        "y".repeat(20_000)
    );
    let trailers = chunks(CHAT, 4).replace("0\r\n\r\n", "0;a=b\r\nhost: x\r\ncontent-length: 3\r\n\r\n");
    let one = format!("{HEAD}{}{HEALTH}{wide}{}{HEAD}{trailers}", chunks(CHAT, 5), chunks(CHAT, 9));
    let check = |client: &mut Client, what: &str| {
        assert_ok(client, CHAT, what);
        assert_eq!(client.response().text(), "{\"status\":\"ok\"}", "{what}");
        assert_ok(client, CHAT, what);
        assert_ok(client, CHAT, what);
    };
    let mut client = zap.client();
    client.send([one.as_str(), &one].concat());
    check(&mut client, "at once");
    check(&mut client, "at once, again");
    for size in [1, 2, 3, 1000, 4096, 20_000] {
        for part in one.as_bytes().chunks(size) {
            client.send(part);
        }
        check(&mut client, &format!("in pieces of {size}"));
    }
    zap.wait_until_idle();
}

#[test]
fn a_chunked_request_that_is_refused_keeps_its_connection_if_it_is_whole() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    for (path, body) in [
        ("/nothing", CHAT),
        ("/health", CHAT),
        ("/v1/chat/completions", "[]"),
        ("/v1/chat/completions", "{\"messages\":1}"),
        ("/v1/chat/completions", "x{\"a\":1}"),
    ] {
        let head = format!("POST {path} HTTP/1.1\r\nhost: zap\r\ntransfer-encoding: chunked\r\n\r\n");
        for size in [1, 4, 100] {
            let mut client = zap.client();
            client.send([&head, &chunks(body, size), HEALTH].concat());
            let refused = client.response();
            assert!(refused.status >= 400, "{path} {body}");
            assert_eq!(refused.header("connection"), None, "{path} {body} {size}");
            assert_eq!(client.response().text(), "{\"status\":\"ok\"}", "{path} {body} {size}");
        }
        // Without its end the beginning of the next request is unknown.
        let mut client = zap.client();
        client.send([&head, "3\r\nx x\r\n"].concat());
        let refused = client.response();
        assert_eq!(refused.header("connection"), Some("close"), "{path} {body}");
        client.try_send(["0\r\n\r\n", HEALTH].concat());
        assert_eq!(client.rest().0, b"", "{path} {body}");
    }
    assert_eq!(provider.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn a_body_that_breaks_the_coding_is_refused_and_nothing_behind_it_is_read() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let size = format!("{:x}", CHAT.len());
    let whole = chunks(CHAT, 1000);
    for body in [
        // Bare LF and bare CR, where a lenient reader sees the end of a line.
        whole.replace("\r\n", "\n"),
        format!("{size}\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size}\r{CHAT}\r\n0\r\n\r\n"),
        format!("{size}\r\n{CHAT}\n0\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\n\n"),
        format!("{size}\r\n{CHAT}\r\n0\r\n\n"),
        format!("{size};a\nb\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size};a\rb\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size};\0\r\n{CHAT}\r\n0\r\n\r\n"),
        // Sizes that two readers see differently.
        format!("0x{size}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("+{size}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("-1\r\n{CHAT}\r\n0\r\n\r\n"),
        format!(" {size}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size} 0\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{size}_0\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("100000000000000{size}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("000000000000000{size}\r\n{CHAT}\r\n0\r\n\r\n"),
        format!("{:x}\r\n{CHAT}\r\n0\r\n\r\n", CHAT.len() - 1),
        format!("{:x}\r\n{CHAT}\r\n0\r\n\r\n", CHAT.len() + 1),
        format!("\r\n{whole}"),
        // Trailers.
        format!("{size}\r\n{CHAT}\r\n0\r\nx\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\r\nx : y\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\r\nx: y\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\r\nx: y\r\n folded\r\n\r\n"),
        format!("{size}\r\n{CHAT}\r\n0\r\nGET / HTTP/1.1\r\n\r\n"),
    ] {
        for pause in [false, true] {
            let mut client = zap.client();
            if pause {
                client.send(HEAD);
                std::thread::sleep(std::time::Duration::from_millis(2));
                client.try_send(format!("{body}{HEALTH}"));
            } else {
                client.send(format!("{HEAD}{body}{HEALTH}"));
            }
            let answer = client.response();
            assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"), "{body:?}");
            assert_eq!(answer.header("connection"), Some("close"), "{body:?}");
            assert_eq!(client.rest().0, b"", "{body:?}");
        }
    }
    // A broken end of a request that is refused for another reason.
    let mut client = zap.client();
    client.send(format!(
        "POST /nothing HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\n\n{HEALTH}"
    ));
    let answer = client.response();
    assert_eq!((answer.status, answer.header("connection")), (404, Some("close")));
    assert_eq!(client.rest().0, b"");
    assert_eq!(provider.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn a_request_inside_a_chunked_body_is_data() {
    let provider = Provider::echo();
    let zap = Zap::with("", &[provider.backend("a", "")]);
    let inner = "POST /chat HTTP/1.1\\r\\nhost: b\\r\\n\\r\\n0\\r\\n\\r\\n";
    // White space around the JSON has the bytes of an end.
    let body = format!("\r\n\r\n{{\"messages\":[\"{inner}\"]}}\r\n\r\n");
    let mut client = zap.client();
    for size in [1, 2, 16, 500] {
        client.send([HEAD, &chunks(&body, size), HEALTH].concat());
        assert_ok(&mut client, &body, "the body as it came");
        assert_eq!(client.response().text(), "{\"status\":\"ok\"}");
    }
    assert_eq!(provider.count(), 4);
    zap.wait_until_idle();
}
