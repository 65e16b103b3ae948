//! Rows of usage in memory.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::ops::AddAssign;
use std::sync::Arc;

use crate::protocol::usage::Usage;
use crate::time::Day;

/// Whose usage it is. All labels come from the configuration, so the number of rows is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Labels<'a> {
    /// The name of the client key.
    pub client: &'a str,
    /// The name of the backend.
    pub backend: &'a str,
    /// The model, as the metrics label it.
    pub model: &'a str,
}

/// What one request used, or the sum over many. Sums stay at the largest number of SQLite when they reach it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amounts {
    /// Number of requests.
    pub requests: u64,
    /// Of `requests`: those whose token counts are an estimate of Zap.
    pub estimated: u64,
    /// Input tokens.
    pub input: u64,
    /// Of `input`: those that the provider read from its cache.
    pub cached: u64,
    /// Output tokens.
    pub output: u64,
    /// Of `output`: those of reasoning.
    pub reasoning: u64,
    /// Cost in nano-USD.
    pub cost_nano_usd: u64,
}

/// The largest integer of SQLite.
const MAX: u64 = i64::MAX.cast_unsigned();

impl Amounts {
    /// Names of the columns, in the order of [`Amounts::columns`].
    pub(super) const COLUMNS: [&'static str; 7] =
        ["requests", "estimated", "input", "cached", "output", "reasoning", "cost_nano_usd"];

    /// The amounts of one request.
    pub(crate) fn of_request(usage: Usage, is_estimated: bool, cost_nano_usd: u64) -> Amounts {
        let Usage { input, cached, output, reasoning, .. } = usage;
        let estimated = u64::from(is_estimated);
        Amounts { requests: 1, estimated, input, cached, output, reasoning, cost_nano_usd }
    }

    pub(super) fn columns(&self) -> [u64; 7] {
        let Amounts { requests, estimated, input, cached, output, reasoning, cost_nano_usd } = *self;
        [requests, estimated, input, cached, output, reasoning, cost_nano_usd]
    }

    pub(super) fn of_columns(columns: [u64; 7]) -> Amounts {
        let [requests, estimated, input, cached, output, reasoning, cost_nano_usd] = columns;
        Amounts { requests, estimated, input, cached, output, reasoning, cost_nano_usd }
    }
}

impl AddAssign for Amounts {
    fn add_assign(&mut self, other: Amounts) {
        let (mut sums, other) = (self.columns(), other.columns());
        for (sum, more) in sums.iter_mut().zip(other) {
            *sum = sum.saturating_add(more).min(MAX);
        }
        *self = Amounts::of_columns(sums);
    }
}

/// [`Labels`] that own their text.
#[derive(Clone, Debug)]
struct Key {
    client: Box<str>,
    backend: Box<str>,
    model: Box<str>,
}

/// What has labels. A map with [`Key`]s is searched by [`Labels`] through this trait, without an allocation.
trait Labelled {
    fn labels(&self) -> Labels<'_>;
}

impl Labelled for Key {
    fn labels(&self) -> Labels<'_> {
        Labels { client: &self.client, backend: &self.backend, model: &self.model }
    }
}

impl Labelled for Labels<'_> {
    fn labels(&self) -> Labels<'_> {
        *self
    }
}

impl Hash for dyn Labelled + '_ {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.labels().hash(state);
    }
}

impl PartialEq for dyn Labelled + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.labels() == other.labels()
    }
}

impl Eq for dyn Labelled + '_ {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.labels().hash(state);
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.labels() == other.labels()
    }
}

impl Eq for Key {}

impl<'a> Borrow<dyn Labelled + 'a> for Key {
    fn borrow(&self) -> &(dyn Labelled + 'a) {
        self
    }
}

/// Rows of usage. A clone is a snapshot: it takes one reference a day, and the next change of a day copies the day.
#[derive(Clone, Debug, Default)]
pub(super) struct Table(BTreeMap<Day, Arc<HashMap<Key, Amounts>>>);

impl Table {
    /// Adds to the row of `day` and `labels`.
    pub(super) fn add(&mut self, day: Day, labels: Labels<'_>, amounts: Amounts) {
        let rows = Arc::make_mut(self.0.entry(day).or_default());
        match rows.get_mut(&labels as &dyn Labelled) {
            Some(sum) => *sum += amounts,
            None => {
                let Labels { client, backend, model } = labels;
                let key = Key { client: client.into(), backend: backend.into(), model: model.into() };
                rows.insert(key, amounts);
            }
        }
    }

    /// Adds all rows of `other`.
    pub(super) fn merge(&mut self, other: Table) {
        for (day, rows) in other.0 {
            match self.0.get(&day) {
                Some(known) if known.len() >= rows.len() => {
                    rows.iter().for_each(|(key, amounts)| self.add(day, key.labels(), *amounts));
                }
                _ => {
                    let fewer = self.0.insert(day, rows).unwrap_or_default();
                    fewer.iter().for_each(|(key, amounts)| self.add(day, key.labels(), *amounts));
                }
            }
        }
    }

    /// The rows from `from` to `to`, both inclusive.
    pub(super) fn rows(&self, from: Day, to: Day) -> impl Iterator<Item = (Day, Labels<'_>, Amounts)> {
        let days = (from <= to).then(|| self.0.range(from..=to));
        days.into_iter()
            .flatten()
            .flat_map(|(day, rows)| rows.iter().map(move |(key, amounts)| (*day, key.labels(), *amounts)))
    }

    /// All rows.
    pub(super) fn all(&self) -> impl Iterator<Item = (Day, Labels<'_>, Amounts)> {
        let rows = self.0.iter();
        rows.flat_map(|(day, rows)| rows.iter().map(move |(key, amounts)| (*day, key.labels(), *amounts)))
    }

    /// Whether there are rows of `day`.
    pub(super) fn has(&self, day: Day) -> bool {
        self.0.contains_key(&day)
    }

    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        self.0.values().map(|rows| rows.len()).sum()
    }

    /// Whether there are no rows.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Drops the rows of days before `day`.
    pub(super) fn drop_before(&mut self, day: Day) {
        self.0 = self.0.split_off(&day);
    }
}
