//! Zap: an LLM inference gateway. One OpenAI-compatible endpoint in front of many providers.
//!
//! # How a request travels
//! Read the modules in this order to follow a request. `cargo doc --document-private-items` shows all of them.
//!
//! 1. [`server`] accepts connections on the control thread and gives each to the worker with the fewest. A worker is a
//!    thread with a runtime of its own. It owns its client connections and its upstream connections, so a request never
//!    changes its thread. Another thread runs health checks, rebuilds schedules and applies a new configuration.
//! 2. [`client`] is the client's side of a connection: TLS, limits of time, one request after the other
//!    ([`client::exchange`]), the response body. It knows no policy.
//! 3. [`gateway`] handles one request: [`protocol::endpoint`] names the endpoint, [`gateway::caller`] the client;
//!    [`gateway::intake`] reads the body, in the memory of [`gateway::buffered`]; [`gateway::ask`] finds the route, and
//!    with [`gateway::learned_ids`] the backend that made what the request refers to; [`gateway::reserve`] reserves the
//!    tokens and the money that it may use; [`gateway::admit`] waits for a slot; [`gateway::attempt`] makes the tries;
//!    [`gateway::opening`] reads of a response what decides whether it is an answer; [`gateway::backend_queue`] waits
//!    for a busy backend; [`gateway::relay`] passes the response on. A refusal is a row of [`gateway::refusal`].
//! 4. [`policy`] decides without I/O. [`policy::dispatch`] says what is next: a try, a wait, a backoff, the response,
//!    an error; and who is to blame for a failure. [`policy::choose`] picks the target. [`policy::breaker`] knows which
//!    backends may get requests, [`policy::pair`] which of their models; the limiter, the admission queue and the retry
//!    budget are their neighbours.
//! 5. [`upstream`] speaks to backends: [`upstream::fleet`] is the snapshot of all of them, [`upstream::send`] makes one
//!    try on a pooled or fresh connection, [`upstream::fault`] names the cause of a failure.
//! 6. [`telemetry`] takes one record of each finished request and makes metrics, a log line and a trace of it.
//!
//! Below these stand modules that know nothing of a request: [`config`] is the operator's file, valid by construction;
//! [`protocol`] knows the OpenAI API; [`json`] scans and patches bodies; [`http1`] reads and writes heads; [`code`]
//! lists the codes; [`clock`], [`time`] and [`counter`] serve all. Each module imports only from modules below it;
//! `tests/layers.rs` holds the order.
//!
//! Where to change what:
//! - *whether a request is tried again, waits for a busy backend or fails*: [`policy::dispatch`]; how long it may wait
//!   there: [`gateway::backend_queue`]; *whether it waits for a slot of the gateway*: [`policy::queue`]; *who is
//!   next then*: [`policy::lines`];
//! - *which target a strategy picks*: [`policy::choose`], with the turns of [`policy::balance`] and the times of
//!   [`policy::latency`];
//! - *who is to blame for a failed try*: `policy/dispatch/judge.rs` and `policy/dispatch/blame.rs`;
//! - *what an event of a stream means*: [`protocol::event_class`]; when a stream is over: [`protocol::event_stream`];
//! - *a new endpoint*: a variant and a row in [`protocol::endpoint`];
//! - *a header that is dropped*: [`http1::headers`], in both directions; *a header that Zap adds to a response, or
//!   redacts there*: `gateway/response.rs`;
//! - *a limit of requests*: [`policy::limit`]; *of tokens*: [`policy::token_window`]; *of money*: [`policy::spend`];
//!   *of a backend*: [`policy::quota`]; *of memory*: [`policy::byte_budget`];
//!   *of connections*: [`client::connection_limit`]; *of what the kernel holds of a response*: `server/listeners.rs`
//!   and `upstream/receive_window.rs`;
//! - *how a backend with several keys is run*: `config/key_pool.rs`, and `policy/dispatch/keys.rs`;
//! - *a new error*: one row in [`gateway::refusal`], one code in [`code`];
//! - *a new metric*: [`telemetry::metrics`]; *a new key*: [`config`].
//!
//! Beside them: [`cli`] is the command line, [`manual`] what `zap help` prints, [`demo`] the built-in mock providers.

// The modules are private; their documentation links to one another.
#![allow(rustdoc::private_intra_doc_links)]

mod time;

mod clock;

mod code;

mod counter;

mod json;

mod http1;

mod protocol;

mod policy;

mod config;

mod upstream;

mod telemetry;

mod client;

mod gateway;

mod server;

mod demo;

pub mod cli;

mod manual;

#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;

/// What the project's own tests and benchmarks use beside [`run`]; no part of the interface.
#[doc(hidden)]
pub mod internals {
    pub use crate::config::{Config, Faults, LoadError, LogFormat, ModelsFrom};
    pub use crate::counter::{Histogram, REQUEST, Total};
    pub use crate::gateway::failpoint;
    pub use crate::gateway::state::Shared;
    pub use crate::json::patch::{ModelText, Slices, slices, splices};
    pub use crate::json::scan::Scanner;
    pub use crate::policy::balance::{Cursor, Schedule, Turns};
    pub use crate::policy::breaker::{Breaker, Status, Thresholds};
    pub use crate::policy::limit::{Decision, Limiter, WINDOW};
    pub use crate::policy::queue::{Admission, Turn};
    pub use crate::server::drain::{Order, orders};
    pub use crate::server::setup::Setup;
    pub use crate::telemetry::encode::Encoder;
    pub use crate::telemetry::log::Log;
    pub use crate::time::{Nanos, SECOND};
}

use std::fmt;
use std::io;
use std::sync::Arc;

use tokio::sync::mpsc::Receiver;

use crate::config::Config;
use crate::gateway::state::Shared;
use crate::server::drain::Order;
use crate::server::setup::Setup;
use crate::server::start::log_start;
use crate::telemetry::ledger::Ledger;
use crate::telemetry::ledger::writer::Writer;
use crate::telemetry::log::Log;

/// Why [`run`] ended early.
#[derive(Debug)]
pub enum RunError {
    /// A backend's URL or certificates cannot be used.
    Config(String),
    /// The listener or a thread failed.
    Io(io::Error),
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RunError::Config(what) => f.write_str(what),
            RunError::Io(error) => error.fmt(f),
        }
    }
}

/// Opens the ledger of the configuration. The writer is there if the ledger has a file.
fn open_ledger(config: &Config, log: &Log) -> Result<(Arc<Ledger>, Option<Writer>), String> {
    let Some(path) = &config.ledger else { return Ok((Ledger::in_memory(), None)) };
    let log = log.clone();
    let events = move |level: &str, event: &str, text: &str| log.event(level, event, text);
    Ledger::open(path, Box::new(events)).map(|(ledger, writer)| (ledger, Some(writer)))
}

/// Serves `config` on the listener of `setup` until told to stop; `log` is the way to stderr. `Ok(true)`: nothing was
/// cut.
///
/// # Errors
/// It could not start, or the listener failed. The log has the reason.
pub fn run(
    config: Config,
    log: Log,
    setup: impl Into<Setup>,
    orders: Receiver<Order>,
) -> Result<bool, RunError> {
    let whole = serve(config, &log, setup.into(), orders);
    if let Err(error) = &whole {
        log.event("error", "stop", &error.to_string());
    }
    // The hook holds a sender of the log, which keeps the log open.
    drop(std::panic::take_hook());
    log.flush();
    whole
}

fn serve(config: Config, log: &Log, setup: Setup, orders: Receiver<Order>) -> Result<bool, RunError> {
    clock::now();
    let (ledger, writer) = open_ledger(&config, log).map_err(RunError::Config)?;
    let shared = Shared::with_ledger(config, log.clone(), ledger).map_err(RunError::Config)?;
    let shared = Arc::new(shared);
    let writer = writer.map(Writer::start).transpose().map_err(RunError::Io)?;
    log_start(log, &shared.current.load(), &setup);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(RunError::Io)?;
    let whole = runtime.block_on(server::serve(shared, setup, orders)).map_err(RunError::Io);
    runtime.shutdown_background();
    if let Some(writer) = writer {
        writer.stop();
    }
    whole
}
