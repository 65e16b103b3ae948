//! The real binary under load for a given time, and figures that take too long to measure in a test.
//!
//! `cargo test --release --test soak -- [--secs N]` mixes plain and streamed requests, clients that disconnect,
//! providers that fail, and reloads for N seconds (default 60). Then it checks memory, open files, gauges and
//! unexpected responses, and exits with 1 if a check fails.
//!
//! `-- leave | kill | reload | drain | hold [--secs N] | dead | silent | slow | burst | series | keys | truth |
//! streams [--secs N] | ledger [--kills N] | rolling [--times N] | upgrade [--times N] | swap [--times N]` prints one
//! figure of tests/README.md and exits with 1 if its target is missed; `-- figures` prints all of them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A run that cannot continue must panic.

#[path = "../gateway/support/lies.rs"]
#[allow(dead_code)] // The gateway's tests use the rest.
mod lies;

#[path = "../gateway/support/tls_client.rs"]
#[allow(dead_code)] // As above.
mod tls_client;

mod balancer;

mod deploys;

mod ledger;

mod load;

mod memory;

mod mixed;

mod provider;

mod scenes;

mod streams;

mod swap;

mod truth;

mod zap;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let after = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1));
    let number = |name: &str, default: u64| {
        after(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} needs a number")))
    };
    let scene = args.first().filter(|a| !a.starts_with("--")).map_or("mixed", String::as_str);
    if let Err(e) = zap::raise_file_limit() {
        eprintln!("cannot raise the limit of open files: {e}");
    }
    let threads = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let secs = number("--secs", if scene == "hold" { 300 } else { 60 });
    let fine = match scene {
        "provider" => {
            threads.block_on(provider::run(number("--port", 0) as u16, number("--fail", 0)));
            true
        }
        "mixed" => threads.block_on(mixed::run(secs)),
        "ledger" => threads.block_on(ledger::run(number("--kills", 20))),
        "burst" => threads.block_on(memory::burst()),
        "slow" => threads.block_on(memory::slow()),
        "leave" => threads.block_on(scenes::leave()),
        "kill" => threads.block_on(scenes::kill()),
        "reload" => threads.block_on(scenes::reload()),
        "drain" => threads.block_on(scenes::drain()),
        "hold" => threads.block_on(scenes::hold(secs)),
        "dead" => threads.block_on(scenes::dead()),
        "keys" => scenes::keys(),
        "silent" => threads.block_on(scenes::silent()),
        "series" => threads.block_on(scenes::series()),
        "streams" => threads.block_on(streams::run(secs)),
        "truth" => threads.block_on(truth::run()),
        "rolling" => threads.block_on(deploys::rolling(number("--times", 2))),
        "upgrade" => threads.block_on(deploys::upgrade(number("--times", 5))),
        "swap" => threads.block_on(swap::run(number("--times", 1))),
        "figures" => threads.block_on(async {
            let mut fine = scenes::leave().await;
            fine &= scenes::kill().await;
            fine &= scenes::reload().await;
            fine &= scenes::drain().await;
            fine &= scenes::dead().await;
            fine &= scenes::silent().await;
            fine &= memory::slow().await;
            fine &= memory::burst().await;
            fine &= scenes::series().await;
            fine &= scenes::keys();
            fine &= truth::run().await;
            fine &= ledger::run(100).await;
            fine &= streams::run(60).await;
            fine &= deploys::rolling(5).await;
            fine &= deploys::upgrade(20).await;
            fine &= swap::run(5).await;
            fine & scenes::hold(number("--secs", 300)).await
        }),
        other => panic!("unknown scene {other:?}"),
    };
    ExitCode::from(u8::from(!fine))
}
