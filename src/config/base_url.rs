//! Reads `url` of a backend, and suggests a fix for common mistakes.

use crate::config::BaseUrl;
use crate::config::text::{Text, may_show};
use crate::config::toml_reader::Section;
use crate::protocol::{Endpoint, model_list};

/// Reads `url`. Returns `None` if it is not set, or if it is not valid: then a fault is recorded.
pub(super) fn base_url(t: &mut Section<'_, '_>) -> Option<BaseUrl> {
    let text = t.required_text("url")?;
    match BaseUrl::parse(&text.value) {
        Ok(url) => {
            if let Some(what) = whole_endpoint(&text, &url.path) {
                t.fault_of(&text, &what);
            }
            Some(url)
        }
        Err(what) => {
            let shown = || match text.shown().filter(|_| !text.is_variable()) {
                Some(shown) => format!("is {shown}, which {what}"),
                None => what.to_owned(),
            };
            t.fault_of(&text, &without_scheme(&text).unwrap_or_else(shown));
            None
        }
    }
}

/// Returns a message with the fixed URL if only the scheme is missing.
fn without_scheme(text: &Text) -> Option<String> {
    let (written, shown) = (text.written(), text.shown()?);
    let is_whole = !text.is_variable() && !written.contains("://") && written.contains(['.', ':']);
    let host = written.split([':', '/']).next()?;
    let is_local = host == "localhost" || host.parse::<std::net::Ipv4Addr>().is_ok() || !host.contains('.');
    let fixed = format!("{}://{written}", if is_local { "http" } else { "https" });
    (is_whole && BaseUrl::parse(&fixed).is_ok()).then(|| {
        format!("is {shown}, which has no scheme; must begin with `http://` or `https://`: \"{fixed}\"")
    })
}

/// Returns a message if the URL ends in the path of an endpoint. `path` is the path of the URL.
fn whole_endpoint(text: &Text, path: &str) -> Option<String> {
    let chat = Endpoint::Chat.api()?.tail;
    // The endpoint table forwards no list of models.
    let tails = Endpoint::ALL.into_iter().filter_map(|endpoint| Some(endpoint.api()?.tail));
    let tails = tails.chain([model_list::TAIL]);
    let (tail, base) =
        tails.filter_map(|tail| Some((tail, path.strip_suffix(tail)?))).find(|(tail, base)| {
            let last = base.rsplit('/').next().unwrap_or_default();
            // `/models` alone may be the path of a proxy.
            *tail == chat
                || last == "openai"
                || last.starts_with('v') && last[1..].starts_with(|c: char| c.is_ascii_digit())
        })?;
    let (cut, chat_path) = match base.ends_with("/v1") {
        true => (format!("/v1{tail}"), None),
        false => (format!("{base}{tail}"), Some(format!("{base}{chat}"))),
    };
    let fixed = text.written().trim_end_matches('/').strip_suffix(&cut).filter(|fixed| may_show(fixed));
    let allowed = match (fixed, chat_path.filter(|path| may_show(path))) {
        (Some(fixed), None) => format!("must be {fixed:?}"),
        (Some(fixed), Some(path)) => format!("must be {fixed:?}, with `chat_path = {path:?}`"),
        (None, _) => format!("must end before `{tail}`"),
    };
    Some(format!("ends in `{tail}`, which Zap appends itself; {allowed}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(written: &str) -> Text {
        Text::new(written.to_owned(), None, "url".to_owned(), 1)
    }

    #[test]
    fn the_url_of_an_endpoint_is_a_fault_that_shows_the_base() {
        for (written, expected) in [
            ("https://api.openai.com/v1/chat/completions", Some("must be \"https://api.openai.com\"")),
            ("https://api.openai.com/v1/chat/completions/", Some("must be \"https://api.openai.com\"")),
            ("https://api.groq.com/openai/v1/responses", Some("must be \"https://api.groq.com/openai\"")),
            ("https://api.anthropic.com/v1/messages", Some("must be \"https://api.anthropic.com\"")),
            ("https://a.example/v1/messages/count_tokens", Some("must be \"https://a.example\"")),
            ("https://a.example/v1/audio/transcriptions", Some("must be \"https://a.example\"")),
            ("https://a.example/v1/responses/compact", Some("must be \"https://a.example\"")),
            ("http://localhost:1234/v1/models", Some("must be \"http://localhost:1234\"")),
            ("http://a/v1/images/generations", Some("must be \"http://a\"")),
            ("http://a/v1/completions", Some("must be \"http://a\"")),
            (
                "https://api.perplexity.ai/chat/completions",
                Some("must be \"https://api.perplexity.ai\", with `chat_path = \"/chat/completions\"`"),
            ),
            (
                "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
                Some(
                    "must be \"https://generativelanguage.googleapis.com\", with \
                     `chat_path = \"/v1beta/openai/chat/completions\"`",
                ),
            ),
            ("http://a/sk-CANARY/v1/chat/completions", Some("must end before `/chat/completions`")),
            ("https://api.openai.com/v1", None),
            ("https://api.openai.com", None),
            ("http://a/models", None),
            ("http://a/proxy/messages", None),
        ] {
            let path = BaseUrl::parse(written).unwrap().path;
            let found = whole_endpoint(&text(written), &path);
            let allowed = found.as_deref().map(|what| what.split("; ").last().unwrap());
            assert_eq!(allowed, expected, "{written}");
        }
    }

    #[test]
    fn a_url_without_a_scheme_is_shown_with_one() {
        for (written, expected) in [
            ("api.openai.com/v1", Some("https://api.openai.com/v1")),
            ("localhost:11434", Some("http://localhost:11434")),
            ("127.0.0.1:8000", Some("http://127.0.0.1:8000")),
            ("vllm:8000", Some("http://vllm:8000")),
            ("openai", None),
            ("ftp://a.b", None),
            ("sk-CANARY.b", None),
            ("", None),
        ] {
            let found = without_scheme(&text(written));
            let fixed = found.as_deref().map(|what| what.split('"').nth(3).unwrap());
            assert_eq!(fixed, expected, "{written}");
        }
    }
}
