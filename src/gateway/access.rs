//! Who may send a request to which listener: client keys for the API, and for the pages that tell operators about all
//! clients either the admin listener with its token, or a client key.

use std::borrow::Cow;

use http::HeaderMap;
use ring::digest::{SHA256, digest};
use subtle::ConstantTimeEq as _;

use crate::client::exchange::Exchange;
use crate::client::peer::Listener;
use crate::config::Secret;
use crate::gateway::caller;
use crate::gateway::refusal::GatewayError;
use crate::gateway::state::{Generation, Shared};
use crate::http1::headers;
use crate::http1::origin::{Origins, is_foreign, names_loopback};
use crate::protocol::Endpoint;
use crate::protocol::endpoint::{Page, ServedBy};
use crate::telemetry::record::Caller;

/// Headers with which a proxy says for whom it sends a request.
const PROXY_HEADERS: [&str; 4] = ["forwarded", "via", "x-forwarded-for", "x-real-ip"];

/// Where a request comes from, and what it shows.
pub(super) struct Visitor<'a> {
    pub(super) shared: &'a Shared,
    pub(super) generation: &'a Generation,
    pub(super) headers: &'a HeaderMap,
    pub(super) exchange: &'a Exchange,
}

impl Visitor<'_> {
    /// Checks that the listener serves `path` of `endpoint` to this visitor. `is_page`: a browser wants the status
    /// page.
    ///
    /// # Errors
    /// [`GatewayError::BadRequest`] if a credential is repeated; [`GatewayError::InvalidApiKey`],
    /// [`GatewayError::PageKey`] or [`GatewayError::AdminToken`] without the credential that is required;
    /// [`GatewayError::NotAtAdmin`] or [`GatewayError::OnlyAtAdmin`] if the other listener serves this.
    pub(super) fn check(
        &self,
        endpoint: Endpoint,
        path: &str,
        is_page: bool,
    ) -> Result<Caller, GatewayError> {
        let is_for_operators = endpoint.is_for_operators() || endpoint == Endpoint::Root && is_page;
        match self.exchange.listener() {
            Listener::Admin => self.at_admin(endpoint),
            Listener::Tcp | Listener::Unix if endpoint.is_guarded(path) => self.client(),
            Listener::Tcp | Listener::Unix if is_for_operators => self.operator_at_clients(endpoint),
            Listener::Tcp | Listener::Unix => Ok(Caller::Anonymous),
        }
    }

    fn client(&self) -> Result<Caller, GatewayError> {
        caller::identify(self.shared, &self.generation.clients, self.headers, self.exchange.common_name())
    }

    /// A page for operators on the listener for clients.
    fn operator_at_clients(&self, endpoint: Endpoint) -> Result<Caller, GatewayError> {
        let Generation { clients, .. } = self.generation;
        let server = &self.generation.config.server;
        if server.admin.is_some() {
            // At `/` there is something for clients, too.
            return if endpoint == Endpoint::Root {
                Ok(Caller::Anonymous)
            } else {
                Err(GatewayError::OnlyAtAdmin)
            };
        }
        let is_open = endpoint == Endpoint::Metrics && server.open_metrics;
        if clients.is_open() || is_open || self.is_local() {
            return Ok(Caller::Anonymous);
        }
        if headers::repeats_credential(self.headers) {
            return Err(GatewayError::BadRequest(caller::REPEATED));
        }
        let credential = self.credential();
        let known = caller::known(clients, credential.as_deref(), self.exchange.common_name());
        known.map(Caller::Known).ok_or(GatewayError::PageKey)
    }

    fn at_admin(&self, endpoint: Endpoint) -> Result<Caller, GatewayError> {
        match endpoint.row().served {
            ServedBy::Zap(Page::Health | Page::Ready) => Ok(Caller::Anonymous),
            ServedBy::Zap(Page::Metrics | Page::Root | Page::Status | Page::Usage) => {
                let is_known = |token: &Secret| {
                    let shown = self.credential().unwrap_or_default();
                    is_equal(&shown, token.expose().as_bytes())
                };
                let is_allowed = self.generation.config.admin.token.as_ref().is_none_or(is_known);
                is_allowed.then_some(Caller::Anonymous).ok_or(GatewayError::AdminToken)
            }
            ServedBy::Zap(Page::Models) | ServedBy::Backends(_) | ServedBy::Stored(_) | ServedBy::Nobody => {
                Err(GatewayError::NotAtAdmin)
            }
        }
    }

    /// The credential of a client, or the password that a browser has asked its user for.
    fn credential(&self) -> Option<Cow<'_, [u8]>> {
        let client = headers::credential(self.headers).map(Cow::Borrowed);
        client.or_else(|| headers::basic_password(self.headers).map(Cow::Owned))
    }

    /// Whether the request comes from this machine, and nothing says that a proxy has passed it on or that a page of
    /// another site has sent it.
    fn is_local(&self) -> bool {
        let is_passed_on = PROXY_HEADERS.iter().any(|name| self.headers.contains_key(*name));
        self.exchange.peer().to_canonical().is_loopback()
            && !is_passed_on
            && names_loopback(self.headers)
            && !is_foreign(self.headers, &Origins::None)
    }
}

/// Compares in constant time.
fn is_equal(a: &[u8], b: &[u8]) -> bool {
    digest(&SHA256, a).as_ref().ct_eq(digest(&SHA256, b).as_ref()).into()
}
