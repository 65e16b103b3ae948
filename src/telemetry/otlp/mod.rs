//! Traces by OTLP: what a request leaves for a collector.
//!
//! [`trace`] collects while the request runs, [`queue`] takes finished traces from the workers, [`batch`] makes spans
//! of them. The exporter, which sends them, is `server/exporter.rs`.

pub(crate) mod trace;

mod finish;

pub(crate) mod queue;

pub(crate) mod batch;

mod message;
