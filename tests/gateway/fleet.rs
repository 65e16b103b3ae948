//! Four backends with different names for the same models; each of them fails in turn.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::support::provider::{After, chunk, end_chunks, reply, start_events};
use crate::support::{Provider, Zap, eventually};

/// A provider that accepts only its own model names, and fails every request while `down` is set.
fn provider(own: &'static [&'static str], down: Arc<AtomicBool>) -> Provider {
    let n = AtomicUsize::new(0);
    Provider::start(move |seen, stream| {
        if down.load(Ordering::SeqCst) {
            // An outage shows as a closed connection, a 503 or a 429.
            match n.fetch_add(1, Ordering::SeqCst) % 3 {
                0 => return After::Close,
                1 => reply(stream, 503, "", b"down"),
                _ => reply(stream, 429, "retry-after: 1\r\n", b"busy"),
            }
            return After::Keep;
        }
        let body: serde_json::Value = serde_json::from_slice(&seen.body).unwrap();
        let model = body["model"].as_str().unwrap_or_default();
        if !own.contains(&model) {
            reply(stream, 404, "", format!("no model {model:?} here").as_bytes());
        } else if body["stream"] == true {
            start_events(stream);
            chunk(stream, "data: {}\n\n");
            chunk(stream, "data: [DONE]\n\n");
            end_chunks(stream);
        } else {
            reply(stream, 200, "", b"fine");
        }
        After::Keep
    })
}

#[test]
fn a_rolling_outage_fails_no_request() {
    let down: Vec<Arc<AtomicBool>> = (0..4).map(|_| Arc::default()).collect();
    let own: [&[&str]; 4] = [
        &["llama-8b-instant", "llama-70b"],
        &["llama3.1-8b"],
        &["gpt-4o", "llama-70b-or"],
        &["llama3:8b", "l70"],
    ];
    let providers: Vec<_> = own.iter().zip(&down).map(|(own, down)| provider(own, down.clone())).collect();
    let backends = [
        providers[0].backend("groq", "weight = 3\nmodels = [\"llama-8b-instant\", \"llama-70b\"]\ndefault_model = \"llama-8b-instant\""),
        providers[1].backend("cerebras", "models = { llama-8b-instant = \"llama3.1-8b\" }\ndefault_model = \"llama3.1-8b\""),
        providers[2].backend("openai", "models = { gpt-4o = \"gpt-4o\", llama-70b = \"llama-70b-or\" }"),
        providers[3].backend("local", "max_in_flight = 4\nmodels = { \"llama-8b-*\" = \"llama3:8b\", \"llama-70*\" = \"l70\" }"),
    ];
    let settings = "[health]\ninterval_secs = 1\n[retry]\nbase_delay_ms = 1\nmax_retries = 3\nbudget_percent = 100\n\
        [models.smart]\ntargets = [{ backend = \"openai\", model = \"gpt-4o\" }, { backend = \"groq\", model = \"llama-70b\", priority = 1 }]\n";
    let zap = Zap::with(settings, &backends);
    let stop = AtomicBool::new(false);
    let bodies = [
        "{\"messages\":[]}",
        "{\"messages\":[],\"model\":\"llama-8b-instant\"}",
        "{\"messages\":[],\"model\":\"llama-8b-instant\",\"stream\":true}",
        "{\"messages\":[],\"model\":\"llama-70b\"}",
        "{\"messages\":[],\"model\":\"smart\"}",
    ];
    let served = AtomicUsize::new(0);
    std::thread::scope(|s| {
        for t in 0..4 {
            let (zap, stop, served, bodies) = (&zap, &stop, &served, &bodies);
            s.spawn(move || {
                let mut client = zap.client();
                for i in t.. {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    let answer = client.chat("", bodies[i % bodies.len()]);
                    let body = String::from_utf8_lossy(&answer.body).into_owned();
                    assert_eq!(answer.status, 200, "{}: {body}", bodies[i % bodies.len()]);
                    assert!(answer.whole && (body == "fine" || body.ends_with("[DONE]\n\n")), "{body}");
                    served.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        // Stops the threads even if an assertion fails.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _stop = Stop(&stop);
        let more = |n: usize| {
            let from = served.load(Ordering::SeqCst);
            eventually("enough requests are served", || served.load(Ordering::SeqCst) >= from + n);
        };
        for (i, (provider, down)) in providers.iter().zip(&down).enumerate() {
            more(200);
            down.store(true, Ordering::SeqCst);
            provider.set_health(503);
            more(400);
            down.store(false, Ordering::SeqCst);
            provider.set_health(200);
            // Only one backend may be down at a time: wait until this one is back and no longer cools down.
            let state =
                || zap.client().get("/status").json()["backends"][i]["state"].as_str().map(str::to_owned);
            eventually("the backend is available again", || {
                state().is_some_and(|s| s == "healthy" || s == "full")
            });
        }
    });
    for (i, provider) in providers.iter().enumerate() {
        assert!(provider.count() > 50, "provider {i} got only {} requests", provider.count());
    }
    zap.wait_until_idle();
}
