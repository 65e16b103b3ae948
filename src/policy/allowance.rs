//! A counter of what was used in the current second. It bounds work that any client can cause.

use crate::time::{Nanos, SECOND};

/// The amount used in one second, in a unit that the caller chooses.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Allowance {
    second: u64,
    used: u64,
}

impl Allowance {
    /// Returns the amount used in the second of `now`.
    pub(crate) fn used(&self, now: Nanos) -> u64 {
        // A thread that read its clock earlier may come later: its `now` counts in the newer second.
        if now / SECOND > self.second { 0 } else { self.used }
    }

    /// Adds `amount` to what was used in the second of `now`.
    pub(crate) fn spend(&mut self, now: Nanos, amount: u64) {
        self.used = self.used(now).saturating_add(amount);
        self.second = self.second.max(now / SECOND);
    }

    /// Uses one of at most `max` units a second. Returns `false`, and uses none, if none is left.
    pub(crate) fn take(&mut self, now: Nanos, max: u64) -> bool {
        let is_left = self.used(now) < max;
        if is_left {
            self.spend(now, 1);
        }
        is_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_second_has_its_own_allowance_and_an_older_clock_opens_none() {
        let mut a = Allowance::default();
        let taken = |a: &mut Allowance, now| (0..9).filter(|_| a.take(now, 3)).count();
        assert_eq!(taken(&mut a, 0), 3);
        assert_eq!(taken(&mut a, SECOND - 1), 0);
        assert_eq!(taken(&mut a, SECOND), 3);
        assert_eq!(taken(&mut a, SECOND - 1), 0, "that second is over");
        assert_eq!(taken(&mut a, 5 * SECOND), 3);
        a.spend(6 * SECOND, u64::MAX);
        a.spend(6 * SECOND, 1);
        assert_eq!((a.used(6 * SECOND), a.used(7 * SECOND)), (u64::MAX, 0));
    }
}
