//! The table of the last failures.

use std::fmt::Write as _;

use serde_json::Value;

use crate::gateway::status_page::words::{Words, escape, grouped, span, text_of};

const HEAD: &str = "<h2 id=\"failures\">Last failures</h2>\n<table role=\"table\" aria-labelledby=\"failures\">\n<thead role=\"rowgroup\"><tr role=\"row\">\
    <th role=\"columnheader\" scope=\"col\" class=\"last\">Last</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"number often\">Times</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"who\">Client</th>\
    <th role=\"columnheader\" scope=\"col\" class=\"who\">Model</th>\
    <th role=\"columnheader\" scope=\"col\">What failed</th>\
    <th role=\"columnheader\" scope=\"col\">What became of the request</th></tr></thead>\n<tbody role=\"rowgroup\">\n";

/// Renders the table; a sentence if nothing has failed.
pub(super) fn render(status: &Value, words: &Words) -> String {
    let all = status["failures"].as_array().map(Vec::as_slice).unwrap_or_default();
    if all.is_empty() {
        return "<h2>Last failures</h2>\n<p class=\"soft\">Nothing has failed since the start.</p>\n".into();
    }
    let mut out = String::from(HEAD);
    all.iter().for_each(|failure| row(&mut out, failure, words));
    out.push_str("</tbody></table>\n");
    out
}

fn row(out: &mut String, failure: &Value, words: &Words) {
    let count = failure["count"].as_u64().unwrap_or_default();
    let tries = failure["tries"].as_array().into_iter().flatten();
    let tries: Vec<_> = tries
        .map(|one| {
            format!(
                "<strong>{}</strong>: {}",
                escape(text_of(&one["backend"])),
                escape(text_of(&one["cause"]))
            )
        })
        .collect();
    let what = if tries.is_empty() { "no try".into() } else { tries.join("<br>then ") };
    let since = match count {
        0 | 1 => String::new(),
        _ => format!("<span class=\"small\">since {}</span>", words.clock(&failure["first_at"])),
    };
    let or_dash = |value: &Value| match text_of(value) {
        "" => "\u{2013}".into(),
        text => escape(text),
    };
    let class = if failure["hurt"] == true { "warn" } else { "off" };
    let _ = writeln!(
        out,
        "<tr role=\"row\" class=\"{class}\"><th role=\"rowheader\" scope=\"row\">{}<span class=\"small\">{} ago</span></th>\
         <td role=\"cell\" class=\"number\" data-label=\"Times\">{}{since}</td><td role=\"cell\" data-label=\"Client\">{}</td>\
         <td role=\"cell\" data-label=\"Model\">{}</td><td role=\"cell\" class=\"wide\" data-label=\"What failed\">{what}</td>\
         <td role=\"cell\" class=\"wide\" data-label=\"What became of the request\">{}</td></tr>",
        words.clock(&failure["at"]),
        span(words.age(&failure["at"])),
        grouped(count),
        or_dash(&failure["client"]),
        or_dash(&failure["model"]),
        or_dash(&failure["outcome"]),
    );
}
