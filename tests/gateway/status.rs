//! What `/status` says of failures, rates and reloads.

use std::io::Write as _;

use crate::support::provider::{After, chunk};
use crate::support::{CHAT, File, Provider, Zap, eventually};

#[test]
fn status_tells_failures_in_words_with_their_clients_and_what_became_of_them() {
    let (good, bad) = (Provider::named("good"), Provider::fixed(503, "", "{}"));
    let settings = "[health]\nfailure_threshold = 1000\n[retry]\nmax_retries = 1\nbudget_percent = 100\n\
        [models.both]\ntargets = [{ backend = \"bad\" }, { backend = \"good\", priority = 1 }]\n\
        [models.alone]\ntargets = [{ backend = \"bad\" }]\n";
    let zap = Zap::with(settings, &[good.backend("good", ""), bad.backend("bad", "")]);
    for _ in 0..3 {
        assert_eq!(zap.chat("{\"model\":\"both\",\"messages\":[]}").status, 200);
    }
    assert_eq!(zap.chat("{\"model\":\"alone\",\"messages\":[]}").status, 503);
    let failures = || zap.client().get("/status").json()["failures"].as_array().unwrap().clone();
    eventually("both are listed", || failures().len() == 2);
    let list = failures();
    let told = |i: usize| (list[i]["model"].clone(), list[i]["count"].clone(), list[i]["hurt"].clone());
    assert_eq!(told(0), ("alone".into(), 1.into(), true.into()));
    assert_eq!(list[0]["outcome"], "the client got 503 of bad");
    assert_eq!(list[0]["tries"].as_array().unwrap().len(), 2, "{list:?}");
    assert_eq!(told(1), ("both".into(), 3.into(), false.into()));
    assert_eq!(list[1]["outcome"], "good has served it");
    assert_eq!(list[1]["tries"], serde_json::json!([{ "backend": "bad", "cause": "HTTP 503" }]));
    assert_eq!(list[1]["client"], "anonymous");
    let status = zap.client().get("/status").json();
    let of = |i: usize, member: &str| status["backends"][i][member].as_u64().unwrap();
    assert_eq!((of(0, "requests"), of(0, "errors"), of(1, "requests")), (3, 0, 1));
    assert!(of(1, "errors") >= 4, "{status}");
    assert_eq!(status["clients"][0]["requests"], 4);
}

#[test]
fn each_failed_try_is_told_once_also_if_an_earlier_response_goes_to_the_client() {
    let busy = Provider::fixed(429, "retry-after: 30\r\n", "");
    let closed = crate::support::provider::backend(Provider::closed_port(), "closed", "priority = 1");
    let zap = Zap::with("[retry]\nmax_retries = 1\n", &[busy.backend("busy", ""), closed]);
    assert_eq!(zap.chat(CHAT).status, 429);
    let failures = || zap.client().get("/status").json()["failures"].as_array().unwrap().clone();
    let of_request = || failures().into_iter().find(|failure| failure["client"] == "anonymous");
    eventually("the failure is listed", || of_request().is_some());
    let failure = of_request().unwrap();
    let tries: Vec<_> = failure["tries"].as_array().unwrap().iter().map(|t| t["backend"].clone()).collect();
    assert_eq!(tries, ["busy", "closed"], "{failure}");
    assert_eq!(failure["outcome"], "the client got 429 of busy");
}

#[test]
fn a_client_that_closes_while_it_gets_an_error_has_got_the_error() {
    let a = Provider::start(|_, stream| {
        let _ = stream
            .write_all(b"HTTP/1.1 500 X\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n");
        while chunk(stream, &"x".repeat(64 * 1024)) {}
        After::Close
    });
    let zap = Zap::with("[retry]\nmax_retries = 0\n", &[a.backend("a", "")]);
    let mut client = zap.client();
    client.post("/chat", "", CHAT);
    assert_eq!(client.head().status, 500);
    drop(client);
    let failures = || zap.client().get("/status").json()["failures"].as_array().unwrap().clone();
    let of_request = || failures().into_iter().find(|failure| failure["client"] == "anonymous");
    eventually("the failure is listed", || of_request().is_some());
    let failure = of_request().unwrap();
    assert_eq!((&failure["outcome"], &failure["hurt"]), (&"the client got 500 of a".into(), &true.into()));
    assert_eq!(failure["tries"], serde_json::json!([{ "backend": "a", "cause": "HTTP 500" }]));
}

#[test]
fn a_backend_whose_only_model_is_out_tells_when_it_is_tried_again() {
    let a = Provider::fixed(500, "", "no");
    let zap = Zap::with("[health]\nfailure_threshold = 1\n", &[a.backend("a", "")]);
    assert_eq!(zap.chat(CHAT).status, 500);
    let backend = zap.client().get("/status").json()["backends"][0].clone();
    assert_eq!(backend["state"], "ejected");
    assert!(backend["retry_secs"].as_f64().is_some_and(|secs| (0.0..=60.0).contains(&secs)), "{backend}");
}

#[test]
fn a_client_error_is_no_failure() {
    let a = Provider::fixed(400, "", "{\"error\":{\"message\":\"no\"}}");
    let zap = Zap::with("", &[a.backend("a", "models = [\"m\"]")]);
    assert_eq!(zap.chat("{\"model\":\"m\",\"messages\":[]}").status, 400);
    assert_eq!(zap.chat("{\"model\":\"other\",\"messages\":[]}").status, 404);
    zap.client().get("/nothing");
    zap.wait_until_idle();
    assert_eq!(zap.client().get("/status").json()["failures"], serde_json::json!([]));
}

#[test]
fn the_rates_and_the_state_are_told_without_anybody_who_looked_before() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("a", "")]);
    eventually("the first look has been taken", || {
        zap.client().get("/status").json()["backends"][0]["history"]["requests"].as_array().unwrap().len()
            == 1
    });
    (0..20).for_each(|_| drop(zap.chat(CHAT)));
    let backend = zap.client().get("/status").json()["backends"][0].clone();
    assert_eq!(
        (&backend["requests"], &backend["history"]["requests"]),
        (&20.into(), &serde_json::json!([20]))
    );
    assert!(backend["requests_per_second"].as_f64().unwrap() > 1.0, "{backend}");
    assert_eq!((&backend["errors_per_second"], &backend["why"]), (&0.0.into(), &"".into()));
    assert!(backend["since"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn the_last_reload_is_told_with_its_fault() {
    let a = Provider::named("a");
    let file = File::new();
    let zap = Zap::with_file(&file, "", &[a.backend("a", "")]);
    let told = || zap.client().get("/status").json()["last_reload"].clone();
    assert_eq!(told(), serde_json::Value::Null);
    assert!(zap.reload());
    assert_eq!((&told()["applied"], &told()["fault"]), (&true.into(), &serde_json::Value::Null));
    file.write("colour = 1", &[a.backend("a", "")]);
    assert!(!zap.reload());
    assert_eq!(told()["applied"], false);
    assert!(told()["fault"].as_str().unwrap().contains("unknown key `colour`"), "{}", told());
}

#[test]
fn the_text_ends_with_a_newline_and_names_come_first() {
    let a = Provider::named("a");
    let zap = Zap::with("", &[a.backend("first", "")]);
    let text = zap.client().get("/status").text().to_owned();
    assert!(text.ends_with("}\n"), "{text}");
    let lines = ["  {\"name\":\"first\",", "  {\"name\":\"anonymous\","];
    assert!(lines.iter().all(|line| text.lines().any(|found| found.starts_with(line))), "{text}");
}
