//! Which paths belong to the state of one provider.

use crate::protocol::endpoint::VERSION;

/// The resources that are the state of one provider: no other backend has them, so Zap serves none.
const PROVIDER_STATE: [&str; 7] =
    ["/assistants", "/batches", "/files", "/messages/batches", "/realtime", "/threads", "/vector_stores"];

/// Whether a path that Zap does not serve belongs to the state of one provider.
pub(crate) fn is_provider_state(path: &str) -> bool {
    let path = path.strip_prefix(VERSION).unwrap_or(path);
    let is_in =
        |stem: &&str| path.strip_prefix(*stem).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    PROVIDER_STATE.iter().any(is_in)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Endpoint;

    #[test]
    fn the_state_of_a_provider_is_known_by_its_path() {
        for (path, want) in [
            ("/v1/files", true),
            ("/files/file-1/content", true),
            ("/v1/realtime", true),
            ("/v1/messages/batches/b", true),
            ("/v1/filesystem", false),
            ("/v1/other", false),
            ("//", false),
        ] {
            assert_eq!(is_provider_state(path), want, "{path}");
            assert_eq!(Endpoint::of(path), Endpoint::Other, "{path}");
        }
    }
}
