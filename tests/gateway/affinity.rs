//! A conversation stays with its backend.

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
fn a_hundred_conversations_of_twenty_turns_stay_and_spread() {
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
        // All hundred are in flight at once; each comes when the one before has its place.
        for (n, client) in clients.iter_mut().enumerate() {
            client.post("/v1/chat/completions", "", turn(n, t));
            eventually("it is being served", || gate.waiting() == n + 1);
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
    zap.is_clean();
}

#[test]
fn whoever_goes_loses_its_own_conversations_alone() {
    let (mut providers, mut backends) = named(&["a", "b", "c"]);
    let homes = |backends: &[String]| -> Vec<String> {
        let zap = Zap::with(STICKY, backends);
        (0..60).map(|n| zap.chat(turn(n, 0)).header("x-zap-backend").unwrap().to_owned()).collect()
    };
    let before = homes(&backends);
    backends[1] = backend(Provider::nobody(), "b", "");
    let after = homes(&backends);
    for (before, after) in before.iter().zip(&after) {
        assert!(before == "b" && after != "b" || before == after, "{before} to {after}");
    }
    assert!(before.iter().any(|home| home == "b"));
    // Another process with the list in another order agrees.
    backends[1] = providers.remove(1).backend("b", "");
    backends.reverse();
    // (The provider that was taken out of the list has gone with it: start it anew.)
    let fresh = Provider::named("b");
    backends[1] = fresh.backend("b", "");
    assert_eq!(homes(&backends), before);
}

#[test]
fn a_session_header_a_cache_key_and_a_user_name_the_conversation() {
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
    assert!(homes("", "") > 1, "twelve conversations are not at home at one backend");
    assert_eq!(homes("x-zap-session: s1\r\n", ""), 1);
    assert_eq!(homes("", ",\"prompt_cache_key\":\"k1\""), 1);
    assert_eq!(homes("", ",\"user\":\"u1\""), 1);
    let twice = zap.chat("{\"messages\":[],\"user\":\"a\",\"user\":\"b\"}");
    assert_eq!((twice.status, twice.code().as_str()), (400, "duplicate_key"));
    let other_case = zap.chat("{\"messages\":[],\"U\u{17f}er\":\"a\"}");
    assert_eq!((other_case.status, other_case.code().as_str()), (400, "duplicate_key"));
}

#[test]
fn what_names_no_conversation_goes_round() {
    let (providers, backends) = named(&["a", "b"]);
    let zap = Zap::with(STICKY, &backends);
    let mut client = zap.client();
    for _ in 0..4 {
        client.post("/v1/embeddings", "", "{\"model\":\"m\",\"input\":\"x\"}");
        assert_eq!(client.response().status, 200);
    }
    assert_eq!((providers[0].count(), providers[1].count()), (2, 2));
}
