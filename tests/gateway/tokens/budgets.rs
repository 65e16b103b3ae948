//! Budgets of clients and of backends.

use std::time::Duration;

use super::*;
use crate::support::{File, Ledger};

fn key(name: &str, limits: &str) -> String {
    format!("[[client_keys]]\nname = \"{name}\"\nkey = \"zk-{name}\"\n{limits}\n")
}

fn assert_spent(refused: &Response) {
    assert_eq!((refused.status, refused.code().as_str()), (429, "insufficient_quota"), "{}", refused.text());
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    assert_eq!(refused.header("retry-after"), Some("59"));
    assert_eq!(refused.json()["error"]["type"], "insufficient_quota");
}

#[test]
fn a_spent_budget_refuses_and_says_when_it_opens() {
    let a = Provider::start(answer);
    let limits = format!("requests_per_minute = 9\n{}", budget("1", "month"));
    let zap = Zap::with(&key("team", &limits), &[a.backend("a", PRICES)]);
    let mut client = zap.client();
    // 0.1 and 0.3 USD, then 0.1 and 0.4 USD.
    for (n, left) in [(30, "0.600000000"), (40, "0.100000000")] {
        assert_eq!(post(&mut client, "zk-team", &body(n, &max(n))).status, 200);
        assert_eq!(state(&zap, "clients", "team").1, left);
    }
    let refused = post(&mut client, "zk-team", &body(1, &max(1)));
    assert_spent(&refused);
    let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("budget of 1 USD a month") && message.contains("-01 at 00:00 UTC"), "{message}");
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), Some("7"), "its place is given back");
    assert_eq!(post(&mut client, "zk-team", &body(0, &max(0))).status, 200, "0.1 USD is left");
    assert_eq!(state(&zap, "clients", "team"), ("1.000000000".to_owned(), "0.000000000".to_owned()));
    assert_eq!(a.count(), 3);
}

#[test]
fn two_requests_at_the_edge_cannot_both_pass() {
    let gate = Gate::default();
    let a = holding(&gate, 0..u64::MAX);
    let zap = Zap::with(&key("team", &budget("1", "month")), &[a.backend("a", PRICES)]);
    let (mut first, mut second) = (zap.client(), zap.client());
    first.post("/chat", "authorization: Bearer zk-team\r\n", body(10, &max(50)));
    eventually("0.6 USD are reserved", || gate.waiting() == 1);
    let refused = post(&mut second, "zk-team", &body(10, &max(50)));
    assert_eq!((refused.status, refused.code().as_str()), (429, "rate_limit_exceeded"));
    assert_eq!((refused.header("retry-after"), refused.header("x-should-retry")), (Some("1"), None));
    gate.open(2);
    assert_eq!(first.response().status, 200);
    assert_eq!(post(&mut second, "zk-team", &body(10, &max(50))).status, 200, "0.2 USD were used");
    assert_eq!(state(&zap, "clients", "team").0, "0.400000000");
}

#[test]
fn a_budget_is_passed_by_the_overrun_of_the_requests_in_flight_alone_and_it_is_counted() {
    let a = Provider::start(answer);
    let zap = Zap::with(&key("team", &budget("1", "month")), &[a.backend("a", PRICES)]);
    let mut client = zap.client();
    assert_eq!(post(&mut client, "zk-team", &body(30, &max(30))).status, 200);
    // It states 20 tokens and uses 90.
    assert_eq!(post(&mut client, "zk-team", &body(90, &max(20))).status, 200);
    assert_eq!(state(&zap, "clients", "team"), ("1.400000000".to_owned(), "0.000000000".to_owned()));
    assert_eq!(zap.metric("zap_token_overrun_total{client=\"team\"}"), 70.0);
    assert_spent(&post(&mut client, "zk-team", &body(1, &max(0))));
}

#[test]
fn output_that_is_dearer_than_the_input_that_was_expected_is_counted() {
    // It expects 100 input tokens and 1 output token, and uses 1 and 100.
    let a = Provider::start(|seen, stream| serve(seen, stream, "some text", Some([1, 0, 100, 0])));
    let zap = Zap::with(&key("team", &budget("1", "month")), &[a.backend("a", PRICES)]);
    assert_eq!(post(&mut zap.client(), "zk-team", &body(0, &max(1))).status, 200);
    assert_eq!(state(&zap, "clients", "team").0, "1.001000000");
    assert_eq!(zap.metric("zap_token_overrun_total{client=\"team\"}"), 99.0);
}

#[test]
fn a_request_above_the_whole_budget_is_told_so_and_one_without_a_maximum_takes_all_of_it() {
    let a = Provider::start(answer);
    let zap = Zap::with(&key("team", &budget("0.5", "month")), &[a.backend("a", PRICES)]);
    let refused = post(&mut zap.client(), "zk-team", &body(1, &max(50)));
    assert_spent(&refused);
    assert!(
        refused.text().contains("may cost 0.6 USD, more than this key's whole budget of 0.5 USD a month"),
        "{}",
        refused.text()
    );
    // 100 input tokens and 512 output tokens would cost 5.22 USD.
    assert_eq!(post(&mut zap.client(), "zk-team", &body(20, "")).status, 200);
    assert_eq!(state(&zap, "clients", "team").0, "0.300000000");
}

#[test]
fn spend_is_the_same_in_every_place_to_the_nano_dollar() {
    let a = Provider::start(answer);
    let ledger = Ledger::new();
    let settings = [ledger.settings(), key("team", &budget("100", "month"))].concat();
    let zap = Zap::with(&settings, &[a.backend("a", PRICES)]);
    let (mut client, mut nano) = (zap.client(), 0);
    for n in 0..20 {
        assert_eq!(post(&mut client, "zk-team", &body(n, &max(n))).status, 200);
        nano += 100_000_000 + n * 10_000_000;
    }
    let want = usd(nano);
    assert_eq!(state(&zap, "clients", "team").0, want);
    assert_eq!(zap.client().get("/usage").json()["rows"][0]["cost_usd"], want.as_str());
    assert_eq!(zap.sample("zap_client_cost_usd_total{client=\"team\"}"), Some(want.clone()));
    assert_eq!(zap.sample("zap_cost_usd_total{backend=\"a\",model=\"m\"}"), Some(want));
    eventually("the ledger has it", || ledger.sum("cost_nano_usd") == nano as i64);
}

#[test]
fn a_spent_backend_is_passed_over_until_all_are_spent() {
    let (a, b) = (Provider::start(answer), Provider::start(answer));
    let with = |usd: &str| format!("{PRICES}{}", budget(usd, "month"));
    let zap = Zap::with_log(
        "",
        &[a.backend("a", &with("0.5")), b.backend("b", &format!("{}\npriority = 1", with("0.3")))],
    );
    let mut client = zap.client();
    for want in ["a", "a", "b"] {
        let response = client.chat("", body(10, &max(10)));
        assert_eq!((response.status, response.header("x-zap-backend")), (200, Some(want)));
    }
    let refused = client.chat("", body(10, &max(10)));
    assert_spent(&refused);
    let lines = zap.lines(4);
    assert_eq!(lines[2]["passed"], serde_json::json!([["a", "budget"]]));
    assert_eq!(lines[3]["passed"], serde_json::json!([["a", "budget"], ["b", "budget"]]));
    assert_eq!(lines[3]["code"], "insufficient_quota");
    assert_eq!(state(&zap, "backends", "a"), ("0.400000000".to_owned(), "0.100000000".to_owned()));
    assert_eq!((a.count(), b.count()), (2, 1));
}

#[test]
fn an_answer_that_failed_costs_nothing_of_a_budget() {
    let a = Provider::start(|seen, stream| match used(seen) {
        0 => {
            reply(stream, 500, JSON, b"{\"error\":{\"message\":\"broken\"}}");
            After::Keep
        }
        _ => answer(seen, stream),
    });
    let settings = format!("[retry]\nmax_retries = 0\n{}", key("team", &budget("1", "month")));
    let zap = Zap::with(&settings, &[a.backend("a", &format!("{PRICES}{}", budget("1", "month")))]);
    for _ in 0..3 {
        assert_eq!(post(&mut zap.client(), "zk-team", &body(0, &max(80))).status, 500);
    }
    let all = ("0.000000000".to_owned(), "1.000000000".to_owned());
    eventually("nothing is reserved", || {
        state(&zap, "clients", "team") == all && state(&zap, "backends", "a") == all
    });
}

#[test]
fn a_reload_keeps_what_is_spent_and_a_renamed_key_begins_anew() {
    let a = Provider::start(answer);
    let file = File::new();
    let backend = [a.backend("a", &format!("{PRICES}{}", budget("5", "day")))];
    let zap = Zap::with_file(&file, &key("team", &budget("1", "day")), &backend);
    assert_eq!(post(&mut zap.client(), "zk-team", &body(40, &max(40))).status, 200);
    file.write(&key("team", &budget("0.6", "month")), &backend);
    assert!(zap.reload());
    // The budget of another period is another one; it begins with what was spent in its own.
    assert_eq!(state(&zap, "clients", "team"), ("0.500000000".to_owned(), "0.100000000".to_owned()));
    assert_eq!(state(&zap, "backends", "a").0, "0.500000000");
    file.write(&key("renamed", &budget("0.6", "month")), &backend);
    assert!(zap.reload());
    assert_eq!(state(&zap, "clients", "renamed").0, "0.000000000");
}

#[test]
fn a_budget_starts_from_the_ledger_and_counts_what_other_processes_spend() {
    let (a, ledger) = (Provider::start(answer), Ledger::new());
    let settings = [ledger.settings(), key("team", &budget("1", "month"))].concat();
    let backend = [a.backend("a", &format!("{PRICES}{}", budget("1", "month")))];
    let first = Zap::with(&settings, &backend);
    assert_eq!(post(&mut first.client(), "zk-team", &body(20, &max(20))).status, 200);
    eventually("the ledger has it", || ledger.sum("cost_nano_usd") == 300_000_000);
    let second = Zap::with(&settings, &backend);
    let spent = |usd: &str, left: &str| (usd.to_owned(), left.to_owned());
    for (owners, name) in [("clients", "team"), ("backends", "a")] {
        assert_eq!(state(&second, owners, name), spent("0.300000000", "0.700000000"));
    }
    assert_eq!(post(&mut second.client(), "zk-team", &body(40, &max(40))).status, 200);
    crate::support::within(
        Duration::from_secs(10),
        "the first process knows what the second has spent",
        || {
            thread::sleep(Duration::from_millis(50));
            state(&first, "clients", "team") == spent("0.800000000", "0.200000000")
                && state(&first, "backends", "a") == spent("0.800000000", "0.200000000")
        },
    );
    assert_spent(&post(&mut first.client(), "zk-team", &body(20, &max(20))));
}
