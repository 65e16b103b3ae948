//! Which changes of a configuration keep the state and the connections of a backend.

use crate::config;
use crate::config::Config;
use crate::upstream::Upstream;

/// Whether both are the same account at the same provider. If so, the state and the connections of one are valid for
/// the other.
pub(super) fn is_same_account(a: &config::Backend, b: &config::Backend) -> bool {
    a.configured_name() == b.configured_name()
        && a.url == b.url
        && a.ca_file == b.ca_file
        && a.proxy == b.proxy
        && a.client_identity == b.client_identity
        && a.server_name == b.server_name
        && a.api_key == b.api_key
        && a.auth_header == b.auth_header
        && a.extra_headers == b.extra_headers
        && a.forward_authorization == b.forward_authorization
}

/// The backend before a reload whose counters, and maybe whose state, a `backend` of the new configuration continues: a
/// key of a pool keeps its own, whatever its number is now, and a new key takes those of its name if they are left.
pub(super) fn earlier<'a>(
    backend: &config::Backend,
    next: &Config,
    before: impl Iterator<Item = &'a Upstream> + Clone,
) -> Option<&'a Upstream> {
    let mut same_backend = before.filter(|known| known.configured_name() == backend.configured_name());
    let has_key = |known: &&Upstream, other: &config::Backend| {
        known.configured_name() == other.configured_name() && known.conf.api_key == other.api_key
    };
    let by_key = same_backend.clone().find(|known| has_key(known, backend));
    let is_left = |known: &&Upstream| {
        known.name() == backend.name && !next.backends.iter().any(|other| has_key(known, other))
    };
    by_key.or_else(|| same_backend.find(is_left))
}
