//! A GET with the backend's own headers on a connection of its own: a health check, or the list of models.

use std::future::poll_fn;
use std::time::Duration;

use http::response;

use crate::upstream::Upstream;
use crate::upstream::connect::ConnectError;
use crate::upstream::fault::Fault;
use crate::upstream::link::{Http1, Link, LinkError, WireRequest};

/// The response to a GET: its head, and the connection that yields its body.
pub(crate) struct Got {
    pub(crate) head: response::Parts,
    link: Http1,
}

/// Sends the whole `head` of a request without a body, and reads the head of the response. The connection must be open
/// within `connect`.
///
/// # Errors
/// Returns why there is no response of the backend.
pub(crate) async fn get(upstream: &Upstream, head: &[u8], connect: Duration) -> Result<Got, ConnectError> {
    let mut link = Http1::new(upstream.check_connector().connect(connect).await?);
    link.start(WireRequest { head: head.to_vec(), ..WireRequest::default() });
    match poll_fn(|cx| link.poll_head(cx)).await {
        Ok(head) => match upstream.check_connector().proxy_fault(head.status) {
            Some(fault) => Err(ConnectError::Peer(fault)),
            None => Ok(Got { head, link }),
        },
        Err(LinkError::Broken(fault) | LinkError::HungUp(fault) | LinkError::Unsent(_, fault)) => {
            Err(ConnectError::Peer(fault))
        }
    }
}

impl Got {
    /// Reads the body; `None` if it is longer than `max` bytes.
    ///
    /// # Errors
    /// Returns why the body ended early.
    pub(crate) async fn body(mut self, max: usize) -> Result<Option<Vec<u8>>, Fault> {
        let mut body = Vec::new();
        while let Some(frame) = poll_fn(|cx| self.link.poll_frame(cx)).await {
            body.extend_from_slice(&frame?);
            if body.len() > max {
                return Ok(None);
            }
        }
        Ok(Some(body))
    }
}
