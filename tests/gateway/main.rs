//! End-to-end tests of Zap between scripted clients and scripted providers on loopback; one file per behaviour.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test that cannot continue must panic.

mod support;

mod admin;

mod admission;

mod affinity;

mod backend_keys;

mod backend_queue;

mod balance;

mod body;

mod browsers;

mod cancel;

mod chunked;

mod clients;

mod cooldowns;

mod drain;

mod edge;

mod endpoints;

mod faults_clients;

mod faults_upstreams;

mod fleet;

mod forms;

mod headers;

mod health;

mod json_suite;

mod key_pools;
mod ledger;

mod limit;

mod log;

mod listener_tls;

mod memory;

mod messages;

mod models;

mod observe;

mod openmetrics;

mod otlp;

mod pipelining;

mod providers;

mod proxy;

mod reload;

mod retries;

mod status;

mod status_page;

mod stored;

mod streams;

mod tls;

mod tokens;

mod truth;

mod withheld;
