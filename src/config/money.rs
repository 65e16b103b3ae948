//! Prices and budgets: amounts of USD with at most six decimals, kept as integers.

use toml::de::DeValue;

use crate::config::models::must_be;
use crate::config::range::Range;
use crate::config::toml_reader::Section;
use crate::policy::pattern::Pattern;
use crate::policy::spend::Period;

/// Millionths of an amount's unit.
const ONE: u64 = 1_000_000;
const DECIMALS: usize = 6;
/// USD per million tokens. A millionth of it is one pico-USD a token.
const PRICE: Range<u64> = Range::new(0, 1_000_000 * ONE);
/// USD of a budget, more than 0.
const USD: Range<u64> = Range::new(1, 1_000_000_000 * ONE);
/// Nano-USD in a millionth of a USD.
const NANO: u64 = 1000;
/// Longest number that a message shows, in bytes.
const MAX_SHOWN: usize = 40;

/// A limit of what may be spent in a day or in a month.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// The limit in nano-USD, at least 1000.
    pub nano_usd: u64,
    /// The time that the limit is for.
    pub per: Period,
}

/// Reads `prices` of a backend: (pattern, [input, cached, cache_write, output] in pico-USD a token).
pub(super) fn prices(t: &mut Section<'_, '_>) -> Vec<(String, [u64; 4])> {
    let read = t.named_sections("prices", &["input", "cached", "cache_write", "output"], |t, name| {
        if Pattern::parse(&name.value).is_none() {
            let what = must_be(", `*` only at the end");
            t.fault_of(&name, &format!("is not a valid name; {what}"));
        }
        let input = required_amount(t, "input", PRICE);
        let cached = amount(t, "cached", PRICE);
        let cache_write = amount(t, "cache_write", PRICE);
        let output = required_amount(t, "output", PRICE)?;
        let input = input?;
        Some((name.value, [input, cached.unwrap_or(input), cache_write.unwrap_or(input), output]))
    });
    read.into_iter().flatten().collect()
}

/// Reads `budget`. Returns `None` if it is not set, or if it is not valid: then a fault is recorded.
pub(super) fn budget(t: &mut Section<'_, '_>) -> Option<Budget> {
    let read = t.optional_section("budget", |t| {
        let usd = required_amount(t, "usd", USD);
        if t.line_of("per").is_none() {
            t.missing("per", "\"day\" or \"month\"");
        }
        let per = t.choice("per", Period::Month, &[("day", Period::Day), ("month", Period::Month)]);
        Some(Budget { nano_usd: usd? * NANO, per })
    });
    read.flatten()
}

/// Reads a required number. If it is missing or not valid, records a fault and returns `None`.
fn required_amount(t: &mut Section<'_, '_>, key: &'static str, range: Range<u64>) -> Option<u64> {
    if t.line_of(key).is_none() {
        let Range { min, max } = range;
        t.missing(key, &format!("a number from {} to {}", shown(min), shown(max)));
    }
    amount(t, key, range)
}

/// Reads an optional number in millionths; `range` is in millionths too.
pub(super) fn amount(t: &mut Section<'_, '_>, key: &'static str, range: Range<u64>) -> Option<u64> {
    let Range { min, max } = range;
    let needed = format!("a number from {} to {}", shown(min), shown(max));
    let field = t.take(key)?;
    let line = field.line;
    let value = match t.unquoted(key, field, &needed)? {
        Ok(value) => value,
        Err(text) => {
            let amount = millionths(&text.value).filter(|amount| (min..=max).contains(amount));
            if amount.is_none() {
                t.invalid(&text, &format!("must be {needed}, with at most six decimals"));
            }
            return amount;
        }
    };
    let text = match &value {
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_too_large| number.as_str().to_owned(), |number| number.to_string()),
        // The shortest decimal number that is this float, never with an exponent.
        DeValue::Float(number) => number
            .as_str()
            .parse()
            .map_or_else(|_invalid| number.as_str().to_owned(), |number: f64| number.to_string()),
        other => {
            t.wrong_type(line, key, other, &needed);
            return None;
        }
    };
    let amount = millionths(&text).filter(|amount| (min..=max).contains(amount));
    if amount.is_none() {
        let found = match text.len() {
            ..=MAX_SHOWN => format!("is {text}"),
            _ => "has too many digits".to_owned(),
        };
        let allowed = format!("must be from {} to {}, with at most six decimals", shown(min), shown(max));
        t.fault(line, key, &format!("{found}; {allowed}"));
    }
    amount
}

/// The millionths of a decimal number without sign and exponent. `None` if it is not one, if it has more decimals, or
/// if the millionths are more than a `u64` holds.
fn millionths(text: &str) -> Option<u64> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    let is_number = !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_digit() || b == b'.')
        && decimals.len() <= DECIMALS;
    let digits = format!("{whole}{decimals:0<DECIMALS$}");
    is_number.then(|| digits.parse().ok()).flatten()
}

/// Writes `amount` millionths as a decimal number.
fn shown(amount: u64) -> String {
    match (amount / ONE, amount % ONE) {
        (whole, 0) => whole.to_string(),
        (whole, rest) => format!("{whole}.{rest:0DECIMALS$}").trim_end_matches('0').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Backend, Config};

    const BACKEND: &str = "[[backends]]\nurl = \"http://a\"\nweight = 1\n";
    const AMOUNT: &str = "must be from 0 to 1000000, with at most six decimals";
    const USD_AMOUNT: &str = "must be from 0.000001 to 1000000000, with at most six decimals";

    /// Reads `text` at line 4 of a backend.
    fn backend(text: &str) -> Result<Backend, String> {
        Config::of_backend(text).map(|config| config.backends[0].clone())
    }

    #[test]
    fn prices_are_whole_numbers_of_pico_usd() {
        for (text, expected) in [
            ("{ input = 1, output = 2 }", [1_000_000, 1_000_000, 1_000_000, 2_000_000]),
            ("{ input = 2.50, output = 10.0 }", [2_500_000, 2_500_000, 2_500_000, 10_000_000]),
            ("{ input = 0.15, cached = 0.075, output = 0.6 }", [150_000, 75_000, 150_000, 600_000]),
            ("{ input = 0.15, cache_write = 0, output = 0.6 }", [150_000, 150_000, 0, 600_000]),
            ("{ input = 0.000001, output = 1_000_000 }", [1, 1, 1, 1_000_000_000_000]),
            ("{ input = 1e-6, output = 1e6 }", [1, 1, 1, 1_000_000_000_000]),
            ("{ input = 0.1, output = 0.3 }", [100_000, 100_000, 100_000, 300_000]),
            (
                "{ input = 0x10, output = 999999.999999 }",
                [16_000_000, 16_000_000, 16_000_000, 999_999_999_999],
            ),
        ] {
            let read = backend(&format!("prices = {{ \"gpt-4o\" = {text} }}")).unwrap();
            assert_eq!(read.prices, [("gpt-4o".to_owned(), expected)], "{text}");
        }
        let text = "[backends.prices]\nb = { input = 1, output = 1 }\n\"a*\" = { input = 1, output = 1 }";
        let names = backend(text).unwrap().prices.into_iter().map(|(name, _)| name);
        assert_eq!(names.collect::<Vec<_>>(), ["b", "a*"]);
        assert_eq!(backend("prices = {}").unwrap().prices, []);
    }

    #[test]
    fn faults_of_prices_name_the_line_and_what_is_allowed() {
        let fault = |key: &str, what: &str| format!("test:4: `backends[0].prices.gpt-4o.{key}` {what}");
        for (text, expected) in [
            ("{ input = -1, output = 1 }", fault("input", &format!("is -1; {AMOUNT}"))),
            (
                "{ input = 1, output = 1000000.000001 }",
                fault("output", &format!("is 1000000.000001; {AMOUNT}")),
            ),
            ("{ input = 1, output = 0.1234567 }", fault("output", &format!("is 0.1234567; {AMOUNT}"))),
            ("{ input = 1, cached = 1e-7, output = 1 }", fault("cached", &format!("is 0.0000001; {AMOUNT}"))),
            (
                "{ input = 1, cache_write = nan, output = 1 }",
                fault("cache_write", &format!("is NaN; {AMOUNT}")),
            ),
            ("{ input = -inf, output = 1 }", fault("input", &format!("is -inf; {AMOUNT}"))),
            ("{ input = 1e300, output = 1 }", fault("input", &format!("has too many digits; {AMOUNT}"))),
            ("{ input = 1e-300, output = 1 }", fault("input", &format!("has too many digits; {AMOUNT}"))),
            (
                "{ input = 99999999999999999999999999999999999999999, output = 1 }",
                fault("input", &format!("has too many digits; {AMOUNT}")),
            ),
            (
                "{ input = \"sk-CANARY\", output = 1 }",
                fault("input", "is a string; must be a number from 0 to 1000000, without quotes"),
            ),
            ("{ output = 1 }", fault("input", "is missing; a number from 0 to 1000000 is required")),
            ("{ input = 1 }", fault("output", "is missing; a number from 0 to 1000000 is required")),
            (
                "{ input = 1, outptu = 1, output = 1 }",
                "test:4: unknown key `backends[0].prices.gpt-4o.outptu`; did you mean `output`?".to_owned(),
            ),
            (
                "1",
                "test:4: `backends[0].prices.gpt-4o` is an integer; must be a table with `input`".to_owned(),
            ),
        ] {
            let read = backend(&format!("prices = {{ \"gpt-4o\" = {text} }}"));
            assert_eq!(read.unwrap_err(), expected, "{text}");
        }
        let long = "x".repeat(257);
        for (name, shown) in
            [("", "\"\""), ("a*b", "\"a*b\""), ("**", "\"**\""), ("a\\n", "<name>"), (&long, "<name>")]
        {
            let what = "must be 1 to 256 bytes without control characters, `*` only at the end";
            let read = backend(&format!("prices = {{ \"{name}\" = {{ input = 1, output = 1 }} }}"));
            assert_eq!(
                read.unwrap_err(),
                format!("test:4: `backends[0].prices.{shown}` is not a valid name; {what}")
            );
        }
        let twice = backend("prices.a = { input = 1, output = 1 }\nprices.\"a\" = { input = 1, output = 1 }");
        assert!(twice.unwrap_err().starts_with("test:5: syntax error at column 8: duplicate key"));
        let read = backend("prices = 1");
        assert_eq!(
            read.unwrap_err(),
            "test:4: `backends[0].prices` is an integer; must be a table of tables"
        );
    }

    #[test]
    fn budgets_are_read_and_their_faults_name_the_line() {
        let price = "prices = { \"*\" = { input = 1, output = 1 } }";
        for (text, nano_usd, per) in [
            ("usd = 50, per = \"day\"", 50_000_000_000, Period::Day),
            ("usd = 0.01, per = \"month\"", 10_000_000, Period::Month),
            ("usd = 0.000001, per = \"day\"", 1000, Period::Day),
            ("usd = 1_000_000_000, per = \"day\"", 1_000_000_000_000_000_000, Period::Day),
        ] {
            let text = format!("budget = {{ {text} }}");
            let expected = Some(Budget { nano_usd, per });
            assert_eq!(backend(&format!("{text}\n{price}")).unwrap().budget, expected, "{text}");
            let client = format!("{BACKEND}{price}\n[[client_keys]]\nname = \"t\"\nkey = \"k\"\n{text}\n");
            assert_eq!(Config::of(&client).unwrap().clients[0].budget, expected, "{text}");
        }
        for (text, expected) in [
            ("{ usd = 0, per = \"day\" }", format!("`backends[0].budget.usd` is 0; {USD_AMOUNT}")),
            (
                "{ usd = 1000000000.5, per = \"day\" }",
                format!("`backends[0].budget.usd` is 1000000000.5; {USD_AMOUNT}"),
            ),
            (
                "{ usd = 0.0000001, per = \"day\" }",
                format!("`backends[0].budget.usd` is 0.0000001; {USD_AMOUNT}"),
            ),
            (
                "{ per = \"day\" }",
                "`backends[0].budget.usd` is missing; a number from 0.000001 to 1000000000 is required"
                    .to_owned(),
            ),
            (
                "{ usd = 1 }",
                "`backends[0].budget.per` is missing; \"day\" or \"month\" is required".to_owned(),
            ),
            (
                "{ usd = 1, per = \"year\" }",
                "`backends[0].budget.per` is \"year\"; must be one of \"day\", \"month\"".to_owned(),
            ),
        ] {
            let read = backend(&format!("budget = {text}\n{price}"));
            assert_eq!(read.unwrap_err(), format!("test:4: {expected}"), "{text}");
        }
    }

    #[test]
    fn a_budget_without_a_ledger_causes_one_warning() {
        let price = "prices = { \"*\" = { input = 1, output = 1 } }";
        let budget = "budget = { usd = 1, per = \"day\" }";
        let client = format!("[[client_keys]]\nname = \"t\"\nkey = \"k\"\n{budget}\n");
        let ledger = "[ledger]\npath = \"none-of-this-name.db\"\n";
        let warning = "a budget starts at zero at each start without a `[ledger]`; set `ledger.path`";
        for (text, expected) in [
            (format!("{BACKEND}{price}\n"), vec![]),
            (format!("{BACKEND}{price}\n{budget}\n"), vec![warning]),
            (format!("{BACKEND}{price}\n{client}"), vec![warning]),
            (format!("{BACKEND}{price}\n{budget}\n{client}"), vec![warning]),
            (format!("{ledger}{BACKEND}{price}\n{budget}\n{client}"), vec![]),
        ] {
            assert_eq!(Config::of(&text).unwrap().warnings, expected, "{text}");
        }
    }

    #[test]
    fn decimal_numbers_are_read_exactly() {
        for (text, expected) in [
            ("0", Some(0)),
            ("1", Some(1_000_000)),
            ("2.5", Some(2_500_000)),
            ("0.000001", Some(1)),
            ("0.1", Some(100_000)),
            ("1000000000", Some(1_000_000_000_000_000)),
            ("999999999.999999", Some(999_999_999_999_999)),
            ("18446744073709.551615", Some(u64::MAX)),
            ("18446744073709.551616", None),
            ("0.0000001", None),
            ("-1", None),
            ("-0", None),
            ("+1", None),
            ("1.2.3", None),
            ("1e3", None),
            ("inf", None),
            ("NaN", None),
            ("", None),
            ("1_0", None),
        ] {
            assert_eq!(millionths(text), expected, "{text}");
        }
    }

    #[test]
    fn every_amount_survives_the_float_between_text_and_integer() {
        for _ in 0..100_000 {
            let amount = fastrand::u64(0..=USD.max >> fastrand::u32(0..50));
            let float: f64 = shown(amount).parse().unwrap();
            assert_eq!(millionths(&float.to_string()), Some(amount));
        }
    }
}
