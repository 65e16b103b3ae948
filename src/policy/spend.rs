//! Budgets: at most so much money a day or a month, in UTC.
//!
//! A request reserves an estimate of its cost before it is sent, and is settled with the cost itself. What was spent and
//! what is reserved is together at most the limit, so two requests at its edge cannot both pass. A new period starts at
//! zero, but open reservations still count. Reading the date is the caller's task.
//!
//! Several processes may share a ledger. What was spent is then the ledger's sum and what this process has settled but
//! the ledger has not written: [`SpendLimit::synced`] moves an amount from the second to the first.

use std::sync::Arc;

use crate::policy::sync::Mutex;

/// Days since 1970-01-01, in UTC.
pub(crate) type Day = u32;

const DAY_SECS: u64 = 86_400;

/// How long a budget lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Period {
    /// A day in UTC.
    Day,
    /// A calendar month in UTC.
    Month,
}

impl Period {
    /// Returns a number that is the same for all days of one period, and greater for later ones.
    fn number(self, day: Day) -> u64 {
        match self {
            Period::Day => u64::from(day),
            Period::Month => {
                let (year, month, _) = civil_from_days(u64::from(day));
                year * 12 + month
            }
        }
    }

    /// Returns the time from `now` (a Unix time in seconds) until the next period begins, in seconds.
    pub(crate) fn opens_in_secs(self, now: u64) -> u64 {
        let today = now / DAY_SECS;
        let first = match self {
            Period::Day => today + 1,
            Period::Month => match civil_from_days(today) {
                (year, 12, _) => days_from_civil(year + 1, 1, 1),
                (year, month, _) => days_from_civil(year, month + 1, 1),
            },
        };
        first.saturating_mul(DAY_SECS) - now
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
#[derive(Debug, Default)]
struct State {
    limit: u64,
    /// A day of the period that the amounts belong to.
    today: Day,
    /// What the ledger says was spent.
    ledger: u64,
    /// What was settled and is not in `ledger` yet.
    unwritten: u64,
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
    /// Creates a budget of which nothing is spent.
    pub(crate) fn new(limit: u64, period: Period) -> Arc<Self> {
        Arc::new(SpendLimit { period, state: Mutex::new(State { limit, ..State::default() }) })
    }

    /// Changes the limit. What is spent and reserved still counts.
    pub(crate) fn set_limit(&self, limit: u64) {
        self.state.lock().limit = limit;
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
        let (spent, limit) = (state.spent(), state.limit);
        // An estimate may be 0 although the answer costs something.
        if spent >= limit || amount > limit - spent {
            return Err(Refused::Spent);
        }
        if spent.saturating_add(state.reserved).saturating_add(amount) > limit {
            return Err(Refused::Reserved);
        }
        state.reserved += amount;
        Ok(SpendReservation { budget: self.clone(), amount })
    }

    /// Reports that the ledger has written `written` of what was settled in the period of `day`, and that its sum for
    /// this period, over all processes, is `sum` now. A new budget starts with `written` 0.
    pub(crate) fn synced(&self, sum: u64, written: u64, day: Day) {
        let mut state = self.state.lock();
        // A ledger that could not be written for days reports old periods too.
        if self.period.number(day) < self.period.number(state.today) {
            return;
        }
        self.enter(&mut state, day);
        state.ledger = sum;
        state.unwritten = state.unwritten.saturating_sub(written);
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
    /// A thread that read the date before midnight may come after one that read it later, so a date that is one day back
    /// changes nothing. If the clock was set back by more, the period goes back with it and keeps what is spent.
    fn enter(&self, state: &mut State, day: Day) -> bool {
        if day == state.today {
            return true;
        }
        let (present, other) = (self.period.number(state.today), self.period.number(day));
        if other > present {
            (state.ledger, state.unwritten) = (0, 0);
        }
        let is_set_back = day.saturating_add(1) < state.today;
        if day > state.today || is_set_back {
            state.today = day;
        }
        other >= present || is_set_back
    }
}

impl State {
    fn spent(&self) -> u64 {
        self.ledger.saturating_add(self.unwritten)
    }
}

impl SpendReservation {
    /// Ends the reservation with what was `spent`. Returns the part beyond the reservation. The amount is charged to the
    /// period of `today`, which must be the day of the ledger's record; if that period is over, to none.
    pub(crate) fn settle(mut self, spent: u64, today: Day) -> u64 {
        let amount = std::mem::take(&mut self.amount);
        let mut state = self.budget.state.lock();
        if self.budget.enter(&mut state, today) {
            state.unwritten = state.unwritten.saturating_add(spent);
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

/// Converts days since 1970-01-01 to year, month (1 to 12) and day (1 to 31): `civil_from_days` of Howard Hinnant,
/// "chrono-Compatible Low-Level Date Algorithms".
pub(crate) fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    (yoe + era * 400 + u64::from(month <= 2), month, day)
}

/// Converts year (from 1970), month and day to days since 1970-01-01: `days_from_civil` of the same paper.
pub(crate) fn days_from_civil(year: u64, month: u64, day: u64) -> u64 {
    let y = if month <= 2 { year - 1 } else { year };
    let (era, yoe) = (y / 400, y % 400);
    let doy = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    let doe = yoe * 365 + yoe / 4 - yoe / 100 + doy;
    era * 146_097 + doe - 719_468
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-11-25.
    const TODAY: Day = 20_782;

    fn left(b: &SpendLimit) -> (u64, u64) {
        (b.spent(TODAY), b.left(TODAY))
    }

    #[test]
    fn two_requests_at_the_edge_cannot_both_pass() {
        let b = SpendLimit::new(100, Period::Day);
        let first = b.reserve(60, TODAY).unwrap();
        assert_eq!(b.reserve(60, TODAY).unwrap_err(), Refused::Reserved);
        assert_eq!((first.settle(30, TODAY), left(&b)), (0, (30, 70)));
        let second = b.reserve(70, TODAY).unwrap();
        assert_eq!(b.reserve(1, TODAY).unwrap_err(), Refused::Reserved);
        assert_eq!((second.settle(75, TODAY), left(&b)), (5, (105, 0)));
        assert_eq!(b.reserve(0, TODAY).unwrap_err(), Refused::Spent);
    }

    #[test]
    fn a_dropped_reservation_is_refunded_even_by_a_panic() {
        let b = SpendLimit::new(100, Period::Day);
        drop(b.reserve(100, TODAY).unwrap());
        let theirs = b.clone();
        let thread = std::thread::Builder::new().spawn(move || {
            let _held = theirs.reserve(100, TODAY).unwrap();
            panic!("expected by the test");
        });
        assert!(thread.unwrap().join().is_err());
        assert_eq!(left(&b), (0, 100));
    }

    #[test]
    fn a_request_that_costs_more_than_is_left_finds_the_budget_spent() {
        let b = SpendLimit::new(100, Period::Day);
        let _ = b.reserve(50, TODAY).unwrap().settle(50, TODAY);
        let _held = b.reserve(10, TODAY).unwrap();
        for (amount, want) in [
            (40, None),
            (41, Some(Refused::Reserved)),
            (50, Some(Refused::Reserved)),
            (51, Some(Refused::Spent)),
            (u64::MAX, Some(Refused::Spent)),
        ] {
            assert_eq!(b.reserve(amount, TODAY).err(), want, "{amount}");
        }
        assert_eq!(SpendLimit::new(0, Period::Day).reserve(0, TODAY).err(), Some(Refused::Spent));
    }

    #[test]
    fn a_new_period_starts_at_zero_and_keeps_open_reservations() {
        for (period, same, next) in [(Period::Day, TODAY, TODAY + 1), (Period::Month, TODAY + 5, TODAY + 6)] {
            let b = SpendLimit::new(100, period);
            let _ = b.reserve(60, TODAY).unwrap().settle(60, TODAY);
            let (over, kept) = (b.reserve(10, TODAY).unwrap(), b.reserve(20, TODAY).unwrap());
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
        let b = SpendLimit::new(100, Period::Day);
        let wrong = TODAY + 9_000;
        let _ = b.reserve(60, wrong).unwrap().settle(60, wrong);
        assert_eq!((b.spent(wrong - 1), b.spent(TODAY), b.spent(TODAY + 1)), (60, 60, 0));
    }

    #[test]
    fn what_is_spent_is_the_sum_of_the_ledger_and_of_what_it_has_not_written() {
        let b = SpendLimit::new(100, Period::Month);
        b.synced(30, 0, TODAY);
        assert_eq!(left(&b), (30, 70));
        let _ = b.reserve(10, TODAY).unwrap().settle(10, TODAY);
        let _ = b.reserve(5, TODAY).unwrap().settle(5, TODAY);
        assert_eq!(left(&b), (45, 55));
        b.synced(30 + 10 + 7, 10, TODAY);
        assert_eq!(left(&b), (52, 48), "another process spent 7, and 5 are not written yet");
        b.synced(52, 5, TODAY);
        b.synced(52, 0, TODAY);
        assert_eq!(left(&b), (52, 48));
        b.synced(1_000, 1_000, TODAY - 40);
        assert_eq!(left(&b), (52, 48), "the sum of a period that is over is of no interest");
        b.synced(3, 0, TODAY + 10);
        assert_eq!(b.spent(TODAY + 10), 3);
    }

    #[test]
    fn a_new_limit_keeps_what_is_spent() {
        let b = SpendLimit::new(100, Period::Day);
        let _ = b.reserve(60, TODAY).unwrap().settle(60, TODAY);
        b.set_limit(50);
        assert_eq!((left(&b), b.reserve(1, TODAY).err()), ((60, 0), Some(Refused::Spent)));
        b.set_limit(70);
        assert_eq!(left(&b), (60, 10));
    }

    #[test]
    fn a_budget_opens_at_the_start_of_the_next_period() {
        let at = |year, month, day| days_from_civil(year, month, day) * DAY_SECS;
        for (now, day, month) in [
            (0, DAY_SECS, 31 * DAY_SECS),
            (at(2026, 11, 25) + 86_399, 1, 5 * DAY_SECS + 1),
            (at(2026, 12, 31), DAY_SECS, DAY_SECS),
            (at(2028, 2, 28), DAY_SECS, 2 * DAY_SECS),
            (at(2100, 2, 28), DAY_SECS, DAY_SECS),
        ] {
            assert_eq!(
                (Period::Day.opens_in_secs(now), Period::Month.opens_in_secs(now)),
                (day, month),
                "{now}"
            );
        }
        let _ = (Period::Day.opens_in_secs(u64::MAX), Period::Month.opens_in_secs(u64::MAX));
    }

    #[test]
    fn dates_agree_with_the_calendar() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (11_016, (2000, 2, 29)),
            (u64::from(TODAY), (2026, 11, 25)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!((civil_from_days(days), days_from_civil(date.0, date.1, date.2)), (date, days));
        }
        // Day by day over 800 years.
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..292_194 {
            assert_eq!(civil_from_days(days), (year, month, day));
            let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 => 28 + u64::from(is_leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            day += 1;
            if day > length {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (month, year) = (1, year + 1);
            }
        }
    }

    proptest! {
        #[test]
        fn dates_convert_there_and_back(days in 0u64..1 << 40) {
            let (year, month, day) = civil_from_days(days);
            prop_assert_eq!(days_from_civil(year, month, day), days);
            prop_assert!((1..=12).contains(&month) && (1..=31).contains(&day));
        }

        #[test]
        fn the_next_period_begins_when_it_is_said_to(now in 0u64..1 << 34) {
            for period in [Period::Day, Period::Month] {
                let number = |secs: u64| period.number((secs / DAY_SECS) as Day);
                let opens = now + period.opens_in_secs(now);
                prop_assert_eq!(number(opens - 1), number(now));
                prop_assert_eq!(number(opens), number(now) + 1);
            }
        }

        /// What was spent and reserved is at most the limit, except for what answers cost beyond their reservations.
        #[test]
        fn agrees_with_a_naive_sum(
            limit in 1u64..100,
            steps in prop::collection::vec((0u8..8, 0u64..60, any::<prop::sample::Index>()), 1..120),
        ) {
            let b = SpendLimit::new(limit, Period::Day);
            let (mut open, mut spent, mut day) = (Vec::new(), 0, TODAY);
            let (mut ledger, mut unwritten) = (0, 0);
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
                        (spent, unwritten) = (spent + amount, unwritten + amount);
                    }
                    6 if !open.is_empty() => drop(open.remove(which.index(open.len()))),
                    7 if amount < 5 => (day, spent, ledger, unwritten) = (day + 1, 0, 0, 0),
                    7 => {
                        let written = amount.min(unwritten);
                        (ledger, unwritten) = (ledger + written, unwritten - written);
                        b.synced(ledger, written, day);
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
