//! `zap check --live`: sends each backend a health check and a request for its models, and reports the results.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::task::{LocalSet, spawn_local};

use crate::clock;
use crate::clock::LimitExpired;
use crate::config::{Config, quoted};
use crate::policy::breaker::Probe;
use crate::protocol::model_list;
use crate::upstream::Upstream;
use crate::upstream::connect::ConnectError;
use crate::upstream::fleet::Snapshot;
use crate::upstream::get::get;
use crate::upstream::listing::MAX_LIST;
use crate::upstream::paths::shown_url;

/// Most names that a line lists.
const MAX_NAMES: usize = 5;

/// What a backend answered.
pub(crate) struct Report {
    /// Lines for the operator, with no key and no part of a response.
    pub(crate) text: String,
    /// Whether the backend could not serve a request as it is configured.
    pub(crate) has_failed: bool,
}

/// Asks all backends at once. The reports are in their order.
///
/// # Errors
/// Returns the error of the system if no runtime is available.
pub(crate) fn ask_all(fleet: &Snapshot) -> io::Result<Vec<Report>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let reports = LocalSet::new().block_on(&runtime, async {
        let ask = |(id, upstream): (usize, &Arc<Upstream>)| {
            spawn_local(report(fleet.config.clone(), id, upstream.clone()))
        };
        let asked: Vec<_> = fleet.backends.iter().enumerate().map(ask).collect();
        let mut reports = Vec::with_capacity(asked.len());
        for asked in asked {
            reports.push(asked.await.map_err(io::Error::other)?);
        }
        Ok(reports)
    });
    // A name look-up that hangs must not delay the exit.
    runtime.shutdown_background();
    reports
}

async fn report(config: Arc<Config>, id: usize, upstream: Arc<Upstream>) -> Report {
    let (health, is_up) = match upstream.conf.health.is_enabled {
        true => {
            let answer = ask(&config, &upstream, upstream.probe(), 0).await;
            let (what, is_up) = health_in_words(&upstream, answer.map(|answer| answer.status));
            (format!("{}: {what}", shown_url(&upstream.conf, &upstream.conf.health_path)), is_up)
        }
        false => ("not asked, since `health.enabled` is false".to_owned(), true),
    };
    let (models, has_models) = match upstream.models_request() {
        // A backend that failed its health check is not asked for its models.
        _ if !is_up => ("not asked".to_owned(), true),
        None => ("not asked, since `chat_path` does not end in `/chat/completions`".to_owned(), true),
        Some(request) => {
            let answer = ask(&config, &upstream, request, MAX_LIST).await;
            models_in_words(&upstream, answer, &names(&config, id))
        }
    };
    let text = format!("  {}\n    health  {health}\n    models  {models}\n", upstream.name());
    Report { text, has_failed: !is_up || !has_models }
}

/// A response.
struct Answer {
    status: StatusCode,
    /// `None` if it is too long, or not read.
    body: Option<Vec<u8>>,
}

/// Sends one GET, in the time of a health check. Reads a body of at most `max` bytes; with 0 none.
async fn ask(config: &Config, upstream: &Upstream, request: &[u8], max: usize) -> Result<Answer, String> {
    let limit: Duration = config.health.timeout;
    let asking = async {
        let got = get(upstream, request, config.timeouts.connect).await.map_err(|error| match error {
            ConnectError::Exhausted { fault, .. } | ConnectError::Peer(fault) => fault.to_string(),
        })?;
        let status = got.head.status;
        let body = match max {
            0 => None,
            _ => got.body(max).await.map_err(|fault| fault.to_string())?,
        };
        Ok(Answer { status, body })
    };
    match clock::within(limit, asking).await {
        Ok(answer) => answer,
        Err(LimitExpired) => Err(format!("no answer within {} s", limit.as_secs())),
    }
}

/// Describes the response to a health check. Returns whether the backend passed, too.
fn health_in_words(upstream: &Upstream, answer: Result<StatusCode, String>) -> (String, bool) {
    let status = match answer {
        Ok(status) => status,
        Err(cause) => return (format!("failed: {cause}"), false),
    };
    if let Some(what) = refused(upstream, status) {
        return (what, false);
    }
    let number = status.as_u16();
    let probe = Probe::of_status(number, upstream.conf.forward_authorization);
    let what = match number {
        200..=299 => "up",
        401 | 403 => "up; requires a client's key",
        404 | 405 => "up, but the path does not exist; set `health_path`",
        429 => "up, but it takes no requests now: too many, or no credit",
        _ if probe == Probe::Alive => "up",
        _ => "the backend, or a proxy in front of it, is down",
    };
    (format!("HTTP {number}, {what}"), probe == Probe::Alive)
}

/// Describes a redirect or a refused key; `None` for another status.
fn refused(upstream: &Upstream, status: StatusCode) -> Option<String> {
    let number = status.as_u16();
    let what = match number {
        300..=399 => "it redirects, and Zap does not follow; set the address that it redirects to as `url`",
        401 | 403 if upstream.conf.forward_authorization => return None,
        401 | 403 if upstream.conf.api_key.is_none() => "requires a key; set `api_key`",
        401 => "it refuses the key; check `api_key` and `auth_header`",
        403 => "it refuses the key, or this key may not do that; check `api_key`",
        _ => return None,
    };
    Some(format!("HTTP {number}, {what}"))
}

/// What the answer to a request for the models means, and whether the backend passed. `names` are those that the
/// configuration sends to it.
fn models_in_words(
    upstream: &Upstream,
    answer: Result<Answer, String>,
    names: &BTreeSet<&str>,
) -> (String, bool) {
    let Answer { status, body } = match answer {
        Ok(answer) => answer,
        Err(cause) => return (format!("failed: {cause}"), false),
    };
    if let Some(what) = refused(upstream, status) {
        return (what, false);
    }
    let number = status.as_u16();
    let listed = body.as_deref().and_then(model_list::names).filter(|_| status.is_success());
    let Some(listed) = listed else {
        let what = match number {
            200..=299 => "but that is no list of models",
            401 | 403 => "requires a client's key",
            _ => "it lists no models",
        };
        return (format!("HTTP {number}, {what}"), number < 500);
    };
    // Gemini lists `models/NAME`.
    let is_listed = |name: &str| {
        listed.iter().any(|id| **id == *name || id.rsplit_once('/').is_some_and(|(_, id)| id == name))
    };
    let missing: Vec<String> =
        names.iter().filter(|name| !is_listed(name)).filter_map(|name| quoted(name)).collect();
    let more = match missing.len() {
        0 => String::new(),
        n => format!(
            "; it does not list {}{}",
            missing.iter().take(MAX_NAMES).cloned().collect::<Vec<_>>().join(", "),
            if n > MAX_NAMES {
                format!(" and {} more of the configuration", n - MAX_NAMES)
            } else {
                String::new()
            }
        ),
    };
    let plural = if listed.len() == 1 { "" } else { "s" };
    (format!("HTTP {number}, {} model{plural}{more}", listed.len()), true)
}

/// The names of models that the backend `id` may be sent, as far as the configuration has them in full.
fn names(config: &Config, id: usize) -> BTreeSet<&str> {
    let backend = &config.backends[id];
    let rules = backend.models.iter().flatten();
    let own = rules.filter_map(|rule| match rule.own.as_deref() {
        Some(own) => Some(own),
        None => (!rule.public.is_prefix()).then(|| rule.public.stem()),
    });
    let targets = config.routes.iter().flat_map(|route| &route.targets);
    let routed = targets.filter(|target| target.backend == id).filter_map(|target| target.model.as_deref());
    let names = own.chain(backend.default_model.as_deref()).chain(routed);
    names.filter(|name| !name.ends_with('*')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_a_backend_are_those_that_it_is_sent() {
        let text = "[models.x]\ntargets = [{ backend = \"a\", model = \"big\" }, { backend = \"b\", model = \"c\" }]\n\
            [[backends]]\nname = \"a\"\nurl = \"http://a\"\nweight = 1\ndefault_model = \"d\"\n\
            models = { one = \"own\", \"p*\" = \"q*\" }\n\
            [[backends]]\nname = \"b\"\nurl = \"http://b\"\nweight = 1\nmodels = [\"m\", \"n*\"]\n";
        let config = Config::of(text).unwrap();
        assert_eq!(names(&config, 0), BTreeSet::from(["big", "d", "own"]));
        assert_eq!(names(&config, 1), BTreeSet::from(["c", "m"]));
    }
}
