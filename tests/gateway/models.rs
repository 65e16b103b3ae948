//! Model routing: which backend gets a model, and under which name.

use std::collections::HashMap;

use crate::support::provider::{After, Gate, reply};
use crate::support::{CHAT, Provider, Zap, eventually};

/// A chat for `model`.
fn ask(model: &str) -> String {
    format!("{{\"messages\":[],\"model\":\"{model}\"}}")
}

/// The models of a provider's requests, in order; an empty string stands for a request without a model.
fn models(provider: &Provider) -> Vec<String> {
    let model = |body: &[u8]| {
        let value: serde_json::Value = serde_json::from_slice(body).unwrap();
        value["model"].as_str().unwrap_or_default().to_owned()
    };
    provider.seen().iter().map(|seen| model(&seen.body)).collect()
}

const GROQ: &str = "weight = 2\ndefault_model = \"llama-3.1-8b-instant\"\nmodels = [\"llama-3.1-8b-instant\", \"llama-3.3-*\"]";
const LOCAL: &str = "priority = 1\nmodels = { \"llama-3.1-8b-instant\" = \"llama3.1:8b\", \"llama-3.3-*\" = \"l33-*\", \"llama-*\" = \"any\" }";

#[test]
fn a_model_goes_to_the_backends_that_serve_it_under_their_own_names() {
    let (groq, local) = (Provider::named("groq"), Provider::named("local"));
    let zap = Zap::with("", &[groq.backend("groq", GROQ), local.backend("local", LOCAL)]);
    for (model, want) in [
        ("llama-3.1-8b-instant", "groq"),
        ("llama-3.3-70b", "groq"),
        // Only `local` has a pattern that matches; its lower precedence does not matter.
        ("llama-4", "local"),
    ] {
        assert_eq!(zap.chat(ask(model)).text(), want, "{model}");
    }
    assert_eq!(models(&groq), ["llama-3.1-8b-instant", "llama-3.3-70b"]);
    assert_eq!(models(&local), ["any"]);
}

#[test]
fn a_failover_uses_the_model_name_of_the_other_backend() {
    let (groq, local) = (Provider::fixed(503, "", "down"), Provider::named("local"));
    let settings = "[retry]\nbase_delay_ms = 1\n[health]\nfailure_threshold = 1000";
    let zap = Zap::with(settings, &[groq.backend("groq", GROQ), local.backend("local", LOCAL)]);
    for model in ["llama-3.1-8b-instant", "llama-3.3-70b"] {
        let answer = zap.chat(ask(model));
        assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("local", Some("2")));
    }
    assert_eq!(models(&groq), ["llama-3.1-8b-instant", "llama-3.3-70b"]);
    assert_eq!(
        models(&local),
        ["llama3.1:8b", "l33-70b"],
        "the longest prefix wins, and * stands for the rest"
    );
}

#[test]
fn the_body_is_patched_in_place_and_nothing_else_changes() {
    let local = Provider::named("local");
    let zap = Zap::with("", &[local.backend("local", "models = { a = \"b/\\\"c\\\"\" }")]);
    let body = "{ \"x\":1e400 , \"mod\\u0065l\" : \"\\u0061\",\"messages\":[ {\"model\":\"a\"} ] }";
    assert_eq!(zap.chat(body).status, 200);
    let want = "{ \"x\":1e400 , \"mod\\u0065l\" : \"b/\\\"c\\\"\",\"messages\":[ {\"model\":\"a\"} ] }";
    assert_eq!(String::from_utf8(local.seen()[0].body.clone()).unwrap(), want);
}

#[test]
fn a_request_without_a_model_goes_to_backends_with_a_default_or_without_a_list() {
    let (a, b, c) = (Provider::named("a"), Provider::named("b"), Provider::named("c"));
    let backends = [
        a.backend("a", "default_model = \"own\"\nmodels = { own = \"mapped\" }"),
        b.backend("b", "models = [\"x\"]"),
        c.backend("c", ""),
    ];
    let zap = Zap::with("", &backends);
    for body in [CHAT, "{\"messages\":[],\"model\":null}", "{\"messages\":[],\"model\":\"\"}", CHAT] {
        assert_eq!(zap.chat(body).status, 200);
    }
    assert_eq!(models(&a), ["own", "own"], "a default model is not mapped");
    assert_eq!((b.count(), c.count()), (0, 2));
    // A client may name that model too; then the map applies.
    let zap = Zap::with("", &backends[..1]);
    zap.chat(ask("own"));
    assert_eq!(models(&a).last().unwrap(), "mapped");

    let zap = Zap::with("", &backends[1..2]);
    let refused = zap.chat(CHAT);
    assert_eq!((refused.status, refused.code().as_str()), (400, "missing_model"));
    assert_eq!(b.count(), 0);
}

#[test]
fn an_unknown_model_is_not_found_and_similar_names_are_suggested() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "models = [\"gpt-4o\", \"gpt-4o-mini\", \"o3\", \"llama-*\"]")]);
    let refused = zap.chat(ask("gpt-4"));
    assert_eq!((refused.status, refused.code().as_str()), (404, "model_not_found"));
    let error = &refused.json()["error"];
    assert_eq!(
        (error["param"].as_str(), error["type"].as_str()),
        (Some("model"), Some("invalid_request_error"))
    );
    assert!(error["message"].as_str().unwrap().contains("`gpt-4o`, `gpt-4o-mini`"), "{error}");
    assert_eq!(refused.header("x-zap-attempts"), Some("0"));
    // The name is longer than is allowed, so its prefix does not match `llama-*`.
    let long = zap.chat(ask(&format!("llama-{}", "x".repeat(1000))));
    assert_eq!((long.status, long.code().as_str()), (404, "model_not_found"));
    assert_eq!(a.count(), 0);
    zap.wait_until_idle();
}

#[test]
fn a_route_has_weights_and_priorities_and_hides_a_model_of_the_same_name() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let routes = "[models.cheap]\ntargets = [{ backend = \"a\", model = \"a-8b\", weight = 3 }, { backend = \"b\", model = \"b-8b\", weight = 1 }]\n\
        [models.smart]\ntargets = [{ backend = \"b\", model = \"b-70b\" }, { backend = \"a\", model = \"a-70b\", priority = 1 }]\n\
        [models.gpt]\ntargets = [{ backend = \"a\" }]\n";
    let zap = Zap::with(routes, &[a.backend("a", ""), b.backend("b", "models = [\"gpt\"]")]);
    let count = |model: &str, n: usize| {
        let mut served = HashMap::<String, usize>::new();
        (0..n).for_each(|_| *served.entry(zap.chat(ask(model)).text().to_owned()).or_default() += 1);
        (served.get("a").copied().unwrap_or(0), served.get("b").copied().unwrap_or(0))
    };
    assert_eq!(count("cheap", 40), (30, 10));
    assert_eq!(count("smart", 5), (0, 5));
    assert_eq!(count("gpt", 5), (5, 0), "the route hides the model of backend b with that name");
    let mut seen = models(&a);
    seen.dedup();
    assert_eq!(seen, ["a-8b", "gpt"], "a target without a model gets the requested name");
    assert!(models(&b)[10..].iter().all(|model| model == "b-70b"));
}

#[test]
fn one_backend_may_be_tried_with_two_models() {
    let a = Provider::start(|seen, stream| {
        match String::from_utf8_lossy(&seen.body).contains("small") {
            true => reply(stream, 200, "", b"small"),
            false => reply(stream, 503, "", b"big is down"),
        }
        After::Keep
    });
    let routes = "[models.smart]\ntargets = [{ backend = \"a\", model = \"big\" }, { backend = \"a\", model = \"small\", priority = 1 }]\n";
    // The first try must release its permit before the second.
    for settings in ["", "max_in_flight = 1"] {
        let before = a.count();
        let zap = Zap::with(routes, &[a.backend("a", settings)]);
        let answer = zap.chat(ask("smart"));
        assert_eq!((answer.text(), answer.header("x-zap-attempts")), ("small", Some("2")), "{settings}");
        assert_eq!(models(&a)[before..], ["big", "small"]);
    }
}

/// A route to two models of one backend, with weights 3 and 1.
const TWO: &str = "[models.two]\ntargets = [{ backend = \"a\", model = \"big\", weight = 3 }, { backend = \"a\", model = \"small\" }]\n";

#[test]
fn two_models_of_one_backend_share_by_weight_under_every_strategy() {
    for strategy in ["round_robin", "least_loaded", "prefix_hash"] {
        let (a, b) = (Provider::named("a"), Provider::named("b"));
        let settings = format!("[load_balancer]\nstrategy = \"{strategy}\"\n{TWO}");
        let zap = Zap::with(&settings, &[a.backend("a", ""), b.backend("b", "")]);
        for n in 0..200 {
            let body =
                format!("{{\"model\":\"two\",\"messages\":[{{\"role\":\"user\",\"content\":\"{n}\"}}]}}");
            assert_eq!(zap.chat(body).text(), "a");
        }
        let big = models(&a).iter().filter(|model| *model == "big").count();
        let want = if strategy == "prefix_hash" { 130..=170 } else { 150..=150 };
        assert!(want.contains(&big), "{big} of 200 by {strategy}");
    }
}

#[test]
fn a_queued_request_gets_a_model_by_weight_and_priority() {
    for (routes, big) in [
        (TWO, 14..=16),
        (
            "[models.two]\ntargets = [{ backend = \"a\", model = \"small\", priority = 1 }, { backend = \"a\", model = \"big\" }]\n",
            20..=20,
        ),
    ] {
        let gate = Gate::default();
        let held = gate.clone();
        let a = Provider::start(move |_, stream| {
            held.pass();
            reply(stream, 200, "", b"ok");
            After::Keep
        });
        let zap = Zap::with(routes, &[a.backend("a", "max_in_flight = 1")]);
        let mut clients: Vec<_> = (0..20).map(|_| zap.client()).collect();
        clients.iter_mut().for_each(|c| c.post("/chat", "", ask("two")));
        eventually("all other requests are queued", || {
            gate.waiting() == 1 && zap.metric("zap_queue_depth") == 19.0
        });
        gate.open(20);
        clients.iter_mut().for_each(|c| assert_eq!(c.response().status, 200));
        let served = models(&a).iter().filter(|model| *model == "big").count();
        assert!(big.contains(&served), "{served} of 20");
    }
}

#[test]
fn the_star_route_serves_names_that_nothing_else_serves() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let routes = "[models.\"*\"]\ntargets = [{ backend = \"b\", model = \"b-any\" }]\n";
    let zap = Zap::with(routes, &[a.backend("a", "models = [\"gpt\"]"), b.backend("b", "models = [\"x\"]")]);
    assert_eq!((zap.chat(ask("gpt")).text(), zap.chat(ask("other")).text()), ("a", "b"));
    assert_eq!(models(&b), ["b-any"]);
    assert_eq!(
        zap.chat(CHAT).code(),
        "missing_model",
        "the star route does not apply to a request without a model"
    );
}

#[test]
fn suggestions_for_unknown_models_are_limited_per_second() {
    let a = Provider::named("a");
    let zap = Zap::with("[server]\nworkers = 1", &[a.backend("a", "models = [\"gpt-4o-mini\"]")]);
    let mut client = zap.client();
    let mut near = |n: usize| {
        let answer = client.chat("", ask(&format!("gpt-{n}-mini")));
        assert_eq!((answer.status, answer.code().as_str()), (404, "model_not_found"));
        answer.text().contains("near it")
    };
    let since = std::time::Instant::now();
    let searched = (0..400).filter(|n| near(*n)).count();
    let seconds = since.elapsed().as_secs() as usize + 2;
    assert!((50..=50 * seconds).contains(&searched), "{searched} in {seconds} s");
    assert!(searched < 400);
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert!(near(0), "the next second has searches of its own");
    let mut client = zap.client();
    let wrong = client.get("/v1/models/gpt-4-mini");
    assert!(wrong.text().contains("near it"), "{}", wrong.text());
}

#[test]
fn models_are_listed_once_with_their_owners() {
    let a = Provider::named("a");
    let routes = "[models.smart]\ntargets = [{ backend = \"b\", model = \"x\" }]\n[models.\"*\"]\ntargets = [{ backend = \"a\" }]\n";
    let zap = Zap::with(
        routes,
        &[
            a.backend("a", "default_model = \"d\"\nmodels = [\"meta/llama\", \"gpt-*\"]"),
            a.backend("b", "default_model = \"d\"\nmodels = { \"meta/llama\" = \"l\", other = \"o\" }"),
        ],
    );
    let list = zap.client().get("/v1/models");
    assert_eq!((list.status, list.json()["object"].as_str()), (200, Some("list")));
    let shown: Vec<_> = list.json()["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| {
            assert_eq!((m["object"].as_str(), m["created"].as_u64()), (Some("model"), Some(0)));
            format!("{} {}", m["id"].as_str().unwrap(), m["owned_by"].as_str().unwrap())
        })
        .collect();
    assert_eq!(shown, ["smart zap", "meta/llama a", "d a", "other b"]);
    for id in ["meta/llama", "meta%2Fllama"] {
        let one = zap.client().get(&format!("/v1/models/{id}"));
        assert_eq!((one.status, one.json()["id"].as_str()), (200, Some("meta/llama")));
    }
    // The catch-all route and the prefix take these names.
    for id in ["none", "gpt-4", "*"] {
        let one = zap.client().get(&format!("/v1/models/{id}"));
        assert_eq!((one.status, one.json()["owned_by"].as_str()), (200, Some("a")), "{id}");
    }
    let none = zap.client().get("/v1/models/");
    assert_eq!((none.status, none.code().as_str()), (404, "model_not_found"));
    let mut client = zap.client();
    client.post("/v1/models", "", "{}");
    let refused = client.response();
    assert_eq!((refused.status, refused.header("allow")), (405, Some("GET, HEAD")));
    assert_eq!(zap.metric("zap_requests_total{endpoint=\"models\",backend=\"\",status=\"200\"}"), 6.0);
    assert_eq!(a.count(), 0);
}

#[test]
fn other_endpoints_route_by_model_and_skip_backends_that_serve_chat_only() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let backends = [
        a.backend("a", "weight = 9\nmodels = [\"e\"]\nchat_path = \"/only/chat\""),
        b.backend("b", "models = { e = \"e-of-b\" }"),
    ];
    let zap = Zap::with("", &backends);
    for path in [
        "/v1/embeddings",
        "/v1/completions",
        "/v1/responses",
        "/v1/moderations",
        "/v1/rerank",
        "/v1/images/generations",
        "/v1/audio/speech",
    ] {
        let mut client = zap.client();
        client.post(path, "", "{\"model\":\"e\",\"input\":\"x\"}");
        assert_eq!(client.response().text(), "b", "{path}");
        assert_eq!(b.seen().last().unwrap().line, format!("POST {path} HTTP/1.1"));
    }
    assert_eq!(a.count(), 0);
    assert!(models(&b).iter().all(|model| model == "e-of-b"));
    let mut client = zap.client();
    client.post("/v1/embeddings", "", "{\"input\":\"x\"}");
    assert_eq!(client.response().code(), "missing_model");
}

/// A provider whose list of models is `list`; a chat gets its name.
fn listing(list: &'static str) -> (Provider, String) {
    let provider = Provider::start(|_, stream| {
        reply(stream, 200, "content-type: application/json\r\n", b"ok");
        After::Keep
    });
    provider.set_list(list);
    let url = format!("url = \"http://{}/v1\"", provider.address);
    (provider, url)
}

fn ids(zap: &Zap) -> Vec<String> {
    let list = zap.client().get("/v1/models").json();
    let id = |model: &serde_json::Value| model["id"].as_str().unwrap().to_owned();
    list["data"].as_array().unwrap().iter().map(id).collect()
}

#[test]
fn models_lists_what_backends_without_models_say_they_serve() {
    let (open, open_url) = listing(r#"{"object":"list","data":[{"id":"x/y"},{"id":"known"},{"id":"z"}]}"#);
    let (second, second_url) = listing(r#"[{"id":"z"},{"id":"w"}]"#);
    let (named, named_url) = listing(r#"{"data":[{"id":"never"}]}"#);
    let (broken, broken_url) = listing("not a list");
    let backend = |name: &str, url: &str, more: &str| {
        format!("[[backends]]\nname = \"{name}\"\n{url}\nweight = 1\n{more}\n")
    };
    let all = [
        backend("open", &open_url, "api_key = \"sk-own\""),
        backend("second", &second_url, ""),
        backend("named", &named_url, "models = [\"known\"]"),
        backend("broken", &broken_url, ""),
    ];
    let zap = Zap::with("models_from = \"backends\"", &all);
    eventually("all are listed", || ids(&zap) == ["known", "x/y", "z", "w"]);
    let asked = |provider: &Provider| {
        provider.probes().into_iter().filter(|seen| seen.line.contains("/models")).collect::<Vec<_>>()
    };
    assert_eq!(asked(&open)[0].line, "GET /v1/models HTTP/1.1");
    assert_eq!(asked(&open)[0].header("authorization"), Some("Bearer sk-own"));
    assert_eq!((asked(&open).len(), asked(&second).len(), asked(&named).len()), (1, 1, 0));
    let owner = |id: &str| zap.client().get(&format!("/v1/models/{id}")).json()["owned_by"].clone();
    assert_eq!((owner("x/y"), owner("known")), ("open".into(), "named".into()));
    let zap = Zap::with("models_from = \"config\"", &all);
    eventually("the backends are checked", || !broken.probes().is_empty());
    assert_eq!(ids(&zap), ["known"]);
    assert_eq!(asked(&open).len(), 1);
}

#[test]
fn a_listed_model_is_one_that_the_key_may_use() {
    let (provider, url) = listing(r#"{"data":[{"id":"gpt-1"},{"id":"other"}]}"#);
    let settings =
        "models_from = \"backends\"\n[[client_keys]]\nname = \"c\"\nkey = \"zk\"\nmodels = [\"gpt-*\"]\n";
    let zap = Zap::with(settings, &[format!("[[backends]]\nname = \"a\"\n{url}\nweight = 1\n")]);
    let list = || {
        let mut client = zap.client();
        client.send("GET /v1/models HTTP/1.1\r\nhost: z\r\nauthorization: Bearer zk\r\n\r\n");
        client.response().text().to_owned()
    };
    eventually("the model is listed", || list().contains("gpt-1"));
    assert!(!list().contains("other"));
    drop(provider);
}

#[test]
fn a_model_is_found_by_every_name_that_a_request_may_have() {
    let (a, b) = (Provider::named("a"), Provider::named("b"));
    let long = "x".repeat(300);
    let routes = "[models.route]\ntargets = [{ backend = \"a\" }]\n";
    let rules =
        a.backend("a", "models = { exact = \"own\", \"pre/*\" = \"*\" }\ndefault_model = \"default\"");
    let closed = Zap::with(routes, std::slice::from_ref(&rules));
    let open = Zap::with(routes, &[rules, b.backend("b", "")]);
    for (zap, is_open) in [(&closed, false), (&open, true)] {
        for (name, is_known) in [
            ("route", true),
            ("exact", true),
            ("pre/1", true),
            ("default", true),
            ("pre", false),
            ("own", false),
            ("any/thing:free", false),
            (&long, false),
            (&format!("pre/{long}"), false),
        ] {
            let model = zap.client().get(&format!("/v1/models/{}", name.replace('/', "%2F")));
            let posted = zap.chat(ask(name)).status;
            assert_eq!(model.status, posted, "{name}: {}", model.text());
            assert_eq!(model.status == 200, is_known || is_open, "{name}");
            assert!(model.status != 200 || model.json()["id"] == name);
        }
        for bad in ["", "%ff"] {
            assert_eq!(zap.client().get(&format!("/v1/models/{bad}")).status, 404, "{bad}");
        }
    }
}
