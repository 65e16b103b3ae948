//! Zap as a whole, between scripted clients and scripted providers on loopback: one file per behaviour.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test that cannot go on must say so.

mod support;

mod admission;

mod affinity;

mod ahead;

mod balance;

mod body;

mod cancel;

mod clients;

mod drain;

mod edge;

mod endpoints;

mod faults_clients;

mod faults_upstreams;

mod fleet;

mod headers;

mod health;

mod json_suite;

mod limit;

mod lines;

mod models;

mod observe;

mod providers;

mod reload;

mod streams;

mod tls;

mod tries;
