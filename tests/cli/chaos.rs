//! `zap demo --chaos`: one of three providers fails each request in another way, and no client notices.

use std::io::Read as _;
use std::process::Stdio;

use super::{CHAT, Running, ask, zap};

/// More requests than chaos needs to fail in each of its ways.
const MAX_REQUESTS: usize = 2000;

fn start() -> Running {
    let mut command = zap();
    command.args(["demo", "--chaos", "--port", "0"]).stdout(Stdio::piped());
    Running::start(&mut command)
}

/// Sends chats until chaos has got `ways` of them. Returns what was wrong with the responses.
fn unrescued(demo: &Running, body: &str, ways: usize, end: &str) -> Vec<String> {
    let (mut rescued, mut wrong) = (0, Vec::new());
    for _ in 0..MAX_REQUESTS {
        if rescued + wrong.len() >= ways {
            return wrong;
        }
        let response = ask(demo.address, "POST /v1/chat/completions HTTP/1.1", body);
        let is_good = response.starts_with("HTTP/1.1 200 ")
            && response.contains("\"Hello ")
            && response.ends_with(end)
            && !response.contains("x-mock-failure");
        if !is_good {
            let name = response.split("x-mock-failure: ").nth(1).and_then(|rest| rest.lines().next());
            wrong.push(name.map_or(response.clone(), str::to_owned));
        } else if response.contains("x-zap-attempts: 2\r\n") {
            rescued += 1;
        } else {
            assert!(response.contains("x-zap-attempts: 1\r\n"), "{response}");
        }
    }
    panic!("chaos got {} of {ways} requests", rescued + wrong.len());
}

#[test]
fn no_chat_notices_that_a_provider_fails_in_every_way() {
    let demo = start();
    let wrong = unrescued(&demo, CHAT, 9, "}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_stream_notices_that_a_provider_fails_in_every_way() {
    let demo = start();
    let wrong = unrescued(&demo, "{\"stream\":true,\"messages\":[]}", 10, "data: [DONE]\n\n\r\n0\r\n\r\n");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_chaos_demo_prints_what_fails_and_keeps_the_provider_that_fails() {
    let mut demo = start();
    let mut asked = 0;
    // Chaos fails more often in a row than ejects a backend by default.
    while asked < 5 {
        let response = ask(demo.address, "POST /chat HTTP/1.1", CHAT);
        let is_from_chaos = response.contains("x-mock-failure");
        asked += usize::from(is_from_chaos || response.contains("x-zap-attempts: 2\r\n"));
    }
    let metrics = ask(demo.address, "GET /metrics HTTP/1.1", "");
    assert!(metrics.contains("\nzap_backend_up{backend=\"chaos\"} 1\n"), "{metrics}");
    assert!(metrics.lines().any(|l| l.starts_with("zap_retries_total{backend=\"chaos\"")), "{metrics}");
    let page = ask(demo.address, "GET / HTTP/1.1\r\naccept: text/html", "");
    demo.signal("INT");
    assert_eq!(demo.exit_code(), Some(0));
    let mut printed = String::new();
    demo.child.0.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
    for part in
        ["HTTP 500", "an error event in a 200", "stalled before the head", "x-zap-attempts", "The page "]
    {
        assert!(printed.contains(part), "{printed}");
    }
    assert!(printed.contains(&format!("curl -s http://{}/metrics | grep", demo.address)), "{printed}");
    assert!(printed.contains(&format!("The page http://{}/ shows", demo.address)), "{printed}");
    // What was seen on the page: chaos failed, and another provider served the request.
    assert!(page.contains("<strong>chaos</strong>: ") && page.contains(" has served it"), "{page}");
}
