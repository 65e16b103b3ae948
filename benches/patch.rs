//! Inserting a model into a body: Zap's scan and splice against simpler methods.
//!
//! `cargo bench --bench patch` runs all, `cargo bench --bench patch -- --quick text/1KB` a part. The table of targets
//! is printed first; `-- no-such` prints that table only. A body has no `model`, so every method has to insert one.
//! `memchr` searches for a byte that is not there, `quotes` finds every quote, and `copy` copies the body: the lower
//! bounds of code that reads or moves every byte.

#![allow(missing_docs, reason = "criterion's macro writes a public function")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use zap::internals::Scanner;
use zap::internals::{ModelText, Slices, slices, splices};

const SIZES: [(&str, usize); 6] = [
    ("200B", 200),
    ("1KB", 1_000),
    ("10KB", 10_000),
    ("100KB", 100_000),
    ("1MB", 1_000_000),
    ("10MB", 10_000_000),
];

/// The size of the pieces in which a body arrives.
const PIECE: usize = 16 << 10;

const ENGLISH: &str = "The request waits until a slot opens; then its body goes out as it came, and \"nobody\" \
    copies it.\nWhat is read once is not read again, and what is not needed is not read at all. ";
const MIXED: &str = "Запрос ждёт, пока не освободится место; потом его тело уходит таким, каким пришло. \
    依頼は空きが出るまで待ち、本文は届いたまま送られます。Grüße 😀 ";

/// A kind of body: its name, and a function that builds a body of about the given number of bytes.
type Shape = (&'static str, fn(usize) -> Value);

/// A conversation of many turns, one long string, many short members, non-ASCII text, and an image in base64.
const SHAPES: [Shape; 5] = [
    ("chat", |size| {
        let turn = |i: usize| {
            let role = if i == 0 { "system" } else { ["assistant", "user"][i % 2] };
            json!({"role": role, "content": repeated(ENGLISH, 90 + (i * 37 % 8) * 30)})
        };
        let turns = (0..size.div_ceil(160)).map(turn).collect::<Vec<_>>();
        json!({"messages": turns, "stream": true, "temperature": 0.7, "max_tokens": 256, "top_p": 1, "user": "u-1"})
    }),
    ("text", |size| one_message(json!(repeated(ENGLISH, size)))),
    ("members", |size| {
        let message =
            |i| json!({"role": "user", "name": "a", "id": i, "ok": true, "score": 0.5, "content": "hi"});
        json!({"messages": (0..size / 73).map(message).collect::<Vec<_>>()})
    }),
    ("non-ascii", |size| one_message(json!(repeated(MIXED, size)))),
    ("base64", |size| {
        let url = format!("data:image/png;base64,{}", repeated("iVBORw0KGgoAAAANSUhEUgAA+/9j", size));
        one_message(json!([{"type": "image_url", "image_url": {"url": url}}]))
    }),
];

fn repeated(text: &str, size: usize) -> String {
    let room = size.saturating_sub(90);
    let mut out = String::with_capacity(room + text.len());
    while out.len() < room {
        out.push_str(text);
    }
    out.truncate(out.floor_char_boundary(room));
    out
}

fn one_message(content: Value) -> Value {
    json!({"messages": [{"role": "user", "content": content}], "stream": true, "temperature": 0.7})
}

fn zap(chunks: &[Bytes], model: &ModelText) -> Option<Slices> {
    let mut scanner = Scanner::default();
    chunks.iter().try_for_each(|c| scanner.feed(c)).ok()?;
    let fields = scanner.finish().ok()?;
    fields.check(true, true).ok()?;
    Some(slices(chunks, splices(&fields, Some(model), |_| false)))
}

fn parse_and_rewrite(body: &[u8]) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(body).ok()?;
    value["model"] = Value::from("gpt-4o");
    serde_json::to_vec(&value).ok()
}

fn raw_values(body: &[u8]) -> Option<Vec<u8>> {
    let mut members: BTreeMap<String, &RawValue> = serde_json::from_slice(body).ok()?;
    members.insert("model".to_owned(), serde_json::from_str("\"gpt-4o\"").ok()?);
    serde_json::to_vec(&members).ok()
}

/// Finds every quote, one by one.
fn quotes(body: &[u8]) {
    for at in memchr::memchr_iter(b'"', body) {
        black_box(at);
    }
}

fn patch(c: &mut Criterion) {
    let model = ModelText::new("gpt-4o");
    for (shape, build) in SHAPES {
        for (label, size) in SIZES {
            let body = Bytes::from(build(size).to_string());
            let chunks: Vec<Bytes> =
                (0..body.len()).step_by(PIECE).map(|at| body.slice(at..body.len().min(at + PIECE))).collect();
            assert!(zap(&chunks, &model).is_some() && parse_and_rewrite(&body).is_some());
            assert!(raw_values(&body).is_some() && memchr::memchr(0, &body).is_none());

            let mut group = c.benchmark_group(format!("patch/{shape}/{label}"));
            group.throughput(Throughput::Bytes(body.len() as u64));
            group.bench_function("zap", |b| b.iter(|| zap(black_box(&chunks), &model)));
            group.bench_function("serde_json", |b| b.iter(|| parse_and_rewrite(black_box(&body))));
            group.bench_function("raw_value", |b| b.iter(|| raw_values(black_box(&body))));
            group.bench_function("memchr", |b| b.iter(|| memchr::memchr(0, black_box(&body))));
            group
                .bench_function("quotes", |b| b.iter(|| memchr::memchr_iter(b'"', black_box(&body)).count()));
            group.bench_function("copy", |b| b.iter(|| black_box(&body).to_vec()));
            group.finish();
        }
    }
}

/// A row of the table: the shape, the size in bytes, the target (at most so many microseconds or at least so many
/// GB/s), another method, and the required speed relative to that method.
type Row = (&'static str, usize, Target, &'static str, f64);

enum Target {
    Micros(f64),
    Gigabytes(f64),
}

const ROWS: [Row; 6] = [
    ("chat", 1_000, Target::Micros(0.4), "serde_json", 8.0),
    ("text", 1_000, Target::Micros(0.4), "serde_json", 8.0),
    ("text", 100_000, Target::Gigabytes(4.0), "quotes", 0.5),
    ("non-ascii", 100_000, Target::Gigabytes(2.0), "serde_json", 1.0),
    ("base64", 1_000_000, Target::Gigabytes(8.0), "serde_json", 1.0),
    ("members", 100_000, Target::Gigabytes(0.8), "serde_json", 1.0),
];

/// The shortest time of one call of each function, in seconds. Batches of the functions alternate.
fn shortest(functions: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    const BATCHES: usize = 40;
    let mut best = vec![f64::INFINITY; functions.len()];
    for _ in 0..BATCHES {
        for (function, best) in functions.iter_mut().zip(&mut best) {
            let start = Instant::now();
            let mut calls = 0;
            while start.elapsed() < Duration::from_millis(3) {
                (0..8).for_each(|_| function());
                calls += 8;
            }
            *best = best.min(start.elapsed().as_secs_f64() / f64::from(calls));
        }
    }
    best
}

/// Prints the measured speed of the patcher beside its targets, all from one run.
fn table(_: &mut Criterion) {
    let model = ModelText::new("gpt-4o");
    println!(
        "\nbody              bytes     zap us   GB/s  of serde_json  of raw_value  of quotes  of memchr  target"
    );
    for (name, size, target, other, times) in ROWS {
        let Some((_, build)) = SHAPES.iter().find(|(shape, _)| *shape == name) else { continue };
        let body = Bytes::from(build(size).to_string());
        let chunks: Vec<Bytes> =
            (0..body.len()).step_by(PIECE).map(|at| body.slice(at..body.len().min(at + PIECE))).collect();
        let t = shortest(&mut [
            &mut || drop(black_box(zap(black_box(&chunks), &model))),
            &mut || drop(black_box(parse_and_rewrite(black_box(&body)))),
            &mut || drop(black_box(raw_values(black_box(&body)))),
            &mut || quotes(black_box(&body)),
            &mut || {
                black_box(memchr::memchr(0, black_box(&body)));
            },
        ]);
        let ratio = |i: usize| t[i] / t[0];
        let speed = body.len() as f64 / t[0] / 1e9;
        let (met, text) = match target {
            Target::Micros(most) => (t[0] * 1e6 <= most, format!("{most} us")),
            Target::Gigabytes(least) => (speed >= least, format!("{least} GB/s")),
        };
        let met = met && ratio(if other == "quotes" { 3 } else { 1 }) >= times;
        println!(
            "{name:10} {:>12} {:>10.3} {speed:>6.2} {:>13.1}x {:>12.1}x {:>9.2}x {:>9.2}x  {text}, {times}x {other}: {}",
            body.len(),
            t[0] * 1e6,
            ratio(1),
            ratio(2),
            ratio(3),
            ratio(4),
            if met { "met" } else { "not met" }
        );
    }
}

/// The cost of chunking: the same 1 MB in pieces of different sizes.
fn pieces(c: &mut Criterion) {
    let model = ModelText::new("gpt-4o");
    let body = Bytes::from(SHAPES[0].1(1_000_000).to_string());
    let mut group = c.benchmark_group("pieces");
    group.throughput(Throughput::Bytes(body.len() as u64));
    for piece in [1_000, 16_000, 64_000, 1_000_000] {
        let chunks: Vec<Bytes> =
            (0..body.len()).step_by(piece).map(|at| body.slice(at..body.len().min(at + piece))).collect();
        group.bench_function(BenchmarkId::from_parameter(piece), |b| {
            b.iter(|| zap(black_box(&chunks), &model))
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = table, patch, pieces
}
criterion_main!(benches);
