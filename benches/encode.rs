//! Encoding of a `/metrics` page: Zap's encoder against `format!`.
//!
//! `cargo bench --bench encode`. Both sides write the same bytes: per backend, five counters with two labels and
//! one histogram.

#![allow(missing_docs, reason = "criterion's macro writes a public function")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use zap::internals::Encoder;
use zap::internals::SECOND;
use zap::internals::{Histogram, REQUEST, Total};

const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

fn by_encoder(backends: &[String], times: &Total) -> String {
    let mut out = Encoder::default();
    out.family("a_requests_total", "counter", "Requests by backend and class.");
    for (i, backend) in backends.iter().enumerate() {
        for class in CLASSES {
            out.sample("a_requests_total", &[("backend", backend), ("class", class)], 1_000_003 * i as u64);
        }
    }
    out.family("a_seconds", "histogram", "Times by backend.");
    for backend in backends {
        out.histogram("a_seconds", &[("backend", backend)], times);
    }
    out.finish()
}

fn by_format(backends: &[String], times: &Total) -> String {
    let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let seconds = |nanos: u64| nanos as f64 / SECOND as f64;
    let mut out = String::new();
    let family = |name: &str, kind: &str, help: &str| format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    out += &family("a_requests_total", "counter", "Requests by backend and class.");
    for (i, backend) in backends.iter().enumerate() {
        for class in CLASSES {
            let (backend, value) = (escaped(backend), 1_000_003 * i as u64);
            out += &format!("a_requests_total{{backend=\"{backend}\",class=\"{class}\"}} {value}\n");
        }
    }
    out += &family("a_seconds", "histogram", "Times by backend.");
    for backend in backends {
        let label = format!("backend=\"{}\"", escaped(backend));
        for (bound, count) in &times.cumulative {
            out += &format!("a_seconds_bucket{{{label},le=\"{}\"}} {count}\n", seconds(*bound));
        }
        out += &format!("a_seconds_bucket{{{label},le=\"+Inf\"}} {}\n", times.count);
        out += &format!("a_seconds_sum{{{label}}} {}\n", seconds(times.sum));
        out += &format!("a_seconds_count{{{label}}} {}\n", times.count);
    }
    out
}

fn encode(c: &mut Criterion) {
    let histogram = Histogram::new(REQUEST);
    (0..1_000).for_each(|i| histogram.record(i * i * 300_001));
    let times = Total::of(REQUEST, std::iter::once(&histogram));
    let mut group = c.benchmark_group("encode");
    for n in [2, 20, 200] {
        let backends: Vec<String> = (0..n).map(|i| format!("provider-{i}.example")).collect();
        let text = by_encoder(&backends, &times);
        assert_eq!(text, by_format(&backends, &times));
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(BenchmarkId::new("zap", n), |b| {
            b.iter(|| by_encoder(black_box(&backends), &times))
        });
        group.bench_function(BenchmarkId::new("format", n), |b| {
            b.iter(|| by_format(black_box(&backends), &times))
        });
    }
    group.finish();
}

criterion_group!(benches, encode);
criterion_main!(benches);
