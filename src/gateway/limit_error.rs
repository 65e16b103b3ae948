//! Why a limit refuses a request, and the response to it: a 429.

use std::borrow::Cow;

use http::StatusCode;

use crate::code::Code;
use crate::gateway::error_row::{self, ErrorRow, LIMIT};
use crate::policy::prices::usd;
use crate::policy::retry::retry_after_secs;
use crate::policy::spend::Period;
use crate::policy::token_window::TokenDecision;
use crate::time::{Day, Nanos, SECOND};

/// `Retry-After` while a budget is spent: SDKs do not wait longer.
const BUDGET_RETRY: Nanos = 59 * SECOND;

/// The type that OpenAI uses beside the code of the same name.
const QUOTA: &str = "insufficient_quota";

/// Why a limit refuses a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LimitError {
    /// The budgets of all backends that could serve the request are spent.
    BackendBudgetsSpent,
    /// A budget is full of what other requests have reserved.
    BudgetReserved,
    /// The client's budget does not pay for the request.
    BudgetSpent {
        /// The budget in nano-USD.
        limit: u64,
        /// Its period.
        per: Period,
        /// The first day of the next period.
        opens: Day,
    },
    /// The request may cost more than the client's whole budget.
    AboveBudget {
        /// The most that the request may cost, in nano-USD.
        cost: u64,
        /// The budget in nano-USD.
        limit: u64,
        /// Its period.
        per: Period,
    },
    /// The client has reached its limit of requests; the time until the next request may pass.
    Requests(Nanos),
    /// The client has reached its limit of tokens.
    Tokens(TokenDecision),
    /// The input and the stated maximum of output are above a limit of tokens a minute.
    TooLarge {
        /// The tokens that the request may use.
        tokens: u64,
        /// The limit.
        limit: u64,
    },
}

impl LimitError {
    /// Whether a retry would fail in the same way.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            LimitError::AboveBudget { .. }
            | LimitError::BackendBudgetsSpent
            | LimitError::BudgetSpent { .. }
            | LimitError::TooLarge { .. } => true,
            LimitError::BudgetReserved | LimitError::Requests(_) | LimitError::Tokens(_) => false,
        }
    }

    /// The response.
    pub(crate) fn row(&self) -> ErrorRow {
        fn row(kind: &'static str, code: Code, message: impl Into<Cow<'static, str>>) -> ErrorRow {
            error_row::row(StatusCode::TOO_MANY_REQUESTS, kind, code, message)
        }
        let wait_for = |what: Cow<'static, str>, wait: Nanos| {
            let message = format!("{what}; try again in {} s.", retry_after_secs(wait));
            row(LIMIT, Code::RateLimitExceeded, message).after(wait)
        };
        match self {
            LimitError::BackendBudgetsSpent => {
                let message = "The budgets of all backends that serve this model are spent. See /status.";
                row(QUOTA, Code::InsufficientQuota, message).after(BUDGET_RETRY)
            }
            LimitError::BudgetReserved => {
                let what = "What is left of the budget is reserved for requests that are being served";
                wait_for(what.into(), SECOND)
            }
            LimitError::BudgetSpent { limit, per, opens } => {
                let (usd, per) = (short_usd(*limit), per.name());
                let message = format!(
                    "What is left of this key's budget of {usd} USD a {per} does not pay for the request; the budget opens again on {opens} at 00:00 UTC."
                );
                row(QUOTA, Code::InsufficientQuota, message).after(BUDGET_RETRY)
            }
            LimitError::AboveBudget { cost, limit, per } => {
                let (cost, usd, per) = (short_usd(*cost), short_usd(*limit), per.name());
                let message = format!(
                    "The request may cost {cost} USD, more than this key's whole budget of {usd} USD a {per}; lower the maximum of output, or shorten the input."
                );
                row(QUOTA, Code::InsufficientQuota, message).after(BUDGET_RETRY)
            }
            LimitError::Requests(wait) => {
                wait_for("The limit of requests per minute is reached".into(), *wait)
            }
            // If only open reservations are in the way, nobody knows when they end.
            LimitError::Tokens(TokenDecision { limit, opens_in, .. }) => {
                let what = format!("The limit of {limit} tokens per minute is reached");
                wait_for(what.into(), opens_in.unwrap_or(SECOND))
            }
            LimitError::TooLarge { tokens, limit } => {
                let message = format!(
                    "The input and the maximum of output are {tokens} tokens, above the limit of {limit} tokens per minute; lower the maximum, or shorten the input."
                );
                row(LIMIT, Code::RequestTooLargeForLimit, message)
            }
        }
    }
}

/// Writes nano-USD in USD, without zeros at the end.
fn short_usd(nano: u64) -> String {
    usd(nano).trim_end_matches('0').trim_end_matches('.').to_owned()
}
