//! What clients and backends have spent in a day and in a month.

use std::collections::{BTreeMap, HashMap};

use crate::telemetry::ledger::table::{Amounts, Labels};
use crate::time::Day;

/// The owner of a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Payer<'a> {
    /// The client key of this name.
    Client(&'a str),
    /// The backend of this name.
    Backend(&'a str),
}

/// Nano-USD spent in a day and in its month, in UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spent {
    /// In the day.
    pub day: u64,
    /// In the month of the day.
    pub month: u64,
}

/// By name: the cost of each day in nano-USD.
type Costs = HashMap<Box<str>, BTreeMap<Day, u64>>;

/// The costs of all clients and backends. The days stand apart, so that a change of the day or of the clock needs no
/// action.
#[derive(Clone, Debug, Default)]
pub(super) struct Sums {
    clients: Costs,
    backends: Costs,
}

impl Sums {
    /// Adds a cost of `day`.
    pub(super) fn add(&mut self, day: Day, labels: Labels<'_>, cost: u64) {
        for (costs, name) in [(&mut self.clients, labels.client), (&mut self.backends, labels.backend)] {
            let days = match costs.get_mut(name) {
                Some(days) => days,
                None => costs.entry(name.into()).or_default(),
            };
            let sum = days.entry(day).or_default();
            *sum = sum.saturating_add(cost);
        }
    }

    /// Adds the costs of `rows`.
    pub(super) fn add_all<'r>(&mut self, rows: impl Iterator<Item = (Day, Labels<'r>, Amounts)>) {
        rows.for_each(|(day, labels, amounts)| self.add(day, labels, amounts.cost_nano_usd));
    }

    /// What `payer` has spent on `day` and in its month.
    pub(super) fn spent(&self, payer: Payer<'_>, day: Day) -> Spent {
        let days = match payer {
            Payer::Client(name) => self.clients.get(name),
            Payer::Backend(name) => self.backends.get(name),
        };
        let Some(days) = days else { return Spent::default() };
        let month = days.range(day.first_of_month()..day.first_of_next_month());
        Spent {
            day: days.get(&day).copied().unwrap_or(0),
            month: month.fold(0, |sum, (_, cost)| sum.saturating_add(*cost)),
        }
    }

    /// Drops the costs of days before `day`.
    pub(super) fn drop_before(&mut self, day: Day) {
        for costs in [&mut self.clients, &mut self.backends] {
            costs.values_mut().for_each(|days| *days = days.split_off(&day));
            costs.retain(|_, days| !days.is_empty());
        }
    }
}
