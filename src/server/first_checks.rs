//! The log of first health checks: after a start, or of backends that a reload adds. Of many backends, the first
//! [`MAX_LINES`] have a line, and one line counts the others.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use crate::gateway::state::Shared;
use crate::server::start::MAX_LINES;
use crate::telemetry::line::{Fields, in_words};
use crate::time::Nanos;

/// The first checks of all backends.
#[derive(Debug, Default)]
pub(crate) struct FirstChecks {
    /// First checks that have no result yet.
    pending: Cell<usize>,
    /// Lines that may be logged still.
    lines: Cell<usize>,
    /// First checks that passed without a line.
    unlisted: Cell<usize>,
}

/// The first check of one backend. Dropping it ends the wait for its result.
pub(crate) struct FirstCheck {
    all: Rc<FirstChecks>,
    shared: Arc<Shared>,
}

impl FirstChecks {
    /// Adds the first check of one backend.
    pub(crate) fn begin(self: &Rc<Self>, shared: Arc<Shared>) -> FirstCheck {
        if self.pending.get() == 0 {
            self.lines.set(MAX_LINES);
        }
        self.pending.set(self.pending.get() + 1);
        FirstCheck { all: self.clone(), shared }
    }
}

impl FirstCheck {
    /// Logs that the check of the backend `name` has passed.
    pub(crate) fn passed(self, name: &str, status: u16, took: Nanos) {
        let Some(left) = self.all.lines.get().checked_sub(1) else {
            return self.all.unlisted.set(self.all.unlisted.get() + 1);
        };
        self.all.lines.set(left);
        let text = format!("backend {name} is up: HTTP {status} after {}", in_words(took));
        let fields = Fields::default().text("backend", name).text("result", "ok");
        let fields = fields.number("status", status.into()).ms("ms", took);
        self.shared.telemetry.log.event_with("info", "health_check", &text, &fields);
    }
}

impl Drop for FirstCheck {
    fn drop(&mut self) {
        self.all.pending.set(self.all.pending.get() - 1);
        let unlisted = self.all.unlisted.get();
        if self.all.pending.get() == 0 && unlisted > 0 {
            self.all.unlisted.set(0);
            let text = format!("and {unlisted} more backends are up");
            let fields = Fields::default().text("result", "ok").number("count", unlisted as u64);
            self.shared.telemetry.log.event_with("info", "health_check", &text, &fields);
        }
    }
}
