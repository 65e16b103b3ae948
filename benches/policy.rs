//! The decisions that Zap makes for a request, each against a simple alternative, on one thread and on two.
//!
//! `cargo bench --bench policy` runs all, `cargo bench --bench policy -- limiter` one. A figure is the wall time
//! divided by the calls of *one* thread: if two threads do not slow each other down, it is the same as with one. Time
//! is simulated and passed to both sides, so no figure includes a clock read.

#![allow(missing_docs, reason = "criterion's macro writes a public function")]

use std::collections::{HashMap, VecDeque};
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main};
use tokio::sync::Semaphore;
use zap::internals::Log;
use zap::internals::Nanos;
use zap::internals::Shared;
use zap::internals::{Admission, Turn};
use zap::internals::{Breaker, Status, Thresholds};
use zap::internals::{Config, LogFormat};
use zap::internals::{Cursor, Schedule, Turns};
use zap::internals::{Limiter, WINDOW};

/// Measures `call` on one thread and on two. The arguments of `call` are the thread's number and a rising counter.
fn on_threads(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, call: impl Fn(u64, u64) + Sync) {
    let next = AtomicU64::new(0);
    for threads in [1u64, 2] {
        group.bench_function(format!("{name}/{threads}"), |b| {
            b.iter_custom(|n| {
                let from = next.fetch_add(n, Ordering::Relaxed);
                let barrier = &Barrier::new(threads as usize);
                std::thread::scope(|scope| {
                    let run = |thread| {
                        barrier.wait();
                        let start = Instant::now();
                        (from..from + n).for_each(|i| call(thread, i));
                        start.elapsed()
                    };
                    let others: Vec<_> = (1..threads).map(|t| scope.spawn(move || run(t))).collect();
                    let own = run(0);
                    others.into_iter().filter_map(|t| t.join().ok()).fold(own, Duration::max)
                })
            });
        });
    }
}

/// The simple alternative: a mutex around the state. A poisoned lock is used like any other.
fn locked<T, R>(mutex: &Mutex<T>, act: impl FnOnce(&mut T) -> R) -> R {
    act(&mut mutex.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Checks each key 50 times a minute under a limit of 60 (with two threads 100 times, so some checks are refused). The
/// window of a key stays filled: one request enters, one expires.
fn limiter(c: &mut Criterion) {
    const LIMIT: u32 = 60;
    for keys in [1, 1_000, 100_000] {
        let mut group = c.benchmark_group(format!("limiter/{keys} keys"));
        let at = |i: u64| i * (WINDOW / 50 / keys);
        // The threads are half a cycle of keys apart, so that they do not contend for the same key.
        let key = |thread: u64, i: u64| ((i + thread * keys / 2) % keys).wrapping_mul(0x9E37_79B9_7F4A_7C15);

        let ours = Limiter::new(200_000);
        on_threads(&mut group, "zap", |thread, i| {
            black_box(ours.check(key(thread, i), LIMIT, at(i)));
        });

        let naive: Mutex<HashMap<u64, VecDeque<Instant>>> = Mutex::default();
        let start = Instant::now();
        on_threads(&mut group, "mutex_map", |thread, i| {
            let now = start + Duration::from_nanos(at(i));
            black_box(locked(&naive, |map| {
                let log = map.entry(key(thread, i)).or_default();
                while log.front().is_some_and(|t| now.saturating_duration_since(*t).as_secs() >= 60) {
                    log.pop_front();
                }
                let admitted = log.len() < LIMIT as usize;
                if admitted {
                    log.push_back(now);
                }
                admitted
            }));
        });
        group.finish();
    }
}

/// Takes and releases a slot while there is room.
fn queue(c: &mut Criterion) {
    let mut group = c.benchmark_group("queue");
    let ours = Admission::new(1_024, 1_000);
    on_threads(&mut group, "zap", |_, _| drop(black_box(ours.enter(Turn::default()))));
    let semaphore = Arc::new(Semaphore::new(1_024));
    on_threads(&mut group, "semaphore", |_, _| drop(black_box(semaphore.clone().try_acquire_owned())));
    group.finish();
}

/// Picks a backend while all are eligible.
fn schedule(c: &mut Criterion) {
    for backends in [2, 200] {
        let mut group = c.benchmark_group(format!("schedule/{backends} backends"));
        let weights: Vec<u32> = (0..backends).map(|i| 1 + i % 5).collect();
        let ours = Schedule::new(weights.iter().copied().enumerate());
        let cursor = Cursor::default();
        let turns = Turns { cursor: &cursor, advance: true };
        on_threads(&mut group, "zap", |_, _| {
            black_box(ours.round_robin(turns, |_| true));
        });
        on_threads(&mut group, "zap_least_loaded", |_, _| {
            black_box(ours.least_loaded(turns, |_, weight| Some(1.0 / f64::from(weight))));
        });

        let total: i64 = weights.iter().map(|w| i64::from(*w)).sum();
        let credit = Mutex::new(vec![0i64; weights.len()]);
        on_threads(&mut group, "mutex_smooth", |_, _| {
            black_box(locked(&credit, |credit| {
                let mut best = 0;
                for (id, weight) in weights.iter().enumerate() {
                    credit[id] += i64::from(*weight);
                    if credit[id] > credit[best] {
                        best = id;
                    }
                }
                credit[best] -= total;
                best
            }));
        });
        group.finish();
    }
}

/// The whole choice for a request: the route of its model, a backend of that route, a permit of that backend.
fn pick(c: &mut Criterion) {
    for backends in [2, 20, 200] {
        let mut group = c.benchmark_group(format!("pick/{backends} backends"));
        for strategy in ["round_robin", "least_loaded", "prefix_hash"] {
            let shared = fleet(strategy, backends);
            on_threads(&mut group, strategy, |_, i| {
                let model = ["llama-8b", "llama-3.3-70b", "some-other"][i as usize % 3];
                black_box(shared.pick_once(model, i, i));
            });
        }
        group.finish();
    }
}

/// A configuration with `backends` backends that all serve the models of [`pick`], every second one under other names.
fn fleet(strategy: &str, backends: usize) -> Shared {
    let mut text = format!("[load_balancer]\nstrategy = \"{strategy}\"\n");
    for i in 0..backends {
        let models = [
            "[\"llama-8b\", \"llama-*\", \"*\"]",
            "{ llama-8b = \"l8\", \"llama-*\" = \"l\", \"*\" = \"o\" }",
        ][i % 2];
        let weight = 1 + i % 5;
        text +=
            &format!("[[backends]]\nurl = \"http://127.0.0.1:1\"\nweight = {weight}\nmodels = {models}\n");
    }
    let config = Config::parse(&text, "bench", Path::new(""), &|_| None);
    let config = config.unwrap_or_else(|faults| unreachable!("{faults}"));
    Shared::new(config, Log::start(LogFormat::Text)).unwrap_or_else(|what| unreachable!("{what}"))
}

/// The breaker calls of a request to a healthy backend; the alternative is a struct behind a mutex.
fn breaker(c: &mut Criterion) {
    #[derive(Default)]
    struct Plain {
        ejected: bool,
        failures: u32,
        cooling_until: Nanos,
        last_success: Nanos,
    }
    let plain_status = |b: &Plain, now| match b {
        Plain { ejected: true, .. } => Status::Ejected,
        Plain { cooling_until, .. } if *cooling_until > now => Status::Cooling(*cooling_until),
        _ => Status::Healthy,
    };
    let limits = Thresholds { interval: 0, failures: 1_000, successes: 1 };

    let mut group = c.benchmark_group("breaker");
    let ours = Breaker::new();
    on_threads(&mut group, "zap_status", |_, now| {
        black_box(ours.status(now));
    });
    on_threads(&mut group, "zap_success", |_, now| ours.success(now));
    on_threads(&mut group, "zap_failure_success", |_, now| {
        black_box(ours.failure(limits, 1));
        ours.success(now);
    });
    let plain = Mutex::new(Plain::default());
    on_threads(&mut group, "mutex_status", |_, now| {
        black_box(locked(&plain, |b| plain_status(b, now)));
    });
    on_threads(&mut group, "mutex_success", |_, now| {
        locked(&plain, |b| {
            b.failures = 0;
            b.last_success = now;
        });
    });
    on_threads(&mut group, "mutex_failure_success", |_, now| {
        locked(&plain, |b| {
            b.failures += 1;
            b.ejected |= b.failures >= limits.failures;
        });
        locked(&plain, |b| {
            b.failures = 0;
            b.last_success = now;
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = limiter, queue, schedule, pick, breaker
}
criterion_main!(benches);
