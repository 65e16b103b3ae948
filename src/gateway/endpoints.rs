//! The endpoints that Zap serves itself: `/health`, `/ready`, `/metrics`, `/status`, `/usage`, `/v1/models`.

use std::collections::HashSet;
use std::io::Write as _;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::StatusCode;
use http::header::{CONTENT_ENCODING, HeaderMap, HeaderValue, VARY};
use serde_json::json;
use tokio::task::spawn_blocking;

use crate::client::respond::text;
use crate::clock;
use crate::clock::within;
use crate::config::Config;
use crate::gateway::ClientResponse;
use crate::gateway::pages::CachedPage;
use crate::gateway::refusal::GatewayError;
use crate::gateway::served_models::ServedModels;
use crate::gateway::state::Shared;
use crate::gateway::{status, status_page};
use crate::http1::accept::{accepts_gzip, prefers_openmetrics};
use crate::policy::balance::BackendId;
use crate::policy::pattern::MAX_NAME;
use crate::telemetry::clients::Client;
use crate::telemetry::encode::Format;
use crate::telemetry::ledger::report::{ReportError, UsageQuery};
use crate::telemetry::metrics;
use crate::telemetry::metrics::Scrape;
use crate::upstream::fleet::Snapshot;

/// `/health`: the process is alive.
pub(crate) fn health() -> ClientResponse {
    text(StatusCode::OK, "application/json", "{\"status\":\"ok\"}".into())
}

/// `/`: what is here.
pub(crate) fn root() -> ClientResponse {
    const TEXT: &str = concat!(
        "Zap ",
        env!("CARGO_PKG_VERSION"),
        ", an LLM inference gateway. Base URL: /v1 for OpenAI's SDKs, / for Anthropic's. Operators: /v1/models /status \
         /usage /metrics /health /ready, and `zap help`.\n"
    );
    let mut response = text(StatusCode::OK, "text/plain; charset=utf-8", TEXT.into());
    response.headers_mut().append(VARY, HeaderValue::from_static("accept"));
    response
}

/// `/ready`: Zap takes new requests; 503 while it drains.
pub(crate) fn ready(shared: &Shared) -> ClientResponse {
    if shared.is_stopping() {
        text(StatusCode::SERVICE_UNAVAILABLE, "application/json", "{\"status\":\"draining\"}".into())
    } else {
        text(StatusCode::OK, "application/json", "{\"status\":\"ready\"}".into())
    }
}

/// Longest text that is compressed, in bytes. A longer one goes out as it is.
const MAX_GZIP: usize = 32 << 20;

/// `/metrics`: the metrics in Prometheus text format or as OpenMetrics, compressed or not, as the client prefers.
///
/// # Errors
/// As [`page`].
pub(crate) async fn metrics(
    shared: &Arc<Shared>,
    headers: &HeaderMap,
) -> Result<ClientResponse, GatewayError> {
    let format = if prefers_openmetrics(headers) { Format::OpenMetrics } else { Format::Prometheus };
    let name = match format {
        Format::Prometheus => CachedPage::Metrics,
        Format::OpenMetrics => CachedPage::OpenMetrics,
    };
    page(shared, headers, (name, format.content_type()), move |shared| scrape(shared, format)).await
}

/// The response with an expensive page, compressed if the client takes that.
///
/// # Errors
/// [`GatewayError::Internal`] if it cannot be rendered, which is a bug.
async fn page(
    shared: &Arc<Shared>,
    headers: &HeaderMap,
    (name, content_type): (CachedPage, &'static str),
    render: impl FnOnce(&Shared) -> Bytes + Send + 'static,
) -> Result<ClientResponse, GatewayError> {
    let is_gzip = accepts_gzip(headers);
    let name = if is_gzip { name.compressed() } else { name };
    let of = shared.clone();
    let render = move || {
        let text = render(&of);
        if is_gzip { gzip(&text).unwrap_or(text) } else { text }
    };
    let body = shared.pages.text(name, render).await.ok_or(GatewayError::Internal)?;
    let is_gzip = is_gzip && body.starts_with(&GZIP);
    let mut response = text(StatusCode::OK, content_type, body);
    let headers = response.headers_mut();
    headers.append(VARY, HeaderValue::from_static("accept, accept-encoding"));
    if is_gzip {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    Ok(response)
}

/// The beginning of a compressed body (RFC 1952, section 2.3.1). No text begins so.
const GZIP: [u8; 2] = [0x1F, 0x8B];

/// Bytes that are compressed between two times of giving way to threads that wait for the core.
const STRETCH: usize = 16 << 10;

/// Compresses a text; `None` if it is too long.
fn gzip(text: &[u8]) -> Option<Bytes> {
    let out = Vec::with_capacity(text.len() / 8 + 64);
    let mut encoder = GzEncoder::new(out, Compression::fast());
    if text.len() > MAX_GZIP {
        return None;
    }
    for part in text.chunks(STRETCH) {
        encoder.write_all(part).ok()?;
        std::thread::yield_now();
    }
    encoder.finish().ok().map(Bytes::from)
}

fn scrape(shared: &Shared, format: Format) -> Bytes {
    let current = shared.current.load();
    let scrape = Scrape {
        telemetry: &shared.telemetry,
        backends: &current.backends,
        models: current.table().models(),
        clients: &current.clients,
        config: &current.config,
        queue_depth: shared.admission.depth(),
        known_ids: shared.known_ids.len(),
        rate_limit_keys: shared.limiter.keys(),
    };
    metrics::encode(&scrape, format).into()
}

/// `/status`: the backends and their states.
///
/// # Errors
/// As [`page`].
pub(crate) async fn status(
    shared: &Arc<Shared>,
    headers: &HeaderMap,
) -> Result<ClientResponse, GatewayError> {
    page(shared, headers, (CachedPage::Status, "application/json"), status::encode).await
}

/// `/status` and `/` for a browser: the same as a page.
///
/// # Errors
/// As [`page`].
pub(crate) async fn status_page(
    shared: &Arc<Shared>,
    headers: &HeaderMap,
) -> Result<ClientResponse, GatewayError> {
    let render = |shared: &Shared| status_page::render(&status::status(shared));
    let page = page(shared, headers, (CachedPage::StatusPage, "text/html; charset=utf-8"), render).await?;
    Ok(status_page::guarded(page))
}

/// Longest time for a report of usage.
const MAX_REPORT: Duration = Duration::from_secs(5);

/// `GET /usage`: what clients have used. `may_report`: the worker has not made too many reports in this second.
///
/// # Errors
/// The query is not valid, or the ledger cannot be read now.
pub(crate) async fn usage(
    shared: &Shared,
    query: Option<&str>,
    may_report: bool,
) -> Result<ClientResponse, GatewayError> {
    let bad = |why: String| GatewayError::BadQuery(format!("The query is not valid: {why}."));
    let query = UsageQuery::parse(query, clock::today()).map_err(bad)?;
    let unavailable = |why: &str| {
        let text = format!("The usage cannot be read now: {why}; try again in 1 s.");
        GatewayError::LedgerUnavailable(text.into())
    };
    if !may_report {
        return Err(unavailable("too many reports are asked for"));
    }
    let ledger = shared.telemetry.ledger.clone();
    let report = spawn_blocking(move || ledger.report(query).map(|report| report.encode()));
    // A disk that hangs must not keep the client, or the drain, waiting.
    let report = within(MAX_REPORT, report).await.map_err(|_| unavailable("the file does not answer"))?;
    match report.map_err(|_| GatewayError::Internal)? {
        Ok((content_type, body)) => Ok(text(StatusCode::OK, content_type, body.into())),
        Err(ReportError::TooLarge(why)) => Err(bad(why)),
        Err(ReportError::Unavailable(why)) => Err(unavailable(&why)),
    }
}

/// Lists of models that a worker caches.
const MAX_LISTS: usize = 16;

/// A worker's cache of encoded lists of models, by client. A list depends only on the configuration, on what backends
/// say they serve, and on the client.
#[derive(Default)]
pub(crate) struct ModelLists {
    /// The configuration that the lists belong to.
    config: Weak<Config>,
    /// The version of what backends say.
    version: u64,
    lists: Vec<(Option<Arc<Client>>, Bytes)>,
}

impl ModelLists {
    /// `/v1/models`: the models that `client` may use, in OpenAI's format.
    pub(crate) fn models(
        &mut self,
        snapshot: &Snapshot,
        client: Option<&Arc<Client>>,
        served: &ServedModels,
    ) -> ClientResponse {
        let version = served.version();
        if self.version != version || !std::ptr::eq(self.config.as_ptr(), Arc::as_ptr(&snapshot.config)) {
            *self = ModelLists { config: Arc::downgrade(&snapshot.config), version, lists: Vec::new() };
        }
        let same = |other: &Option<Arc<Client>>| other.as_ref().map(Arc::as_ptr) == client.map(Arc::as_ptr);
        let list = match self.lists.iter().find(|(other, _)| same(other)) {
            Some((_, list)) => list.clone(),
            None => {
                let list = list_models(snapshot, client.map(|c| &**c), served);
                self.lists.truncate(MAX_LISTS - 1);
                self.lists.insert(0, (client.cloned(), list.clone()));
                list
            }
        };
        text(StatusCode::OK, "application/json", list)
    }
}

fn list_models(snapshot: &Snapshot, client: Option<&Client>, served: &ServedModels) -> Bytes {
    let may_see = |name: &str| client.is_none_or(|c| c.may_use(name, true));
    let listed = snapshot.table().listed().iter().filter(|l| may_see(&l.name));
    let mut data: Vec<_> = listed.map(|l| model_object(&l.name, owner(snapshot, l.owner))).collect();
    let mut known: HashSet<Box<str>> = snapshot.table().listed().iter().map(|l| l.name.clone()).collect();
    for b in snapshot.backends.iter() {
        for name in served.of(b.state.id).iter().flat_map(|names| names.iter()) {
            if may_see(name) && known.insert(name.clone()) {
                data.push(model_object(name, b.configured_name()));
            }
        }
    }
    json!({ "object": "list", "data": data }).to_string().into()
}

/// `/v1/models/{id}`: one model, by any name under which a request may ask for it. `id` is percent-encoded, as in the
/// path. `may_search` returns whether an error may suggest similar names.
///
/// # Errors
/// [`GatewayError::ModelNotFound`] if no backend serves the model, or `client` may not use it.
pub(crate) fn model(
    snapshot: &Snapshot,
    client: Option<&Client>,
    id: &str,
    may_search: impl FnOnce() -> bool,
) -> Result<ClientResponse, GatewayError> {
    let id = percent_decoded(id);
    let table = snapshot.table();
    // A request is judged by its name in the same way; a longer name is cut there.
    let (name, whole) = (&id[..id.floor_char_boundary(MAX_NAME)], id.len() <= MAX_NAME);
    let may_name = !id.is_empty() && !id.contains(char::REPLACEMENT_CHARACTER);
    let is_allowed = may_name && client.is_none_or(|c| c.may_use(name, whole));
    let Some(route) = Some(()).filter(|()| is_allowed).and_then(|()| table.find(Some(name), whole)) else {
        return Err(model_not_found(snapshot, client, &id, may_search()));
    };
    let listed = table.listed().iter().find(|l| *l.name == *id);
    let backend = match listed {
        Some(listed) => listed.owner,
        None => table.route(route).targets.first().map(|target| target.backend),
    };
    let model = model_object(&id, owner(snapshot, backend));
    Ok(text(StatusCode::OK, "application/json", model.to_string().into()))
}

/// The error for a model that no backend serves, or that `client` may not use. If `search` is set, it suggests similar
/// names that `client` may use.
pub(crate) fn model_not_found(
    snapshot: &Snapshot,
    client: Option<&Client>,
    name: &str,
    search: bool,
) -> GatewayError {
    let may_use = |name: &str| client.is_none_or(|c| c.may_use(name, true));
    let similar = if search { snapshot.table().near(name, may_use) } else { Vec::new() };
    let name = name.get(..name.floor_char_boundary(MAX_NAME)).unwrap_or_default();
    GatewayError::ModelNotFound(name.into(), similar.into_iter().map(Into::into).collect())
}

/// The name of a backend; `zap` without one.
fn owner(snapshot: &Snapshot, backend: Option<BackendId>) -> &str {
    backend.and_then(|id| snapshot.backends.get(id)).map_or("zap", |b| b.configured_name())
}

fn model_object(name: &str, owner: &str) -> serde_json::Value {
    json!({ "id": name, "object": "model", "created": 0, "owned_by": owner })
}

/// Percent-decodes a path segment. Invalid UTF-8 becomes U+FFFD, which matches no model.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).and_then(|b| (*b as char).to_digit(16));
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(b) = bytes.get(at) {
        match (b, digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                out.push(*b);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_ids_are_percent_decoded() {
        for (text, want) in [
            ("gpt-4o", "gpt-4o"),
            ("meta-llama%2FLlama-3", "meta-llama/Llama-3"),
            ("meta-llama/Llama-3", "meta-llama/Llama-3"),
            ("a%3Ab%c3%a9%", "a:b\u{e9}%"),
            ("%4", "%4"),
            ("%zz", "%zz"),
            ("%ff", "\u{FFFD}"),
        ] {
            assert_eq!(percent_decoded(text), want);
        }
    }
}
