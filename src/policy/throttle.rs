//! Lets one of many equal events through in an interval, and counts the others.

use crate::time::Nanos;

/// Bounds how often an event is reported.
#[derive(Debug)]
pub(crate) struct Throttle {
    interval: Nanos,
    /// When the last event passed.
    last: Option<Nanos>,
    /// Number of events since then.
    held: u64,
}

impl Throttle {
    /// Lets the first event through, and then one at most in each `interval`.
    pub(crate) fn new(interval: Nanos) -> Self {
        Throttle { interval, last: None, held: 0 }
    }

    /// Takes an event at `now`. If it passes, returns how many did not since the last one that did.
    pub(crate) fn pass(&mut self, now: Nanos) -> Option<u64> {
        if self.last.is_some_and(|last| now < last.saturating_add(self.interval)) {
            self.held += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::SECOND;

    #[test]
    fn one_event_passes_in_an_interval_and_says_how_many_did_not() {
        let mut throttle = Throttle::new(10 * SECOND);
        let mut passed = |secs| throttle.pass(secs * SECOND);
        assert_eq!(passed(0), Some(0), "the first passes at any time");
        assert_eq!([passed(0), passed(9), passed(5)], [None; 3]);
        assert_eq!([passed(10), passed(19)], [Some(3), None]);
        assert_eq!([passed(20), passed(90)], [Some(1), Some(0)]);
    }
}
