//! Prices by model, and the cost of an answer, in integers.
//!
//! A price of USD per million tokens with at most six decimals is a whole number of pico-USD (10^-12 USD) a token.
//! Costs are whole nano-USD (10^-9 USD), rounded half up once per answer; sums of costs are therefore exact.

use std::collections::HashMap;

use crate::protocol::usage::Usage;

/// The prices of a model, in pico-USD a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Price {
    /// Of an input token that the provider's cache had no part in.
    pub input: u64,
    /// Of an input token that was read from the provider's cache.
    pub cached: u64,
    /// Of an input token that was written to the provider's cache.
    pub cache_write: u64,
    /// Of an output token.
    pub output: u64,
}

impl Price {
    /// Creates a price from the prices of input, cached input, input written to the cache, and output.
    pub(crate) fn of([input, cached, cache_write, output]: [u64; 4]) -> Self {
        Price { input, cached, cache_write, output }
    }

    /// Returns the most that so many tokens cost, in nano-USD: all of the input may be read from the cache, or written
    /// to it.
    pub(crate) fn most(&self, usage: &Usage) -> u64 {
        Price { input: self.input.max(self.cached).max(self.cache_write), ..*self }.cost(usage)
    }

    /// Returns the cost of an answer, in nano-USD, rounded half up; `u64::MAX` if it is larger.
    pub(crate) fn cost(&self, usage: &Usage) -> u64 {
        let cached = usage.cached.min(usage.input);
        let written = usage.cache_write.min(usage.input - cached);
        let parts = [
            (usage.input - cached - written, self.input),
            (cached, self.cached),
            (written, self.cache_write),
            (usage.output, self.output),
        ];
        let pico = parts
            .iter()
            .fold(0u128, |sum, (tokens, price)| sum.saturating_add(u128::from(*tokens) * u128::from(*price)));
        u64::try_from(pico.saturating_add(500) / 1_000).unwrap_or(u64::MAX)
    }
}

/// Writes nano-USD in USD, with all digits.
pub(crate) fn usd(nano: u64) -> String {
    format!("{}.{:09}", nano / 1_000_000_000, nano % 1_000_000_000)
}

/// The prices of a backend, by model as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PriceTable {
    exact: HashMap<Box<str>, Price>,
    /// The names with a trailing `*`, without it. Longest first.
    prefixes: Vec<(Box<str>, Price)>,
}

impl PriceTable {
    /// Creates a table from names. A trailing `*` stands for the rest of a name; `*` alone matches all models.
    pub(crate) fn new<'a>(prices: impl IntoIterator<Item = (&'a str, Price)>) -> Self {
        let mut table = PriceTable::default();
        for (name, price) in prices {
            match name.strip_suffix('*') {
                Some(prefix) => table.prefixes.push((prefix.into(), price)),
                None => drop(table.exact.insert(name.into(), price)),
            }
        }
        table.prefixes.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
        table
    }

    /// Returns the price of `model`: of its own name, else of the longest prefix that matches.
    pub(crate) fn price(&self, model: &str) -> Option<&Price> {
        let prefix = || self.prefixes.iter().find(|(prefix, _)| model.starts_with(&**prefix));
        self.exact.get(model).or_else(|| prefix().map(|(_, price)| price))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PRICE: Price =
        Price { input: 2_500_000, cached: 1_250_000, cache_write: 3_125_000, output: 10_000_000 };

    #[test]
    fn each_kind_of_token_costs_its_own_price() {
        let usage =
            |input, cached, cache_write, output| Usage { input, cached, cache_write, output, reasoning: 0 };
        for (tokens, want) in [
            (usage(0, 0, 0, 0), 0),
            (usage(1_000, 0, 0, 100), 2_500_000 + 1_000_000),
            (usage(1_000, 400, 0, 0), 1_500_000 + 500_000),
            (usage(1_000, 400, 100, 0), 1_250_000 + 500_000 + 312_500),
            (usage(1, 0, 1, 0), 3_125),
            (usage(10, 20, 5, 0), 12_500),
            (usage(10, 5, 20, 0), 6_250 + 15_625),
            (usage(u64::MAX, 0, 0, u64::MAX), u64::MAX),
        ] {
            assert_eq!(PRICE.cost(&tokens), want, "{tokens:?}");
        }
        let reasoning = Usage { output: 5, reasoning: 5, ..Usage::default() };
        assert_eq!(PRICE.cost(&reasoning), 50_000, "reasoning tokens are output tokens");
    }

    #[test]
    fn a_cost_is_rounded_half_up_once() {
        let cost = |input, output| {
            let price = Price { input: 250, output: 249, ..Price::default() };
            price.cost(&Usage { input, output, ..Usage::default() })
        };
        for (input, output, want) in [(1, 0, 0), (2, 0, 1), (0, 2, 0), (1, 1, 0), (6, 0, 2), (5, 1, 1)] {
            assert_eq!(cost(input, output), want, "{input} {output}");
        }
        let most = Price { input: u64::MAX, cached: u64::MAX, cache_write: u64::MAX, output: u64::MAX };
        assert_eq!(most.cost(&Usage { input: u64::MAX, output: u64::MAX, ..Usage::default() }), u64::MAX);
    }

    #[test]
    fn the_exact_name_wins_then_the_longest_prefix() {
        let price = |input| Price { input, ..Price::default() };
        let names = ["gpt-4o*", "*", "gpt-4o-mini", "gpt-4o-mini*", "gpt-*", "a*b"];
        let table = PriceTable::new(names.into_iter().zip((1..).map(price)));
        for (model, want) in [
            ("gpt-4o", 1),
            ("gpt-4o-2024-08-06", 1),
            ("gpt-4o-mini", 3),
            ("gpt-4o-mini-2", 4),
            ("gpt-5", 5),
            ("gpt", 2),
            ("", 2),
            ("a*b", 6),
            ("axb", 2),
        ] {
            assert_eq!(table.price(model).map(|p| p.input), Some(want), "{model:?}");
        }
        assert_eq!(PriceTable::new([("gpt-4o", PRICE)]).price("gpt-4"), None);
    }

    proptest! {
        #[test]
        fn a_cost_is_within_half_a_nano_usd(input in 0u64..1 << 32, shares in (0u64..1 << 32, 0u64..1 << 32), output in 0u64..1 << 32) {
            let usage = Usage { input, cached: shares.0, cache_write: shares.1, output, reasoning: 0 };
            let price = Price { input: 7, cached: 3, cache_write: 11, output: 13 };
            let cached = shares.0.min(input);
            let written = shares.1.min(input - cached);
            let pico = (input - cached - written) * 7 + cached * 3 + written * 11 + output * 13;
            let (low, high) = (price.cost(&usage) * 1_000, pico + 500);
            prop_assert!(low <= high && high < low + 1_000);
        }
    }
}
