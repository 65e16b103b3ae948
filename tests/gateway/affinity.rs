//! `prefix_hash`: all turns of a conversation go to the same backend.

use std::collections::HashMap;

use crate::support::provider::{After, Gate, backend, reply};
use crate::support::{Provider, Zap, eventually};

const STICKY: &str =
    "[load_balancer]\nstrategy = \"prefix_hash\"\n[health]\nfailure_threshold = 1\ninterval_secs = 600\n";

/// Turn number `turn` of conversation number `n`: all messages so far.
fn turn(n: usize, turn: usize) -> String {
    let mut messages = vec![
        "{\"role\":\"system\",\"content\":\"You are terse.\"}".to_owned(),
        format!("{{\"role\":\"user\",\"content\":\"conversation {n}\"}}"),
    ];
    for i in 0..turn {
        messages.push(format!("{{\"role\":\"assistant\",\"content\":\"answer {i}\"}}"));
        messages.push(format!("{{\"role\":\"user\",\"content\":\"question {i}\"}}"));
    }
    format!("{{\"model\":\"m\",\"messages\":[{}]}}", messages.join(","))
}

fn named(names: &[&'static str]) -> (Vec<Provider>, Vec<String>) {
    let providers: Vec<_> = names.iter().map(|name| Provider::named(name)).collect();
    let backends = providers.iter().zip(names).map(|(p, name)| p.backend(name, "")).collect();
    (providers, backends)
}

#[test]
fn conversations_stay_on_their_backend_and_load_is_spread() {
    const CONVERSATIONS: usize = 100;
    let gate = Gate::default();
    let names = ["a", "b", "c", "d"];
    let providers = names.map(|name| {
        let held = gate.clone();
        Provider::start(move |_, stream| {
            held.pass();
            reply(stream, 200, "", name.as_bytes());
            After::Keep
        })
    });
    let backends: Vec<_> = providers.iter().zip(names).map(|(p, name)| p.backend(name, "")).collect();
    let zap = Zap::with(STICKY, &backends);
    let mut clients: Vec<_> = (0..CONVERSATIONS).map(|_| zap.client()).collect();
    let mut homes = vec![String::new(); CONVERSATIONS];
    let (mut stayed, mut load) = (0, HashMap::<String, usize>::new());
    for t in 0..20 {
        // All hundred requests are in flight at once; each is sent after the previous one has reached its backend.
        for (n, client) in clients.iter_mut().enumerate() {
            client.post("/v1/chat/completions", "", turn(n, t));
            eventually("the request is at its backend", || gate.waiting() == n + 1);
        }
        gate.open(CONVERSATIONS);
        for (n, client) in clients.iter_mut().enumerate() {
            let answer = client.response();
            let by = answer.header("x-zap-backend").unwrap().to_owned();
            stayed += usize::from(t == 0 || by == homes[n]);
            if t == 0 {
                homes[n] = by.clone();
            }
            *load.entry(by).or_default() += 1;
        }
    }
    let most = *load.values().max().unwrap();
    assert!(stayed * 100 >= 95 * 20 * CONVERSATIONS, "{stayed} of {} stayed", 20 * CONVERSATIONS);
    assert!(most * 10 <= 13 * 20 * CONVERSATIONS / names.len(), "{load:?}");
    zap.wait_until_idle();
}

#[test]
fn removing_a_backend_moves_its_own_conversations_only() {
    let (mut providers, mut backends) = named(&["a", "b", "c"]);
    let homes = |backends: &[String]| -> Vec<String> {
        let zap = Zap::with(STICKY, backends);
        (0..60).map(|n| zap.chat(turn(n, 0)).header("x-zap-backend").unwrap().to_owned()).collect()
    };
    let before = homes(&backends);
    backends[1] = backend(Provider::closed_port(), "b", "");
    let after = homes(&backends);
    for (before, after) in before.iter().zip(&after) {
        assert!(before == "b" && after != "b" || before == after, "{before} to {after}");
    }
    assert!(before.iter().any(|home| home == "b"));
    // A second process that lists the backends in another order picks the same ones.
    backends[1] = providers.remove(1).backend("b", "");
    backends.reverse();
    // `providers.remove` stopped the old provider b, so a new one takes its place.
    let fresh = Provider::named("b");
    backends[1] = fresh.backend("b", "");
    assert_eq!(homes(&backends), before);
}

#[test]
fn a_session_header_a_cache_key_or_a_user_identifies_the_conversation() {
    let (_providers, backends) = named(&["a", "b", "c", "d"]);
    let zap = Zap::with(STICKY, &backends);
    let homes = |headers: &str, more: &str| {
        let ask = |n| format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"{n}\"}}]{more}}}");
        let home = |n| zap.client().chat(headers, ask(n)).header("x-zap-backend").unwrap().to_owned();
        let mut homes: Vec<_> = (0..12).map(home).collect();
        homes.sort();
        homes.dedup();
        homes.len()
    };
    assert!(homes("", "") > 1, "twelve conversations are spread over several backends");
    for header in ["x-zap-session", "x-claude-code-session-id", "session-id", "thread-id"] {
        assert_eq!(homes(&format!("{header}: s1\r\n"), ""), 1, "{header}");
    }
    assert_eq!(homes("x-zap-session:\r\nthread-id: s1\r\n", ""), 1, "an empty one identifies nothing");
    assert_eq!(homes("", ",\"prompt_cache_key\":\"k1\""), 1);
    assert_eq!(homes("", ",\"user\":\"u1\""), 1);
    let twice = zap.chat("{\"messages\":[],\"user\":\"a\",\"user\":\"b\"}");
    assert_eq!((twice.status, twice.code().as_str()), (400, "duplicate_key"));
    let other_case = zap.chat("{\"messages\":[],\"U\u{17f}er\":\"a\"}");
    assert_eq!((other_case.status, other_case.code().as_str()), (400, "duplicate_key"));
}

#[test]
fn requests_without_a_conversation_use_round_robin() {
    let (providers, backends) = named(&["a", "b"]);
    let zap = Zap::with(STICKY, &backends);
    let mut client = zap.client();
    for _ in 0..4 {
        client.post("/v1/embeddings", "", "{\"model\":\"m\",\"input\":\"x\"}");
        assert_eq!(client.response().status, 200);
    }
    assert_eq!((providers[0].count(), providers[1].count()), (2, 2));
}

/// Each API has its own place for the conversation, and its users.
#[test]
fn conversations_of_every_api_stay_on_their_backend() {
    let names = ["a", "b", "c", "d"];
    let providers = names.map(Provider::named);
    let both = "protocols = [\"openai\", \"anthropic\"]";
    let backends: Vec<_> = providers.iter().zip(names).map(|(p, name)| p.backend(name, both)).collect();
    let zap = Zap::with(STICKY, &backends);
    let mut client = zap.client();
    let first = |n: usize| format!("{{\"role\":\"user\",\"content\":\"conversation {n}\"}}");
    type Body<'a> = &'a dyn Fn(usize, usize) -> String;
    let apis: [(&str, Body<'_>); 5] = [
        ("/v1/responses", &|n, turn| {
            let later = ",{\"role\":\"user\",\"content\":\"x\"}".repeat(turn);
            format!("{{\"model\":\"m\",\"input\":[{}{later}]}}", first(n))
        }),
        ("/v1/responses", &|n, turn| format!("{{\"model\":\"m\",\"input\":\"question {n}\",\"n\":{turn}}}")),
        ("/v1/completions", &|n, turn| format!("{{\"model\":\"m\",\"prompt\":\"prompt {n}\",\"n\":{turn}}}")),
        ("/v1/messages", &|n, turn| {
            let later = ",{\"role\":\"user\",\"content\":\"x\"}".repeat(turn);
            format!("{{\"model\":\"m\",\"messages\":[{}{later}]}}", first(n))
        }),
        ("/v1/messages", &|n, turn| {
            format!(
                "{{\"model\":\"m\",\"messages\":[{}],\"metadata\":{{\"user_id\":\"session {n}\"}}}}",
                first(turn)
            )
        }),
    ];
    for (i, (path, body)) in apis.iter().enumerate() {
        let mut homes = std::collections::HashSet::new();
        for n in 0..20 {
            let of_turn: Vec<_> = (0..3)
                .map(|turn| {
                    client.post(path, "", body(n, turn));
                    client.response().text().to_owned()
                })
                .collect();
            assert!(of_turn.iter().all(|home| *home == of_turn[0]), "{i} {path}: {of_turn:?}");
            homes.extend(of_turn);
        }
        assert!(homes.len() > 1, "{i} {path}: all conversations are at {homes:?}");
    }
}
