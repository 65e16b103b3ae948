//! Requests that wait for limits of tokens, or that no wait helps.

use super::limits::{answer, body, post, used};
use super::*;

/// A provider that answers a request for `use-1` when the gate opens, and all others at once.
fn holding(gate: &Gate) -> Provider {
    let gate = gate.clone();
    Provider::start(move |seen, stream| {
        if used(seen) == 1 {
            gate.pass();
        }
        answer(seen, stream)
    })
}

#[test]
fn a_request_that_its_budget_cannot_pay_does_not_wait_for_one_of_its_clients_requests_to_end() {
    let gate = Gate::default();
    let a = holding(&gate);
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
