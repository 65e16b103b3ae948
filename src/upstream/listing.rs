//! Asks a backend which models it serves.

use std::future::poll_fn;
use std::time::Duration;

use http::StatusCode;

use crate::protocol::Endpoint;
use crate::protocol::model_list;
use crate::upstream::link::{Http1, Link, WireRequest};
use crate::upstream::proxy::origin;
use crate::upstream::{Upstream, joined};

/// Largest list, in bytes.
const MAX_LIST: usize = 4 << 20;

impl Upstream {
    /// Whether the backend can be asked for its models: it takes requests for any name, with a key of its own or without
    /// one, and the path of the list is known.
    pub(crate) fn may_list(&self) -> bool {
        let conf = &self.conf;
        conf.weight > 0
            && conf.models.is_none()
            && !conf.forward_authorization
            && list_path(&conf.url.path, &conf.chat_path).is_some()
    }

    /// Asks the backend for its models, on a new connection. The caller limits the time. Returns `None` if there is no
    /// such list.
    pub(crate) async fn list_models(&self, connect: Duration) -> Option<Vec<Box<str>>> {
        let path = list_path(&self.conf.url.path, &self.conf.chat_path)?;
        let mut head = format!("GET {}{path} HTTP/1.1\r\n", origin(&self.conf)).into_bytes();
        // The headers are those of a health check.
        let check = self.probe();
        let line = check.windows(2).position(|pair| pair == b"\r\n")?;
        head.extend_from_slice(check.get(line + 2..)?);
        let mut link = Http1::new(self.check_connector().connect(connect).await.ok()?);
        link.start(WireRequest { head, ..WireRequest::default() });
        let head = poll_fn(|cx| link.poll_head(cx)).await.ok()?;
        if head.status != StatusCode::OK {
            return None;
        }
        let mut list = Vec::new();
        while let Some(frame) = poll_fn(|cx| link.poll_frame(cx)).await {
            list.extend_from_slice(&frame.ok()?);
            if list.len() > MAX_LIST {
                return None;
            }
        }
        model_list::names(&list)
    }
}

/// The path of the list of models, beside the chat path; `None` if the chat path has another end than usual.
fn list_path(base: &str, chat_path: &str) -> Option<String> {
    let (chat, query) = chat_path.split_at(chat_path.find('?').unwrap_or(chat_path.len()));
    let root = chat.strip_suffix(Endpoint::Chat.api()?.tail)?;
    Some(joined(base, &format!("{root}/models{query}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_beside_the_chat_path() {
        for (base, chat, want) in [
            ("", "/v1/chat/completions", Some("/v1/models")),
            ("/v1", "/v1/chat/completions", Some("/v1/models")),
            ("/openai", "/v1/chat/completions?v=1", Some("/openai/v1/models?v=1")),
            ("/api", "/chat/completions", Some("/api/models")),
            ("", "/generate", None),
        ] {
            assert_eq!(list_path(base, chat).as_deref(), want, "{base} {chat}");
        }
    }
}
