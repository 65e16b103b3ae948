//! The table of client keys.

use std::fmt::Write as _;

use serde_json::Value;

use crate::gateway::status_page::words::{dollars, escape, grouped, percent, text_of, usd_of};

const HEAD: &str = "<h2 id=\"clients\">Clients</h2>\n<table role=\"table\" aria-labelledby=\"clients\">\n<thead role=\"rowgroup\"><tr role=\"row\">\
    <th role=\"columnheader\" scope=\"col\" class=\"key\">Key</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number\">Requests</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number\">Tokens in, out</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number minute\">Tokens in the last minute</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number money\">Spent today</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number money\">This month</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number budget\">Of the budget</th></tr></thead>\n<tbody role=\"rowgroup\">\n";

/// Renders the table.
pub(super) fn render(status: &Value) -> String {
    let mut out = String::from(HEAD);
    let all = status["clients"].as_array().into_iter().flatten();
    all.for_each(|client| row(&mut out, client));
    out.push_str("</tbody></table>\n");
    out
}

fn row(out: &mut String, client: &Value) {
    let number = |value: &Value| grouped(value.as_u64().unwrap_or_default());
    let used = &client["used"];
    let last_minute = match &client["tokens_per_minute"] {
        Value::Null => number(&used["tokens_last_minute"]),
        limit => {
            let (limit, left) =
                (limit["limit"].as_u64().unwrap_or_default(), limit["left"].as_u64().unwrap_or_default());
            format!("{} of {}", grouped(limit.saturating_sub(left)), grouped(limit))
        }
    };
    let (is_out, budget) = match &client["budget"] {
        Value::Null => (false, "no budget".into()),
        budget => {
            let (usd, spent) = (usd_of(&budget["usd"]), usd_of(&budget["spent_usd"]));
            let part = if usd > 0.0 { spent / usd * 100.0 } else { 100.0 };
            let text = format!(
                "{} of {} a {} ({})",
                dollars(&budget["spent_usd"]),
                dollars(&budget["usd"]),
                escape(text_of(&budget["per"])),
                percent(part)
            );
            (spent >= usd, text)
        }
    };
    let name = escape(text_of(&client["name"]));
    let class = if is_out { "warn" } else { "" };
    let _ = write!(
        out,
        "<tr role=\"row\" class=\"{class}\" data-client=\"{name}\"><th role=\"rowheader\" scope=\"row\">{name}</th>"
    );
    for (label, value) in [
        ("Requests", number(&client["requests"])),
        (
            "Tokens in, out",
            format!("{}, {}", number(&used["tokens"]["input"]), number(&used["tokens"]["output"])),
        ),
        ("Tokens in the last minute", last_minute),
        ("Spent today", dollars(&used["spent_today_usd"])),
        ("This month", dollars(&used["spent_this_month_usd"])),
        ("Of the budget", budget),
    ] {
        let _ = write!(out, "<td role=\"cell\" class=\"number\" data-label=\"{label}\">{value}</td>");
    }
    out.push_str("</tr>\n");
}
