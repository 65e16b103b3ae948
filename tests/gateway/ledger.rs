//! The ledger and `GET /usage`.

use zap::internals::Order;

use crate::support::provider::{After, reply};
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
    other.send("POST /usage HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}");
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

#[test]
fn an_estimate_is_marked_in_the_log_in_the_report_and_in_the_file() {
    let a = Provider::start(|seen, stream| {
        let is_silent = memchr::memmem::find(&seen.body, b"silent").is_some();
        let answer = if is_silent { r#"{"choices":[{"message":{"content":"hi"}}]}"# } else { ANSWER };
        reply(stream, 200, "content-type: application/json\r\n", answer.as_bytes());
        After::Keep
    });
    let ledger = Ledger::new();
    let zap =
        Zap::with_log(&format!("{}{KEYS}", ledger.settings()), &[a.backend("a", "default_model = \"m\"")]);
    ask(&zap, 2);
    let silent = CHAT.replace("hi", "silent");
    assert_eq!(zap.client().chat("authorization: Bearer sk-team\r\n", silent).status, 200);
    let sources: Vec<_> = zap.lines(3).iter().map(|line| line["tokens"]["source"].clone()).collect();
    assert_eq!(sources, ["provider", "provider", "estimate"]);
    let row = &zap.client().get("/usage").json()["rows"][0];
    assert_eq!((&row["requests"], &row["estimated"]), (&3.into(), &1.into()));
    assert!(row["input"].as_u64() > Some(20), "{row}");
    eventually("the rows are written", || ledger.sum("requests") == 3);
    assert_eq!(ledger.sum("estimated"), 1);
    assert_eq!(ledger.sum("input"), row["input"].as_i64().unwrap());
}

#[test]
fn a_ledger_that_is_locked_is_in_no_requests_way_and_loses_nothing() {
    let (a, ledger) = (provider(), Ledger::new());
    let zap = Zap::with(&format!("{}{KEYS}", ledger.settings()), &[a.backend("a", "default_model = \"m\"")]);
    ask(&zap, 1);
    eventually("the ledger works", || ledger.sum("requests") == 1);
    let other = ledger.open();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    ask(&zap, 3);
    eventually("writes fail", || zap.metric("zap_ledger_errors_total") >= 2.0);
    ask(&zap, 4);
    let usage = zap.client().get("/usage").json();
    assert_eq!(usage["rows"][0]["requests"], 8, "the report has the rows that are not yet written");
    assert_eq!(ledger.sum("requests"), 1);
    other.execute_batch("COMMIT").unwrap();
    eventually("the rows are written", || ledger.sum("requests") == 8);
    let errors = zap.metric("zap_ledger_errors_total");
    ask(&zap, 1);
    eventually("the next row is written", || ledger.sum("requests") == 9);
    assert_eq!(zap.metric("zap_ledger_errors_total"), errors);
}

#[test]
fn the_sql_of_the_manual_runs_against_a_ledger() {
    let manual = include_str!("../../src/manual/usage.md");
    let (_, rest) = manual.split_once("```sql\n").unwrap();
    let (create, rest) = rest.split_once("```").unwrap();
    let (_, rest) = rest.split_once("sqlite3 -header -column zap.db \"").unwrap();
    let (select, rest) = rest.split_once('"').unwrap();
    assert!(!rest.contains("SELECT"), "this test runs one query");

    let (a, ledger) = (provider(), Ledger::new());
    let backend = a.backend("a", &format!("default_model = \"m\"\n{PRICES}"));
    let zap = Zap::with(&format!("{}{KEYS}", ledger.settings()), &[backend]);
    ask(&zap, 2);
    eventually("the rows are written", || ledger.sum("requests") == 2);
    let row = ledger.open().query_row(select, [], |row| {
        Ok((row.get("client")?, row.get("requests")?, row.get("input")?, row.get("output")?, row.get("usd")?))
    });
    assert_eq!(row.unwrap(), ("team".to_owned(), 2, 20, 6, 0.0001));

    let columns = |file: &rusqlite::Connection| -> Vec<(String, String, i64)> {
        let mut query = file.prepare("SELECT name, type, pk FROM pragma_table_info('usage')").unwrap();
        let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
        rows.map(Result::unwrap).collect()
    };
    let theirs = rusqlite::Connection::open_in_memory().unwrap();
    theirs.execute_batch(create).unwrap();
    assert_eq!(columns(&ledger.open()), columns(&theirs));
}
