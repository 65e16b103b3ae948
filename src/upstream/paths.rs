//! The paths of a backend: `url` with `chat_path`, `health_path` and the other endpoints.

use http::Uri;

use crate::config;
use crate::config::{HEALTH_PATH, is_like_a_key};
use crate::protocol::{Endpoint, model_list};

/// The endpoints that a backend serves, with their request targets.
///
/// # Errors
/// A path is not valid.
pub(crate) fn targets(conf: &config::Backend) -> Result<Vec<(Endpoint, Uri)>, &'static str> {
    let served = Endpoint::ALL.into_iter().filter_map(|endpoint| Some((endpoint, path(conf, endpoint)?)));
    let target = |path: &str| joined(&conf.url.path, path).parse().map_err(|_| "its path is not valid");
    served.map(|(endpoint, path)| Ok((endpoint, target(&path)?))).collect()
}

/// The path of an endpoint behind that of `url`; `None` if the backend does not serve it: it does not speak the
/// protocol, or it serves chat only.
pub(crate) fn path(conf: &config::Backend, endpoint: Endpoint) -> Option<String> {
    let api = endpoint.api().filter(|api| conf.protocols.contains(&api.protocol))?;
    if endpoint == Endpoint::Chat { Some(conf.chat_path.clone()) } else { beside_chat(conf, api.tail) }
}

/// The path that ends in `tail` where the chat path ends in `/chat/completions`; `None` if that ends differently: then
/// the backend serves chat only.
fn beside_chat(conf: &config::Backend, tail: &str) -> Option<String> {
    let (chat, query) = conf.chat_path.split_at(conf.chat_path.find('?').unwrap_or(conf.chat_path.len()));
    let base = chat.strip_suffix(Endpoint::Chat.api()?.tail)?;
    Some(format!("{base}{tail}{query}"))
}

/// Appends `path` to the path of a backend's `url`. If `base` ends in `/v1` and `path` begins with `/v1`, the result
/// has it once: SDKs call `https://api.openai.com/v1` the base URL, so operators write it as `url`. The default health
/// path is at the root, where inference engines serve it.
pub(crate) fn joined(base: &str, path: &str) -> String {
    let is_of_root = path.starts_with("/v1/") || path == HEALTH_PATH;
    let base = base.strip_suffix("/v1").filter(|_| is_of_root).unwrap_or(base);
    format!("{base}{path}")
}

/// The path of the list of models, which is next to the chat endpoint; `None` if the backend serves chat only.
pub(crate) fn models_path(conf: &config::Backend) -> Option<String> {
    Some(joined(&conf.url.path, &beside_chat(conf, model_list::TAIL)?))
}

/// The whole URL of `path`, which is appended to that of the backend, for the operator: without the query, and without
/// parts that look like keys.
pub(crate) fn shown_url(conf: &config::Backend, path: &str) -> String {
    let scheme = if conf.url.https { "https" } else { "http" };
    let path = joined(&conf.url.path, path);
    let path = path.split('?').next().unwrap_or_default();
    let parts = path.split('/').map(|part| if is_like_a_key(part) { "***" } else { part });
    format!("{scheme}://{}{}", conf.url.authority, parts.collect::<Vec<_>>().join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn urls_are_shown_without_queries_and_keys() {
        for (url, more, chat, health, models) in [
            (
                "https://api.openai.com/v1",
                "health_path = \"/v1/models\"",
                "https://api.openai.com/v1/chat/completions",
                "https://api.openai.com/v1/models",
                Some("/v1/models"),
            ),
            (
                "https://api.openai.com",
                "",
                "https://api.openai.com/v1/chat/completions",
                "https://api.openai.com/health",
                Some("/v1/models"),
            ),
            (
                "http://a:8000/sk-CANARY",
                "chat_path = \"/chat/completions?key=sk-CANARY\"",
                "http://a:8000/***/chat/completions",
                "http://a:8000/***/health",
                Some("/sk-CANARY/models?key=sk-CANARY"),
            ),
            (
                "http://a/openai",
                "chat_path = \"/v1/chat/completions?v=1\"",
                "http://a/openai/v1/chat/completions",
                "http://a/openai/health",
                Some("/openai/v1/models?v=1"),
            ),
            (
                "http://a/api",
                "chat_path = \"/chat/completions\"",
                "http://a/api/chat/completions",
                "http://a/api/health",
                Some("/api/models"),
            ),
            ("http://a", "chat_path = \"/chat\"", "http://a/chat", "http://a/health", None),
        ] {
            let text = format!("[[backends]]\nurl = \"{url}\"\nweight = 1\n{more}\n");
            let config = Config::of(&text).unwrap();
            let conf = &config.backends[0];
            assert_eq!(shown_url(conf, &conf.chat_path), chat);
            assert_eq!(shown_url(conf, &conf.health_path), health);
            assert_eq!(models_path(conf).as_deref(), models);
        }
    }
}
