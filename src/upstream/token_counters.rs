//! The token counters of one worker for one backend, by model.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::protocol::usage::Usage;

/// The token counts of answers, and what they cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TokenCount {
    /// Input, cached, output and reasoning tokens.
    pub tokens: [u64; 4],
    /// The cost in nano-USD.
    pub cost: u64,
}

impl TokenCount {
    /// The kinds of tokens, in the order of [`tokens`](Self::tokens).
    pub(crate) const KINDS: [&str; 4] = ["input", "cached", "output", "reasoning"];

    /// The count of one answer, which cost so many nano-USD.
    pub(crate) fn new(usage: &Usage, cost: u64) -> Self {
        TokenCount { tokens: [usage.input, usage.cached, usage.output, usage.reasoning], cost }
    }

    /// The input and the output tokens.
    pub(crate) fn total(&self) -> u64 {
        let [input, _, output, _] = self.tokens;
        input.saturating_add(output)
    }

    /// The sum of counts.
    pub(crate) fn sum(counts: impl Iterator<Item = TokenCount>) -> Self {
        let mut total = TokenCount::default();
        counts.for_each(|count| total.add(&count));
        total
    }

    /// Adds another count.
    pub(crate) fn add(&mut self, other: &TokenCount) {
        self.tokens.iter_mut().zip(other.tokens).for_each(|(n, more)| *n = n.saturating_add(more));
        self.cost = self.cost.saturating_add(other.cost);
    }
}

/// The token counts of one worker for one backend, by model. The names come from the configuration. Only a scrape
/// contends for the lock. The models that are used most come first.
#[derive(Debug, Default)]
pub(crate) struct TokenCounters(Mutex<Vec<(Arc<str>, TokenCount)>>);

impl TokenCounters {
    /// Adds the count of an answer of `model`.
    pub(crate) fn add(&self, model: &Arc<str>, count: &TokenCount) {
        let mut all = self.0.lock();
        let same = all.iter().position(|(known, _)| Arc::ptr_eq(known, model));
        // After a reload the same name is another allocation.
        match same.or_else(|| all.iter().position(|(known, _)| known == model)) {
            Some(at) => {
                all[at].1.add(count);
                all.swap(at, at.saturating_sub(1));
            }
            None => all.push((model.clone(), *count)),
        }
    }

    /// Adds all counts to `totals`.
    pub(crate) fn add_to(&self, totals: &mut BTreeMap<Arc<str>, TokenCount>) {
        for (model, count) in &*self.0.lock() {
            totals.entry(model.clone()).or_default().add(count);
        }
    }
}
