//! Zap: an LLM inference gateway. One OpenAI-compatible endpoint in front of many providers.
//!
//! # The way of a request
//! Read the modules in this order and you walk with it.
//!
//! 1. [`config`] is what the operator wrote, valid by construction; [`state`] is what the workers share: the fleet
//!    as a snapshot that is replaced as a whole, and the policies' counters.
//! 2. [`server`] accepts on the control thread and hands each connection to the worker with the fewest. A thread of its
//!    own probes the fleet, keeps the schedule in step with it and puts a new configuration in place. A worker is
//!    a thread with a runtime of its own; it owns its clients and its upstream connections, so nothing on a
//!    request's way crosses threads but atomics.
//! 3. [`gateway`] tells the story: who calls, rate limit, body, route, slot, tries, answer. The future and the body of
//!    the answer own all that a request holds; when the client leaves, dropping them ends everything at once.
//! 4. [`policy`] decides, without I/O: the head's rules, headers, limiter, JSON scanner, routes by model, admission,
//!    balancing, breaker, splice, retries, quotas.
//! 5. [`upstream`] speaks to the backends: pool, connections, one try, probes.
//! 6. [`telemetry`] takes one record per finished request and makes metrics and log lines of it.
//! 7. [`error`] is the one table of refusals; [`demo`] the built-in mock provider; [`cli`] the command line.

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
    pub use crate::config::{Config, Faults, LoadError, LogFormat};
    pub use crate::counter::{Histogram, REQUEST, Total};
    pub use crate::gateway::failpoint;
    pub use crate::gateway::state::Shared;
    pub use crate::json::patch::{ModelText, Slices, slices, splices};
    pub use crate::json::scan::Scanner;
    pub use crate::policy::balance::{Cursor, Schedule, Turns};
    pub use crate::policy::breaker::{Breaker, Status, Thresholds};
    pub use crate::policy::limit::{Decision, Limiter, WINDOW};
    pub use crate::policy::queue::Admission;
    pub use crate::server::drain::{Order, orders};
    pub use crate::telemetry::encode::Encoder;
    pub use crate::telemetry::log::Log;
    pub use crate::time::{Nanos, SECOND};
}

use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use tokio::sync::mpsc::Receiver;

use crate::config::Config;
use crate::gateway::state::Shared;
use crate::server::drain::Order;
use crate::telemetry::log::Log;

/// Why [`run`] ended early.
#[derive(Debug)]
pub enum RunError {
    /// A backend's URL or certificates cannot be used.
    Config(String),
    /// The listener or a thread failed.
    Io(io::Error),
}

/// Serves `config` on `listener` until told to stop; `log` is the way to stderr. `Ok(true)`: nothing was cut.
///
/// # Errors
/// It could not start, or the listener failed.
pub fn run(
    config: Config,
    log: Log,
    listener: TcpListener,
    orders: Receiver<Order>,
) -> Result<bool, RunError> {
    clock::now();
    for warning in &config.warnings {
        log.event("warn", "config", warning);
    }
    let shared = Arc::new(Shared::new(config, log.clone()).map_err(RunError::Config)?);
    let address = listener.local_addr().map_err(RunError::Io)?;
    log.event("info", "start", &format!("listening on {address}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(RunError::Io)?;
    let whole = runtime.block_on(server::serve(shared, listener, orders)).map_err(RunError::Io);
    runtime.shutdown_background();
    // It may hold a way to the log.
    drop(std::panic::take_hook());
    log.flush();
    whole
}
