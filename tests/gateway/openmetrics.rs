//! `/metrics` as OpenMetrics, with exemplars, and compressed.

use std::io::Read as _;

use flate2::read::GzDecoder;

use crate::support::{CHAT, Provider, Response, STREAM, Zap, eventually};

const OPENMETRICS: &str = "accept: application/openmetrics-text; version=1.0.0, text/plain;q=0.5\r\n";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn metrics(zap: &Zap, headers: &str) -> Response {
    let mut client = zap.client();
    client.send(format!("GET /metrics HTTP/1.1\r\nhost: x\r\n{headers}\r\n"));
    client.response()
}

fn traced(flags: &str) -> String {
    format!("traceparent: 00-{TRACE}-00f067aa0ba902b7-{flags}\r\n")
}

/// The lines that have an exemplar.
fn exemplars(text: &str) -> Vec<&str> {
    text.lines().filter(|line| line.contains(" # {")).collect()
}

#[test]
fn the_format_is_that_of_the_accept_header() {
    let a = Provider::named("{}");
    let zap = Zap::with("", &[a.backend("a", "")]);
    for (accept, is_openmetrics) in [
        (OPENMETRICS, true),
        ("accept: application/openmetrics-text;q=0.4, text/plain;q=0.5\r\n", false),
        ("accept: */*\r\n", false),
        ("", false),
    ] {
        let page = metrics(&zap, accept);
        let want = match is_openmetrics {
            true => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            false => "text/plain; version=0.0.4; charset=utf-8",
        };
        assert_eq!(
            (page.header("content-type"), page.header("vary")),
            (Some(want), Some("accept, accept-encoding"))
        );
        assert_eq!(page.text().ends_with("# EOF\n"), is_openmetrics);
        assert_eq!(page.text().contains("# TYPE zap_requests counter\n"), is_openmetrics);
        assert_eq!(page.text().contains("# TYPE zap_requests_total counter\n"), !is_openmetrics);
        assert!(page.text().contains("\nzap_requests_total{"));
    }
}

#[test]
fn a_client_that_takes_gzip_gets_the_same_text_compressed() {
    let a = Provider::named("{}");
    let zap = Zap::with("", &[a.backend("a", "")]);
    let families = |text: &str| {
        text.lines().filter(|line| line.starts_with("# TYPE")).map(str::to_owned).collect::<Vec<_>>()
    };
    for accept in ["", OPENMETRICS] {
        let (plain, packed) =
            (metrics(&zap, accept), metrics(&zap, &format!("{accept}accept-encoding: gzip\r\n")));
        assert_eq!(
            (plain.header("content-encoding"), packed.header("content-encoding")),
            (None, Some("gzip"))
        );
        assert_eq!(packed.header("content-type"), plain.header("content-type"));
        let mut text = String::new();
        GzDecoder::new(&packed.body[..]).read_to_string(&mut text).unwrap();
        assert_eq!(families(&text), families(plain.text()));
        assert!(packed.body.len() * 4 < text.len(), "{} of {}", packed.body.len(), text.len());
    }
    assert_eq!(metrics(&zap, "accept-encoding: gzip;q=0\r\n").header("content-encoding"), None);
}

#[test]
fn the_last_recorded_trace_of_a_bucket_is_its_exemplar() {
    let a = Provider::fixed(
        200,
        "content-type: text/event-stream\r\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\ndata: [DONE]\n\n",
    );
    let zap = Zap::with("", &[a.backend("a", "")]);
    let text = |zap: &Zap| metrics(zap, OPENMETRICS).text().to_owned();
    for headers in ["", &traced("00"), "traceparent: x\r\n"] {
        assert_eq!(zap.client().chat(headers, STREAM).status, 200);
    }
    eventually("the requests are counted", || {
        zap.metric("zap_request_duration_seconds_count{endpoint=\"chat\"}") == 3.0
    });
    assert_eq!(exemplars(&text(&zap)), Vec::<&str>::new());
    assert_eq!(zap.client().chat(&traced("01"), STREAM).status, 200);
    eventually("there are exemplars", || exemplars(&text(&zap)).len() == 3);
    let page = text(&zap);
    for (line, family) in exemplars(&page).iter().zip([
        "zap_request_duration_seconds_bucket{endpoint=\"chat\",le=",
        "zap_backend_first_byte_seconds_bucket{backend=\"a\",le=",
        "zap_time_to_first_token_seconds_bucket{backend=\"a\",le=",
    ]) {
        assert!(
            line.starts_with(family) && line.contains(&format!(" # {{trace_id=\"{TRACE}\"}} 0.")),
            "{line}"
        );
        let bound = line.split("le=\"").nth(1).unwrap().split('"').next().unwrap();
        let mut fields = line.split("\"} ").last().unwrap().split(' ');
        let value: f64 = fields.next().unwrap().parse().unwrap();
        let at: f64 = fields.next().unwrap().parse().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((now - 60.0..now + 1.0).contains(&at), "{line}");
        assert!(bound == "+Inf" || value <= bound.parse().unwrap(), "{line}");
    }
    assert_eq!(exemplars(metrics(&zap, "").text()), Vec::<&str>::new(), "the text format has none");
}

#[test]
fn traces_of_zap_are_exemplars_too() {
    let (a, collector) = (Provider::named("{}"), Provider::fixed(200, "", ""));
    for (ratio, want) in [("1", 2), ("0", 0)] {
        let settings =
            format!("[otlp]\nendpoint = \"http://{}\"\nsample_ratio = {ratio}\n", collector.address);
        let zap = Zap::with(&settings, &[a.backend("a", "")]);
        assert_eq!(zap.chat(CHAT).status, 200);
        eventually("the request is counted", || {
            zap.metric("zap_request_duration_seconds_count{endpoint=\"chat\"}") == 1.0
        });
        assert_eq!(exemplars(metrics(&zap, OPENMETRICS).text()).len(), want);
    }
}
