//! Requests that wait for limits of tokens, or that no wait helps.

use super::*;

#[test]
fn a_request_that_its_budget_cannot_pay_does_not_wait_for_one_of_its_clients_requests_to_end() {
    let gate = Gate::default();
    let a = holding(&gate, 1..2);
    let key = "[[client_keys]]\nname = \"team\"\nkey = \"zk-team\"\nmax_in_flight = 1\n\
               budget = { usd = 1, per = \"month\" }\n";
    let prices = "models = [\"m\"]\nprices = { m = { input = 1000, output = 10000 } }";
    let zap = Zap::with(key, &[a.backend("a", prices)]);
    let (mut first, mut second) = (zap.client(), zap.client());
    first.post("/chat", "authorization: Bearer zk-team\r\n", body(1, ",\"max_tokens\":1"));
    eventually("a request is under way", || gate.waiting() == 1);
    let refused = post(&mut second, "zk-team", &body(2, ",\"max_tokens\":100"));
    assert_eq!((refused.status, refused.code().as_str()), (429, "insufficient_quota"), "1.1 USD");
    gate.open(1);
    assert_eq!(first.response().status, 200);
    zap.wait_until_idle();
}

#[test]
fn a_reload_that_removes_the_limit_of_requests_at_once_lets_the_waiting_ones_go() {
    let gate = Gate::default();
    let a = holding(&gate, 1..2);
    let file = crate::support::File::new();
    let zap = Zap::with_file(&file, "", &[a.backend("a", "max_in_flight = 1")]);
    let (mut first, mut second) = (zap.client(), zap.client());
    first.post("/chat", "", body(1, ""));
    eventually("a request is under way", || gate.waiting() == 1);
    second.post("/chat", "", body(2, ""));
    eventually("a request waits", || zap.metric("zap_queue_depth") == 1.0);
    file.write("", &[a.backend("a", "")]);
    assert!(zap.reload());
    assert_eq!(second.response().status, 200);
    gate.open(1);
    assert_eq!(first.response().status, 200);
    zap.wait_until_idle();
}

/// Another key is another account: its limit is a new one, and the requests that wait keep the limit that they wait
/// for.
#[test]
fn a_reload_with_another_key_does_not_lift_the_limit_that_requests_wait_for() {
    let gate = Gate::default();
    let a = holding(&gate, 1..2);
    let file = crate::support::File::new();
    let backend = |key: &str| [a.backend("a", &format!("api_key = \"sk-{key}\"\ntokens_per_minute = 1000"))];
    let zap = Zap::with_file(&file, "", &backend("one"));
    let clients = [1, 2, 3].map(|_| zap.client());
    let [mut first, mut second, mut third] = clients;
    first.post("/chat", "", body(1, ",\"max_tokens\":700"));
    eventually("800 tokens are reserved", || gate.waiting() == 1);
    second.post("/chat", "", body(2, ",\"max_tokens\":700"));
    eventually("a request waits", || zap.metric("zap_queue_depth") == 1.0);
    file.write("", &backend("two"));
    assert!(zap.reload());
    assert_eq!(post(&mut third, "any", &body(3, ",\"max_tokens\":700")).status, 200);
    assert_eq!(a.count(), 2, "the second request waits");
    gate.open(1);
    assert_eq!((first.response().status, second.response().status), (200, 200));
    zap.wait_until_idle();
}
