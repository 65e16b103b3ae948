//! The ledger and `GET /usage`.

use zap::internals::Order;

use crate::support::{CHAT, Ledger, Provider, Zap, eventually};

const ANSWER: &str = r#"{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":10,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":1}}}"#;

/// 10 input tokens, 4 of them cached, and 3 output tokens: 6 * 2.5 + 4 * 1.25 + 3 * 10 = 50 micro-USD.
const PRICES: &str = "prices = { \"m\" = { input = 2.5, cached = 1.25, output = 10 } }";

fn provider() -> Provider {
    Provider::fixed(200, "content-type: application/json\r\n", ANSWER)
}

const KEYS: &str = "[[client_keys]]\nname = \"team\"\nkey = \"sk-team\"\n";

fn ask(zap: &Zap, times: usize) {
    for _ in 0..times {
        let response = zap.client().chat("authorization: Bearer sk-team\r\n", CHAT);
        assert_eq!(response.status, 200, "{}", response.text());
    }
}

#[test]
fn usage_and_cost_outlive_the_process_to_the_nano_dollar() {
    let (a, ledger) = (provider(), Ledger::new());
    let backend = a.backend("a", &format!("default_model = \"m\"\n{PRICES}"));
    for round in 1..=2 {
        let zap = Zap::with(&format!("{}{KEYS}", ledger.settings()), std::slice::from_ref(&backend));
        ask(&zap, 5);
        let usage = zap.client().get("/usage").json();
        let n = 5 * round;
        assert_eq!(
            usage["rows"],
            serde_json::json!([{
                "client": "team", "requests": n, "estimated": 0, "input": 10 * n, "cached": 4 * n,
                "output": 3 * n, "reasoning": n, "cost_usd": format!("0.{:09}", 50_000 * n),
            }])
        );
        let status = zap.client().get("/status").json();
        let team =
            status["clients"].as_array().unwrap().iter().find(|client| client["name"] == "team").unwrap();
        assert_eq!(team["used"]["spent_this_month_usd"], format!("0.{:09}", 50_000 * n));
        assert_eq!(team["used"]["tokens"]["input"], 50, "of this process");
        assert_eq!(
            format!("{:.9}", zap.metric("zap_cost_usd_total{backend=\"a\",model=\"m\"}")),
            "0.000250000"
        );
        zap.order(Order::Drain);
        assert!(zap.join());
        let columns = ["requests", "input", "cost_nano_usd"];
        assert_eq!(columns.map(|column| ledger.sum(column)), [n, 10 * n, 50_000 * n]);
    }
}

#[test]
fn a_row_is_in_the_file_after_a_second() {
    let (a, ledger) = (provider(), Ledger::new());
    let zap = Zap::with(&format!("{}{KEYS}", ledger.settings()), &[a.backend("a", "default_model = \"m\"")]);
    ask(&zap, 1);
    eventually("the row is written", || {
        ledger.open().query_row("SELECT count(*) FROM usage", [], |row| row.get::<_, i64>(0)).unwrap() == 1
    });
    assert_eq!(zap.metric("zap_ledger_errors_total"), 0.0);
}

#[test]
fn usage_is_grouped_as_asked_and_a_wrong_query_says_why() {
    let a = provider();
    let zap = Zap::with(KEYS, &[a.backend("a", "default_model = \"m\"")]);
    ask(&zap, 2);
    let mut client = zap.client();
    let usage = client.get("/usage?by=backend,model").json();
    assert_eq!((&usage["rows"][0]["backend"], &usage["rows"][0]["model"]), (&"a".into(), &"m".into()));
    let csv = client.get("/usage?by=client&format=csv");
    assert!(csv.header("content-type").unwrap().starts_with("text/csv"));
    assert_eq!(
        csv.text(),
        "client,requests,estimated,input,cached,output,reasoning,cost_usd\r\nteam,2,0,20,8,6,2,0.000000000\r\n"
    );
    for (query, why) in [
        ("from=yesterday", "from"),
        ("from=2026-11-30&to=2026-11-01", "from"),
        ("by=colour", "by"),
        ("format=xml", "format"),
        ("since=2026-11-01", "since"),
        // SDK wrappers take a message with these words for a rate limit.
        ("by=429", "from, to, by and format"),
        ("quota=1", "from, to, by and format"),
    ] {
        let refused = client.get(&format!("/usage?{query}"));
        assert_eq!((refused.status, &*refused.code()), (400, "bad_request"), "{query}");
        assert!(refused.text().contains(why), "{query}: {}", refused.text());
        assert!(!["429", "quota"].iter().any(|word| refused.text().contains(word)), "{}", refused.text());
    }
    let mut other = zap.client();
    other.post("/usage", "", "{}");
    assert_eq!(other.response().status, 405);
}

#[test]
fn a_request_without_a_model_has_the_price_of_all_models() {
    let a = provider();
    let zap = Zap::with("", &[a.backend("a", "prices = { \"*\" = { input = 1, output = 1 } }")]);
    assert_eq!(zap.chat(r#"{"messages":[]}"#).status, 200);
    let cost = zap.metric("zap_cost_usd_total{backend=\"a\",model=\"other\"}");
    assert_eq!(format!("{cost:.9}"), "0.000013000");
}
