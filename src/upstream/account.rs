//! Which changes of a configuration keep the state and the connections of a backend.

use crate::config;

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
