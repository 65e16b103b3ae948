//! Budgets: at most so much money a day or a month, in UTC.
//!
//! A request reserves an estimate of its cost before it is sent, and is settled with the cost itself. What was spent
//! and what is reserved is together at most the limit, so two requests at its edge cannot both pass. A new period
//! starts at zero, but open reservations still count. Reading the date is the caller's task.
//!
//! What was spent is the sum that the ledger knew at the last [sync](SpendLimit::sync), which other processes may have
//! added to, and what this process has settled since.

use std::sync::Arc;

use crate::policy::sync::Mutex;
use crate::time::Day;

/// How long a budget lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    /// A day in UTC.
    Day,
    /// A calendar month in UTC.
    Month,
}

impl Period {
    /// The first day of the period of `day`.
    fn first(self, day: Day) -> Day {
        match self {
            Period::Day => day,
            Period::Month => day.first_of_month(),
        }
    }

    /// The first day of the period after that of `day`.
    pub(crate) fn next(self, day: Day) -> Day {
        match self {
            Period::Day => day.next(),
            Period::Month => day.first_of_next_month(),
        }
    }

    /// The name, as in the configuration.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Period::Day => "day",
            Period::Month => "month",
        }
    }
}

/// Why a request may not be charged to a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// What is left of the budget in this period does not pay for the request.
    Spent,
    /// The budget is full only of what other requests have reserved.
    Reserved,
}

/// A budget of `limit` nano-USD per [`Period`].
#[derive(Debug)]
pub(crate) struct SpendLimit {
    period: Period,
    state: Mutex<State>,
}

/// Amounts are in nano-USD.
#[derive(Debug)]
struct State {
    limit: u64,
    /// A day of the period that the amounts belong to.
    today: Day,
    /// What the ledger knew at the last sync.
    ledger: u64,
    /// What this process has settled in this period.
    settled: u64,
    /// The part of `settled` that `ledger` has.
    synced: u64,
    /// The sum of all open reservations.
    reserved: u64,
}

/// An amount that a request has reserved. Dropping it refunds the amount.
#[derive(Debug)]
#[must_use = "dropping a reservation refunds it"]
pub(crate) struct SpendReservation {
    budget: Arc<SpendLimit>,
    amount: u64,
}

impl SpendLimit {
    /// Creates a budget of which nothing is spent. `today`: a day in its first period.
    pub(crate) fn new(limit: u64, period: Period, today: Day) -> Arc<Self> {
        let state = State { limit, today, ledger: 0, settled: 0, synced: 0, reserved: 0 };
        Arc::new(SpendLimit { period, state: Mutex::new(state) })
    }

    /// The budget after a reload: `before`, if it is for the same period, since what is spent stays spent; else a new
    /// one. [`set_limit`](Self::set_limit) applies the new limit.
    pub(crate) fn renewed(before: Option<&Arc<Self>>, limit: u64, period: Period, today: Day) -> Arc<Self> {
        let same = before.filter(|before| before.period == period).cloned();
        same.unwrap_or_else(|| SpendLimit::new(limit, period, today))
    }

    /// Changes the limit. What is spent and reserved still counts.
    pub(crate) fn set_limit(&self, limit: u64) {
        self.state.lock().limit = limit;
    }

    /// Returns the limit.
    pub(crate) fn limit(&self) -> u64 {
        self.state.lock().limit
    }

    /// Returns the period.
    pub(crate) fn period(&self) -> Period {
        self.period
    }

    /// Reserves `amount`.
    ///
    /// # Errors
    /// Returns the reason if the budget has no room for the amount, or is spent.
    pub(crate) fn reserve(self: &Arc<Self>, amount: u64, today: Day) -> Result<SpendReservation, Refused> {
        let mut state = self.state.lock();
        self.enter(&mut state, today);
        state.check(amount)?;
        state.reserved += amount;
        Ok(SpendReservation { budget: self.clone(), amount })
    }

    /// Decides like [`reserve`](Self::reserve), but reserves nothing.
    ///
    /// # Errors
    /// Returns the reason if the budget has no room for the amount, or is spent.
    pub(crate) fn check(&self, amount: u64, today: Day) -> Result<(), Refused> {
        let mut state = self.state.lock();
        self.enter(&mut state, today);
        state.check(amount)
    }

    /// Takes what the ledger knows. `read` returns what was spent in the period of `today`, over all processes. A
    /// request is added to the ledger before it is settled here, so `read` returns at least what was settled here
    /// before. A request that is settled in the meantime may count twice until the next sync.
    pub(crate) fn sync(&self, today: Day, read: impl FnOnce() -> u64) {
        let settled = {
            let mut state = self.state.lock();
            self.enter(&mut state, today);
            state.settled
        };
        let sum = read();
        let mut state = self.state.lock();
        if self.period.first(state.today) == self.period.first(today) {
            (state.ledger, state.synced) = (sum, settled);
        }
    }

    /// Returns what was spent in the present period.
    pub(crate) fn spent(&self, today: Day) -> u64 {
        let mut state = self.state.lock();
        self.enter(&mut state, today);
        state.spent()
    }

    /// Returns what is neither spent nor reserved in the present period.
    pub(crate) fn left(&self, today: Day) -> u64 {
        let mut state = self.state.lock();
        self.enter(&mut state, today);
        state.limit.saturating_sub(state.spent().saturating_add(state.reserved))
    }

    /// Starts at zero if `day` is in a later period. Returns whether `day` is in the present period.
    ///
    /// A thread that read the date before midnight may come after one that read it later, so a date that is one day
    /// back changes nothing. If the clock was set back by more, the period goes back with it and keeps what is spent.
    fn enter(&self, state: &mut State, day: Day) -> bool {
        if day == state.today {
            return true;
        }
        let (present, other) = (self.period.first(state.today), self.period.first(day));
        if other > present {
            (state.ledger, state.settled, state.synced) = (0, 0, 0);
        }
        let is_set_back = day.next() < state.today;
        if day > state.today || is_set_back {
            state.today = day;
        }
        other >= present || is_set_back
    }
}

impl State {
    fn spent(&self) -> u64 {
        self.ledger.saturating_add(self.settled.saturating_sub(self.synced))
    }

    fn check(&self, amount: u64) -> Result<(), Refused> {
        let (spent, limit) = (self.spent(), self.limit);
        // An estimate may be 0 although the answer costs something.
        if spent >= limit || amount > limit - spent {
            return Err(Refused::Spent);
        }
        let taken = spent.saturating_add(self.reserved).saturating_add(amount);
        if taken > limit { Err(Refused::Reserved) } else { Ok(()) }
    }
}

impl SpendReservation {
    /// Ends the reservation with what was `spent`. Returns the part beyond the reservation. The amount is charged to
    /// the period of `today`, which must be the day of the ledger's record; if that period is over, to none.
    pub(crate) fn settle(mut self, spent: u64, today: Day) -> u64 {
        let amount = std::mem::take(&mut self.amount);
        let mut state = self.budget.state.lock();
        if self.budget.enter(&mut state, today) {
            state.settled = state.settled.saturating_add(spent);
        }
        state.reserved -= amount;
        spent.saturating_sub(amount)
    }
}

impl Drop for SpendReservation {
    fn drop(&mut self) {
        if self.amount > 0 {
            self.budget.state.lock().reserved -= self.amount;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn day(text: &str) -> Day {
        Day::parse(text).expect("it is a day")
    }

    fn budget(limit: u64, period: Period) -> Arc<SpendLimit> {
        SpendLimit::new(limit, period, today())
    }

    fn today() -> Day {
        day("2026-11-25")
    }

    fn left(b: &SpendLimit) -> (u64, u64) {
        (b.spent(today()), b.left(today()))
    }

    #[test]
    fn two_requests_at_the_edge_cannot_both_pass() {
        let b = budget(100, Period::Day);
        let first = b.reserve(60, today()).unwrap();
        assert_eq!(b.reserve(60, today()).unwrap_err(), Refused::Reserved);
        assert_eq!((first.settle(30, today()), left(&b)), (0, (30, 70)));
        let second = b.reserve(70, today()).unwrap();
        assert_eq!(b.reserve(1, today()).unwrap_err(), Refused::Reserved);
        assert_eq!((second.settle(75, today()), left(&b)), (5, (105, 0)));
        assert_eq!(b.reserve(0, today()).unwrap_err(), Refused::Spent);
    }

    #[test]
    fn a_dropped_reservation_is_refunded_even_by_a_panic() {
        let b = budget(100, Period::Day);
        drop(b.reserve(100, today()).unwrap());
        let theirs = b.clone();
        let thread = std::thread::Builder::new().spawn(move || {
            let _held = theirs.reserve(100, today()).unwrap();
            panic!("expected by the test");
        });
        assert!(thread.unwrap().join().is_err());
        assert_eq!(left(&b), (0, 100));
    }

    #[test]
    fn a_request_that_costs_more_than_is_left_finds_the_budget_spent() {
        let b = budget(100, Period::Day);
        let _ = b.reserve(50, today()).unwrap().settle(50, today());
        let _held = b.reserve(10, today()).unwrap();
        for (amount, want) in [
            (40, None),
            (41, Some(Refused::Reserved)),
            (50, Some(Refused::Reserved)),
            (51, Some(Refused::Spent)),
            (u64::MAX, Some(Refused::Spent)),
        ] {
            assert_eq!(b.reserve(amount, today()).err(), want, "{amount}");
        }
        assert_eq!(budget(0, Period::Day).reserve(0, today()).err(), Some(Refused::Spent));
    }

    #[test]
    fn a_new_period_starts_at_zero_and_keeps_open_reservations() {
        for (period, same, next) in
            [(Period::Day, today(), today().next()), (Period::Month, day("2026-11-30"), day("2026-12-01"))]
        {
            let b = budget(100, period);
            let _ = b.reserve(60, today()).unwrap().settle(60, today());
            let (over, kept) = (b.reserve(10, today()).unwrap(), b.reserve(20, today()).unwrap());
            assert_eq!((b.spent(same), b.left(same)), (60, 10), "{period:?}");
            assert_eq!((b.spent(next), b.left(next)), (0, 70), "{period:?}");
            assert_eq!(
                (over.settle(5, same), b.spent(next)),
                (0, 0),
                "{period:?}: charged to the period before"
            );
            assert_eq!((kept.settle(20, next), b.spent(next), b.left(next)), (0, 20, 80), "{period:?}");
        }
    }

    #[test]
    fn a_date_that_goes_back_keeps_what_is_spent() {
        let b = budget(100, Period::Day);
        let wrong = day("2051-07-18");
        let _ = b.reserve(60, wrong).unwrap().settle(60, wrong);
        assert_eq!((b.spent(wrong.minus(1)), b.spent(today()), b.spent(today().next())), (60, 60, 0));
    }

    #[test]
    fn what_is_spent_is_the_sum_of_the_ledger_and_of_what_was_settled_since() {
        let b = budget(100, Period::Month);
        b.sync(today(), || 30);
        assert_eq!(left(&b), (30, 70));
        let _ = b.reserve(10, today()).unwrap().settle(10, today());
        let _ = b.reserve(5, today()).unwrap().settle(5, today());
        assert_eq!(left(&b), (45, 55));
        b.sync(today(), || 30 + 15 + 7);
        assert_eq!(left(&b), (52, 48), "another process spent 7");
        b.sync(today(), || {
            let _ = b.reserve(8, today()).unwrap().settle(8, today());
            52
        });
        assert_eq!(left(&b), (60, 40), "what is settled during the sync is not lost");
        b.sync(day("2026-12-05"), || 3);
        assert_eq!(b.spent(day("2026-12-05")), 3);
    }

    #[test]
    fn a_new_limit_keeps_what_is_spent() {
        let b = budget(100, Period::Day);
        let _ = b.reserve(60, today()).unwrap().settle(60, today());
        b.set_limit(50);
        assert_eq!((left(&b), b.reserve(1, today()).err()), ((60, 0), Some(Refused::Spent)));
        b.set_limit(70);
        assert_eq!(left(&b), (60, 10));
    }

    #[test]
    fn a_budget_opens_at_the_start_of_the_next_period() {
        for (now, next_day, next_month) in [
            ("2026-11-25", "2026-11-26", "2026-12-01"),
            ("2026-12-31", "2027-01-01", "2027-01-01"),
            ("2028-02-28", "2028-02-29", "2028-03-01"),
        ] {
            assert_eq!(Period::Day.next(day(now)), day(next_day));
            assert_eq!(Period::Month.next(day(now)), day(next_month));
        }
    }

    proptest! {
        /// What was spent and reserved is at most the limit, except for what answers cost beyond their reservations.
        #[test]
        fn agrees_with_a_naive_sum(
            limit in 1u64..100,
            steps in prop::collection::vec((0u8..8, 0u64..60, any::<prop::sample::Index>()), 1..120),
        ) {
            let b = budget(limit, Period::Day);
            let (mut open, mut spent, mut day) = (Vec::new(), 0, today());
            for (op, amount, which) in steps {
                let reserved: u64 = open.iter().map(|(amount, _)| *amount).sum();
                match op {
                    0..=3 => match b.reserve(amount, day) {
                        Ok(reservation) => {
                            prop_assert!(spent < limit && spent + reserved + amount <= limit);
                            open.push((amount, reservation));
                        }
                        Err(Refused::Spent) => prop_assert!(spent >= limit || spent + amount > limit),
                        Err(Refused::Reserved) => {
                            prop_assert!(spent + amount <= limit && spent + reserved + amount > limit);
                        }
                    },
                    4 | 5 if !open.is_empty() => {
                        let (held, reservation) = open.remove(which.index(open.len()));
                        prop_assert_eq!(reservation.settle(amount, day), amount.saturating_sub(held));
                        spent += amount;
                    }
                    6 if !open.is_empty() => drop(open.remove(which.index(open.len()))),
                    7 if amount < 5 => (day, spent) = (day.next(), 0),
                    7 => {
                        // Another process has spent something.
                        spent += amount % 3;
                        b.sync(day, || spent);
                    }
                    _ => {}
                }
                let reserved: u64 = open.iter().map(|(amount, _)| *amount).sum();
                prop_assert_eq!(b.spent(day), spent);
                prop_assert_eq!(b.left(day), limit.saturating_sub(spent + reserved));
            }
        }
    }
}
