//! The candidates that one request passed over, for its log line.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::mem::discriminant;
use std::sync::Arc;

use crate::policy::choose::Closed;
use crate::telemetry::line::{push_json, push_plain};
use crate::time::{Nanos, SECOND};
use crate::upstream::Upstream;
use crate::upstream::fault::Fault;
use crate::upstream::fleet::Passed;

/// The candidates that a request passed over.
#[derive(Debug, Default)]
pub(crate) struct PassedOver(Vec<PassedBackend>);

#[derive(Debug)]
struct PassedBackend {
    backend: Arc<Upstream>,
    why: Passed,
    /// The time of the check.
    at: Nanos,
    /// The last fault of a backend that is out.
    fault: Option<Fault>,
}

impl PassedOver {
    /// Records that a candidate was passed over at `now`; each candidate once per kind of reason.
    pub(crate) fn note(&mut self, backend: &Arc<Upstream>, why: Passed, now: Nanos) {
        let kind = |why: &Passed| match why {
            Passed::Closed(closed) => (discriminant(why), Some(discriminant(closed))),
            Passed::Load | Passed::Tried => (discriminant(why), None),
        };
        let is_known =
            |c: &PassedBackend| c.backend.state.id == backend.state.id && kind(&c.why) == kind(&why);
        if !self.0.iter().any(is_known) {
            let is_out = matches!(why, Passed::Closed(Closed::Out(_)));
            let fault = if is_out { backend.last_error().map(|(_, fault)| fault) } else { None };
            self.0.push(PassedBackend { backend: backend.clone(), why, at: now, fault });
        }
    }

    /// Appends the items of a JSON array: each candidate's name, the reason, and the cause if it is out.
    pub(super) fn push_to(&self, out: &mut String) {
        for (i, PassedBackend { backend, why, at, fault }) in self.0.iter().enumerate() {
            out.push_str(if i == 0 { "[" } else { ",[" });
            push_json(out, backend.name());
            let _ = write!(out, ",\"{}\"", reason(*why, *at));
            if let Some(fault) = fault {
                out.push(',');
                push_json(out, &fault.cause);
            }
            out.push(']');
        }
    }

    /// Appends the same in words, behind a semicolon.
    pub(super) fn push_words(&self, out: &mut String) {
        for (i, PassedBackend { backend, why, at, fault }) in self.0.iter().enumerate() {
            let separator = if i == 0 { "; passed over: " } else { ", " };
            let _ = write!(out, "{separator}{} {}", backend.name(), reason(*why, *at));
            if let Some(fault) = fault {
                out.push_str(" (");
                push_plain(out, &fault.cause);
                out.push(')');
            }
        }
    }
}

/// Why a candidate was passed over. For a cooling backend or a spent quota, with the time left at `now`.
fn reason(why: Passed, now: Nanos) -> Cow<'static, str> {
    match why {
        Passed::Closed(closed @ (Closed::Cooling(until) | Closed::Quota(until))) => {
            let left = until.saturating_sub(now) as f64 / SECOND as f64;
            format!("{} {left:.1}s", closed.name()).into()
        }
        Passed::Closed(closed) => closed.name().into(),
        Passed::Load => "load".into(),
        Passed::Tried => "tried".into(),
    }
}
