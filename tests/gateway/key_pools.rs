//! Backends with several keys: each key has its own limits and its own state, and the backend has one share and one
//! try.

use std::collections::BTreeMap;

use crate::support::provider::{After, Gate, Seen, reply};
use crate::support::{CHAT, Provider, Response, Zap, eventually};

const NO_CHECKS: &str = "[health]\ninterval_secs = 600\n";
const JSON: &str = "content-type: application/json\r\n";

/// The number of the key in a request: of `sk-CANARY-key-1` it is 1.
fn key(seen: &Seen) -> usize {
    let key = seen.header("authorization").unwrap();
    key.strip_prefix("Bearer sk-CANARY-key-").unwrap().parse().unwrap()
}

/// The line of a pool of so many keys.
fn pool(keys: usize) -> String {
    let keys: Vec<_> = (1..=keys).map(|n| format!("\"sk-CANARY-key-{n}\"")).collect();
    format!("api_keys = [{}]\n", keys.join(", "))
}

/// A provider that answers each key with the status that `status` returns for it.
fn by_key(status: impl Fn(usize) -> u16 + Send + Sync + 'static) -> Provider {
    Provider::start(move |seen, stream| {
        let headers = format!("{JSON}retry-after: 50\r\n");
        reply(stream, status(key(seen)), &headers, format!("\"{}\"", key(seen)).as_bytes());
        After::Keep
    })
}

fn backend_of(response: &Response) -> String {
    assert_eq!(response.status, 200, "{}", response.text());
    response.header("x-zap-backend").unwrap().to_owned()
}

fn states(zap: &Zap) -> BTreeMap<String, String> {
    let status = zap.client().get("/status");
    assert!(!status.text().contains("CANARY"));
    let text = |b: &serde_json::Value, name: &str| b[name].as_str().unwrap().to_owned();
    let status = status.json();
    status["backends"].as_array().unwrap().iter().map(|b| (text(b, "name"), text(b, "state"))).collect()
}

#[test]
fn the_keys_share_the_weight_of_their_backend_in_turn() {
    let (a, b) = (by_key(|_| 200), Provider::named("b"));
    let route = "[models.r]\ntargets = [{ backend = \"a\", model = \"m\", weight = 2 }, { backend = \"b\", model = \"m\", weight = 1 }]\n";
    let zap = Zap::with(&format!("{NO_CHECKS}{route}"), &[a.backend("a", &pool(3)), b.backend("b", "")]);
    for (model, want) in [("m", [20, 20, 20, 60]), ("r", [40, 40, 40, 60])] {
        let sum: usize = want.iter().sum();
        let mut counts = BTreeMap::new();
        for _ in 0..sum {
            let body = CHAT.replacen('{', &format!("{{\"model\":\"{model}\","), 1);
            *counts.entry(backend_of(&zap.chat(body))).or_insert(0) += 1;
        }
        let want: BTreeMap<_, _> =
            ["a#1", "a#2", "a#3", "b"].map(str::to_owned).into_iter().zip(want).collect();
        assert_eq!(counts, want, "{model}");
    }
    let sent: Vec<_> = a.seen().iter().map(key).collect();
    assert!((1..=3).all(|key| sent.contains(&key)));
}

#[test]
fn under_least_loaded_the_keys_have_the_load_of_their_backend_together() {
    let gate = Gate::default();
    let (a, b) = (Provider::gated(&gate), Provider::gated(&gate));
    let settings = format!("{NO_CHECKS}[load_balancer]\nstrategy = \"least_loaded\"\n");
    let zap = Zap::with(&settings, &[a.backend("a", &pool(3)), b.backend("b", "")]);
    let mut clients: Vec<_> = (0..12).map(|_| zap.client()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.post("/chat", "", CHAT);
        eventually("the request is at its backend", || gate.waiting() == n + 1);
    }
    assert_eq!((a.count(), b.count()), (6, 6));
    let counts = a.seen().iter().map(key).fold([0; 3], |mut counts, key| {
        counts[key - 1] += 1;
        counts
    });
    assert_eq!(counts, [2, 2, 2]);
    gate.open(12);
    clients.iter_mut().for_each(|client| assert_eq!(client.response().status, 200));
}

#[test]
fn a_key_that_is_limited_or_refused_is_passed_over_and_costs_no_try() {
    for status in [429, 401] {
        let a = by_key(move |key| if key < 4 { status } else { 200 });
        let zap = Zap::with(&format!("{NO_CHECKS}[retry]\nmax_retries = 0\n"), &[a.backend("a", &pool(4))]);
        let first = zap.chat(CHAT);
        assert_eq!(backend_of(&first), "a#4", "{status}");
        assert!((0..5).all(|_| backend_of(&zap.chat(CHAT)) == "a#4"));
        let state = if status == 429 { "cooling" } else { "unauthorized" };
        let tried = a.seen().iter().map(key).filter(|key| *key < 4).count();
        let out = states(&zap).values().filter(|found| *found == state).count();
        assert_eq!((out, states(&zap)["a#4"].as_str()), (tried, "healthy"), "{status}");
        assert!((1..=3).contains(&tried), "each is asked once: {tried}");
    }
}

#[test]
fn a_failure_of_the_backend_goes_to_another_backend_and_not_to_another_key() {
    let (a, b) = (by_key(|_| 500), Provider::named("b"));
    let zap = Zap::with(NO_CHECKS, &[a.backend("a", &pool(5)), b.backend("b", "priority = 1")]);
    for n in 1..=4 {
        assert_eq!(backend_of(&zap.chat(CHAT)), "b");
        assert!(a.count() <= n, "{} at the first backend after {n}", a.count());
    }
}

#[test]
fn each_key_has_its_own_quota_and_all_share_the_requests_at_once() {
    let gate = Gate::default();
    let a = Provider::gated(&gate);
    let more = format!("{}requests_per_minute = 2\nmax_in_flight = 3\n", pool(2));
    let zap = Zap::with(&format!("{NO_CHECKS}[queue]\nmax_wait_secs = 1\n"), &[a.backend("a", &more)]);
    let mut clients: Vec<_> = (0..4).map(|_| zap.client()).collect();
    clients.iter_mut().for_each(|client| client.post("/chat", "", CHAT));
    eventually("three are at the backend", || gate.waiting() == 3);
    eventually("one waits", || zap.metric("zap_queue_depth") == 1.0);
    gate.open(4);
    clients.iter_mut().for_each(|client| assert_eq!(client.response().status, 200));
    let mut keys: Vec<_> = a.seen().iter().map(key).collect();
    keys.sort_unstable();
    assert_eq!(keys, [1, 1, 2, 2]);
    let refused = zap.chat(CHAT);
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (429, "upstream_rate_limited"),
        "both quotas are used"
    );
}

#[test]
fn a_conversation_stays_with_its_key_and_a_reload_keeps_the_state_of_each_key() {
    let a = by_key(|key| if key == 2 { 401 } else { 200 });
    let file = crate::support::File::new();
    let settings = format!("{NO_CHECKS}[load_balancer]\nstrategy = \"prefix_hash\"\n");
    let zap = Zap::with_file(&file, &settings, &[a.backend("a", &pool(3))]);
    let mut homes = std::collections::HashSet::new();
    for n in 0..30 {
        let body = CHAT.replace("hi", &format!("conversation {n}"));
        let home = backend_of(&zap.chat(&body));
        assert_eq!(backend_of(&zap.chat(&body)), home);
        homes.insert(home);
    }
    assert_eq!(homes.len(), 2, "{homes:?}");
    assert_eq!(states(&zap)["a#2"], "unauthorized");
    // A fourth key changes nothing for the others.
    file.write(&settings, &[a.backend("a", &pool(4))]);
    assert!(zap.reload());
    let now = states(&zap);
    assert_eq!((now["a#2"].as_str(), now["a#4"].as_str()), ("unauthorized", "healthy"));
}

#[test]
fn the_keys_share_the_budget_of_their_backend() {
    let a = Provider::start(|seen, stream| {
        assert!(key(seen) > 0);
        let body = "{\"choices\":[{\"message\":{\"content\":\"x\"}}],\"usage\":{\"prompt_tokens\":100,\"completion_tokens\":0}}";
        reply(stream, 200, JSON, body.as_bytes());
        After::Keep
    });
    let more = format!(
        "{}models = [\"m\"]\nprices = {{ m = {{ input = 10000, output = 0 }} }}\nbudget = {{ usd = 3, per = \"month\" }}\n",
        pool(2)
    );
    let zap = Zap::with(NO_CHECKS, &[a.backend("a", &more)]);
    let body = CHAT.replacen('{', "{\"model\":\"m\",\"max_tokens\":1,", 1);
    // Each answer costs 1 USD.
    let keys: Vec<_> = (0..3).map(|_| backend_of(&zap.chat(&body))).collect();
    assert!(keys.contains(&"a#1".to_owned()) && keys.contains(&"a#2".to_owned()), "{keys:?}");
    assert_eq!(zap.chat(&body).status, 429);
    let usage = zap.client().get("/usage?by=backend").json();
    let text = usage.to_string();
    assert!(text.contains("\"backend\":\"a\"") && !text.contains("a#"), "{text}");
}

#[test]
fn a_full_backend_uses_all_its_keys() {
    for strategy in ["round_robin", "least_loaded", "prefix_hash"] {
        let a = by_key(|_| 200);
        let settings = format!("{NO_CHECKS}[load_balancer]\nstrategy = \"{strategy}\"\n");
        let zap = Zap::with(&settings, &[a.backend("a", &(pool(4) + "max_in_flight = 2\n"))]);
        std::thread::scope(|scope| {
            for client in 0..8 {
                let zap = &zap;
                scope.spawn(move || {
                    for n in 0..10 {
                        let body = CHAT.replace("hi", &format!("conversation {client} {n}"));
                        assert_eq!(zap.chat(body).status, 200);
                    }
                });
            }
        });
        let counts = a.seen().iter().map(key).fold([0; 4], |mut counts, key| {
            counts[key - 1] += 1;
            counts
        });
        assert!(counts.iter().all(|count| *count >= 5), "{strategy}: {counts:?}");
    }
}

#[test]
fn a_backend_that_always_fails_is_ejected_by_all_its_keys() {
    let a = Provider::fixed(500, "", "no");
    let settings =
        format!("{NO_CHECKS}failure_threshold = 2\n[retry]\nbase_delay_ms = 1\nmax_delay_ms = 1\n");
    let zap = Zap::with(&settings, &[a.backend("a", &pool(2))]);
    eventually("both keys are out", || {
        assert_eq!(zap.chat(CHAT).status, 500);
        states(&zap).values().all(|state| state == "ejected")
    });
}

#[test]
fn a_reload_keeps_the_state_of_a_key_whose_number_changes() {
    let a = by_key(|key| if key == 2 { 401 } else { 200 });
    let file = crate::support::File::new();
    let more = |keys: &str| a.backend("a", &format!("api_keys = [{keys}]\nrequests_per_minute = 2\n"));
    let of = |numbers: &[u32]| {
        let keys: Vec<_> = numbers.iter().map(|n| format!("\"sk-CANARY-key-{n}\"")).collect();
        more(&keys.join(", "))
    };
    let settings = format!("{NO_CHECKS}[queue]\nmax_wait_secs = 1\n");
    let zap = Zap::with_file(&file, &settings, &[of(&[1, 2, 3])]);
    // Two requests of each good key, and one of the other.
    (0..4).for_each(|_| assert_eq!(zap.chat(CHAT).status, 200));
    assert_eq!(states(&zap)["a#2"], "unauthorized");
    file.write(&settings, &[of(&[2, 3])]);
    assert!(zap.reload());
    assert_eq!(states(&zap)["a#1"], "unauthorized", "the second key is the first now");
    assert_eq!(zap.chat(CHAT).status, 429, "the third key has used its quota");
}
