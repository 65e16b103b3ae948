//! The table of backends, the worst first.

use std::fmt::Write as _;

use serde_json::Value;

use crate::gateway::status_page::words::{
    Level, Words, again, dollars, escape, grouped, millis, rate, span, state_of, text_of,
};

const HEAD: &str = "<h2 id=\"backends\">Backends</h2>\n<table role=\"table\" aria-labelledby=\"backends\">\n<thead role=\"rowgroup\"><tr role=\"row\">\
    <th role=\"columnheader\" scope=\"col\" class=\"name\">Name</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"state\">State</th>\
    <th role=\"columnheader\" scope=\"col\">Why</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number count\">In flight</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number count\">Requests/s</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number count\">Errors/s</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number times\">First token<br>p50, p95</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number count\">Tokens/s</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number count\">Cost today</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"line\">Last 5 min</th></tr></thead>\n<tbody role=\"rowgroup\">\n";

/// Rows between two times of giving way to threads that wait for the core.
const STRETCH: usize = 8;

/// Renders the table.
pub(super) fn render(status: &Value, words: &Words) -> String {
    let mut all: Vec<_> = status["backends"].as_array().into_iter().flatten().collect();
    all.sort_by_key(|backend| state_of(backend).0);
    let mut out = String::from(HEAD);
    for (at, backend) in all.into_iter().enumerate() {
        row(&mut out, backend, words);
        if at % STRETCH == 0 {
            std::thread::yield_now();
        }
    }
    out.push_str(
        "</tbody></table>\n<p class=\"soft\">Requests/s and errors/s are of the last 10 s, tokens/s of the last minute, the \
         first token of the last 5 min. A bar is 5 s: answers up, failed tries down.</p>\n",
    );
    out
}

fn row(out: &mut String, backend: &Value, words: &Words) {
    let (level, word) = state_of(backend);
    let (class, sign) = (level.class(), level.sign());
    let (name, state) = (escape(text_of(&backend["name"])), escape(text_of(&backend["state"])));
    let since = span(words.age(&backend["since"]));
    let why = match text_of(&backend["why"]) {
        "" if level == Level::Good => "takes requests".into(),
        why => escape(why),
    };
    let _ = write!(
        out,
        "<tr role=\"row\" class=\"{class}\" data-backend=\"{name}\" data-state=\"{state}\"><th role=\"rowheader\" scope=\"row\">{name}</th>\
         <td role=\"cell\" class=\"wide\"><span class=\"badge\"><span aria-hidden=\"true\">{sign}</span> {word}</span>\
         <span class=\"small\">for {since}{}</span></td><td role=\"cell\" class=\"why wide\" data-label=\"Why\">{why}{}</td>",
        again(backend),
        last_failure(backend, words),
    );
    let in_flight = backend["in_flight"].as_u64().unwrap_or_default();
    let in_flight = match backend["max_in_flight"].as_u64() {
        Some(max) => format!("{in_flight} of {max}"),
        None => in_flight.to_string(),
    };
    let first = &backend["first_token_ms"];
    let first = match first {
        Value::Null => "\u{2013}".into(),
        first => format!("{}, {}", millis(&first["p50"]), millis(&first["p95"])),
    };
    let fails = if backend["errors_per_second"].as_f64() > Some(0.0) { " fails" } else { "" };
    for (label, class, value) in [
        ("In flight", "", in_flight),
        ("Requests/s", "", rate(&backend["requests_per_second"])),
        ("Errors/s", fails, rate(&backend["errors_per_second"])),
        ("First token p50, p95", "", first),
        ("Tokens/s", "", rate(&backend["tokens_per_second"])),
        ("Cost today", "", dollars(&backend["used"]["spent_today_usd"])),
    ] {
        let _ = write!(out, "<td role=\"cell\" class=\"number{class}\" data-label=\"{label}\">{value}</td>");
    }
    out.push_str("<td role=\"cell\" class=\"wide\" data-label=\"Last 5 min\">");
    sparkline(out, &backend["history"]);
    out.push_str("</td></tr>\n");
}

/// The last failure, unless it is the reason of the state already.
fn last_failure(backend: &Value, words: &Words) -> String {
    let error = &backend["last_error"];
    let cause = text_of(&error["cause"]);
    if error.is_null() || text_of(&backend["why"]).contains(cause) {
        return String::new();
    }
    let age = span(words.age(&error["at"]));
    format!("<span class=\"small\">last failure {age} ago: {}</span>", escape(cause))
}

/// Width of a step, in units of the drawing.
const STEP: usize = 2;

/// Steps that the drawing has room for.
const STEPS: usize = 60;

/// Draws the responses of each step upwards and the failed tries downwards: the side tells them apart, not the colour.
fn sparkline(out: &mut String, history: &Value) {
    let steps = |name: &str| -> Vec<u64> {
        let all: Vec<u64> =
            history[name].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        all[all.len().saturating_sub(STEPS)..].to_vec()
    };
    let (requests, errors) = (steps("requests"), steps("errors"));
    let sums = [&requests, &errors].map(|steps| grouped(steps.iter().sum()));
    // One scale for both, so that the two sides may be compared; what is there is seen.
    let peak = requests.iter().chain(&errors).copied().max().unwrap_or_default();
    let most = peak.max(1) as f64;
    let bars = |steps: &[u64], room: f64| {
        let mut path = String::new();
        for (at, n) in steps.iter().enumerate().filter(|(_, n)| **n > 0) {
            let x = STEP * (STEPS - steps.len() + at) + STEP / 2;
            let _ = write!(path, "M{x} 18v{:.1}", room.signum() * (*n as f64 / most * room.abs()).max(1.5));
        }
        path
    };
    let _ = write!(
        out,
        "<svg role=\"img\" viewBox=\"0 0 120 30\" aria-label=\"{} requests answered, {} tries failed\"><path class=\"zero\" d=\"M0 18h120\"/>\
         <path class=\"requests\" d=\"{}\"/><path class=\"errors\" d=\"{}\"/></svg>\
         <span class=\"small\">at most {} in 5 s</span>",
        sums[0],
        sums[1],
        bars(&requests, -17.0),
        bars(&errors, 12.0),
        grouped(peak),
    );
}
