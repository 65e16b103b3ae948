//! Running figures of each pair, a backend and a model: tokens per byte, and tokens per answer.
//!
//! They estimate what a request will use, and what an answer used whose provider does not say. The table is bounded.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::policy::key_hasher::KeyHasher;
use crate::policy::sync::Mutex;
use crate::protocol::usage::Usage;

/// Most pairs of one backend. Beyond it, no further pairs are learnt.
const MAX_PAIRS: usize = 1024;

/// Answers after which the older half counts half.
const MAX_ANSWERS: u64 = 128;

/// Bytes of a token of a pair without answers.
const DEFAULT_BYTES: u64 = 4;

/// Output tokens of an answer of a pair without answers.
const DEFAULT_OUTPUT: u64 = 512;

/// The lengths of a request and of its answer, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lengths {
    /// The body of the request.
    pub asked: u64,
    /// The text of the answer.
    pub text: u64,
}

/// What a request may use, as far as it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    /// The body, in bytes.
    pub asked: u64,
    /// The output tokens of the answer.
    pub output: Output,
    /// Whether the request uses tokens at all.
    pub is_metered: bool,
}

/// The output tokens that a request may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Output {
    /// At most so many.
    AtMost(u64),
    /// The endpoint has no output tokens.
    #[default]
    None,
    /// The request does not say.
    Unstated,
}

/// Whether a pair accepts requests that ask for the token counts of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Asking {
    /// A request that asks has succeeded.
    Accepted,
    /// A request that asks was refused. The same request succeeded without the question.
    Refused,
    /// No request that asks has succeeded yet.
    #[default]
    Unknown,
}

/// The running figures of the pairs of one backend.
#[derive(Debug, Default)]
pub(crate) struct Ratios(Mutex<HashMap<u64, Ratio, BuildHasherDefault<KeyHasher>>>);

/// Sums over the last answers of one pair.
#[derive(Clone, Copy, Debug, Default)]
struct Ratio {
    answers: u64,
    asked: u64,
    input: u64,
    output: u64,
    text: u64,
    /// Output tokens of answers with text.
    told: u64,
    asking: Asking,
}

impl Ratios {
    /// Learns from an answer whose provider has told the token counts. A request without text teaches nothing.
    pub(crate) fn learn(&self, key: u64, lengths: Lengths, usage: &Usage) {
        if lengths.asked == 0 {
            return;
        }
        let mut all = self.0.lock();
        if all.len() >= MAX_PAIRS && !all.contains_key(&key) {
            return;
        }
        let ratio = all.entry(key).or_default();
        if ratio.answers >= MAX_ANSWERS {
            let Ratio { answers, asked, input, output, text, told, .. } = ratio;
            for sum in [answers, asked, input, output, text, told] {
                *sum /= 2;
            }
        }
        let add = |sum: &mut u64, n: u64| *sum = sum.saturating_add(n);
        add(&mut ratio.answers, 1);
        add(&mut ratio.asked, lengths.asked);
        add(&mut ratio.input, usage.input);
        add(&mut ratio.output, usage.output);
        if lengths.text > 0 {
            add(&mut ratio.text, lengths.text);
            // Reasoning that is not shown has no text.
            add(&mut ratio.told, usage.output);
        }
    }

    /// Estimates the token counts of an answer, or of a request without one.
    pub(crate) fn estimate(&self, key: u64, lengths: Lengths) -> Usage {
        let ratio = self.ratio(key);
        let output = scaled(lengths.text, ratio.told, ratio.text);
        Usage { input: ratio.input_of(lengths.asked), output, ..Usage::default() }
    }

    /// Estimates the token counts of the answer to a request that has not been sent.
    pub(crate) fn expect(&self, key: u64, demand: &Demand) -> Usage {
        let ratio = self.ratio(key);
        let output = match (demand.output, ratio.answers) {
            (Output::None, _) => 0,
            (Output::AtMost(most), _) => most,
            (Output::Unstated, 0) => DEFAULT_OUTPUT,
            (Output::Unstated, answers) => ratio.output.div_ceil(answers),
        };
        Usage { input: ratio.input_of(demand.asked), output, ..Usage::default() }
    }

    /// Whether the pair accepts requests that ask for the token counts.
    pub(crate) fn asking(&self, key: u64) -> Asking {
        self.ratio(key).asking
    }

    /// Records whether the pair accepts requests that ask for the token counts.
    pub(crate) fn set_asking(&self, key: u64, asking: Asking) {
        let mut all = self.0.lock();
        if all.len() < MAX_PAIRS || all.contains_key(&key) {
            all.entry(key).or_default().asking = asking;
        }
    }

    fn ratio(&self, key: u64) -> Ratio {
        self.0.lock().get(&key).copied().unwrap_or_default()
    }
}

impl Ratio {
    fn input_of(&self, asked: u64) -> u64 {
        scaled(asked, self.input, self.asked)
    }
}

/// Converts bytes to tokens by the ratio of `tokens` to `per` bytes, rounded up.
fn scaled(bytes: u64, tokens: u64, per: u64) -> u64 {
    match per {
        0 => bytes.div_ceil(DEFAULT_BYTES),
        per => {
            let tokens = u128::from(bytes) * u128::from(tokens);
            u64::try_from(tokens.div_ceil(u128::from(per))).unwrap_or(u64::MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(input: u64, output: u64) -> Usage {
        Usage { input, output, ..Usage::default() }
    }

    #[test]
    fn estimates_by_the_answers_of_the_pair() {
        let ratios = Ratios::default();
        assert_eq!(ratios.estimate(1, Lengths { asked: 9, text: 4 }), usage(3, 1));
        ratios.learn(1, Lengths { asked: 300, text: 100 }, &usage(100, 50));
        ratios.learn(1, Lengths { asked: 100, text: 0 }, &usage(100, 10));
        ratios.learn(1, Lengths { asked: 0, text: 9 }, &usage(1000, 1000));
        assert_eq!(ratios.estimate(1, Lengths { asked: 10, text: 10 }), usage(5, 5));
        for _ in 0..10 * MAX_ANSWERS {
            ratios.learn(1, Lengths { asked: 100, text: 100 }, &usage(10, 20));
        }
        let estimate = ratios.estimate(1, Lengths { asked: 1000, text: 1000 });
        assert!(
            (99..=101).contains(&estimate.input) && (199..=202).contains(&estimate.output),
            "{estimate:?}"
        );
        ratios.learn(1, Lengths { asked: u64::MAX, text: u64::MAX }, &usage(u64::MAX, u64::MAX));
        ratios.learn(1, Lengths { asked: u64::MAX, text: u64::MAX }, &usage(u64::MAX, u64::MAX));
        assert!(ratios.estimate(1, Lengths { asked: u64::MAX, text: 0 }).input > 0);
    }

    #[test]
    fn expects_what_the_request_states_or_what_the_pair_answered_before() {
        let ratios = Ratios::default();
        let demand = |output| Demand { asked: 40, output, is_metered: true };
        assert_eq!(ratios.expect(1, &demand(Output::Unstated)), usage(10, DEFAULT_OUTPUT));
        ratios.learn(1, Lengths { asked: 400, text: 90 }, &usage(200, 30));
        ratios.learn(1, Lengths { asked: 400, text: 0 }, &usage(200, 31));
        for (output, want) in [(Output::Unstated, 31), (Output::AtMost(7), 7), (Output::None, 0)] {
            assert_eq!(ratios.expect(1, &demand(output)), usage(20, want), "{output:?}");
        }
    }

    #[test]
    fn the_table_is_bounded() {
        let ratios = Ratios::default();
        for key in 0..2 * MAX_PAIRS as u64 {
            ratios.learn(key, Lengths { asked: 4, text: 4 }, &usage(4, 4));
            ratios.set_asking(key, Asking::Refused);
        }
        assert_eq!(ratios.0.lock().len(), MAX_PAIRS);
        assert_eq!(ratios.asking(0), Asking::Refused);
        assert_eq!(ratios.asking(2 * MAX_PAIRS as u64 - 1), Asking::Unknown);
    }
}
