//! A POST to a service that is no backend, on a connection that stays open from one to the next.

use std::fmt;
use std::future::poll_fn;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderName, HeaderValue};

use crate::clock;
use crate::clock::LimitExpired;
use crate::config::BaseUrl;
use crate::protocol::rate_limits::retry_after;
use crate::upstream::connect::{ConnectError, Connector};
use crate::upstream::fault::Fault;
use crate::upstream::link::{Http1, Link, LinkError, WireRequest, write_header};

/// Longest body of a response that is read, in bytes.
const MAX_BODY: usize = 64 << 10;

/// Sends bodies to one URL, one after the other.
pub(crate) struct Poster {
    connector: Connector,
    /// The head of a request up to its length, with the credentials of the operator.
    head: Vec<u8>,
    /// The connection, if it can be used again.
    link: Option<Http1>,
}

impl fmt::Debug for Poster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poster").field("connector", &self.connector).finish_non_exhaustive()
    }
}

/// A response.
#[derive(Debug)]
pub(crate) struct Posted {
    /// The status.
    pub status: u16,
    /// The wait that it asks for.
    pub retry_after: Option<Duration>,
    /// The body; cut if it is long.
    pub body: Vec<u8>,
}

impl Poster {
    /// Prepares requests to `url` whose bodies are of `content_type`, with further headers.
    ///
    /// # Errors
    /// Returns a message if the URL is invalid.
    pub(crate) fn new(
        url: &BaseUrl,
        content_type: &str,
        more: &[(HeaderName, HeaderValue)],
    ) -> Result<Self, String> {
        let path = if url.path.is_empty() { "/" } else { &url.path };
        let mut head = format!("POST {path} HTTP/1.1\r\n").into_bytes();
        let own = [
            (HOST, url.authority.as_bytes()),
            (CONTENT_TYPE, content_type.as_bytes()),
            (ACCEPT, b"*/*"),
            (USER_AGENT, concat!("zap/", env!("CARGO_PKG_VERSION")).as_bytes()),
        ];
        let is_replaced = |name: &HeaderName| more.iter().any(|(other, _)| other == name);
        for (name, value) in own.iter().filter(|(name, _)| !is_replaced(name)) {
            write_header(&mut head, name, value);
        }
        more.iter().for_each(|(name, value)| write_header(&mut head, name, value.as_bytes()));
        Ok(Poster { connector: Connector::direct(url)?, head, link: None })
    }

    /// Sends a body within `limit`, and reads the response.
    ///
    /// # Errors
    /// Returns why there is no response.
    pub(crate) async fn post(&mut self, body: &Bytes, limit: Duration) -> Result<Posted, Fault> {
        match clock::within(limit, self.exchange(body, limit)).await {
            Ok(result) => result,
            Err(LimitExpired) => Err(Fault::timed_out("response", limit)),
        }
    }

    async fn exchange(&mut self, body: &Bytes, limit: Duration) -> Result<Posted, Fault> {
        let idle = self.link.take().filter(Link::is_reusable);
        if let Some(mut link) = idle
            && link.is_open()
        {
            match self.send(&mut link, body).await {
                Ok(posted) => return Ok(self.keep(link, posted)),
                // The peer's close may have crossed the request.
                Err(LinkError::HungUp(_) | LinkError::Unsent(..)) => {}
                Err(LinkError::Broken(fault)) => return Err(fault),
            }
        }
        let io = self.connector.connect(limit).await.map_err(|error| match error {
            ConnectError::Exhausted { fault, .. } | ConnectError::Peer(fault) => fault,
        })?;
        let mut link = Http1::new(io);
        match self.send(&mut link, body).await {
            Ok(posted) => Ok(self.keep(link, posted)),
            Err(LinkError::Broken(fault) | LinkError::HungUp(fault) | LinkError::Unsent(_, fault)) => {
                Err(fault)
            }
        }
    }

    /// Keeps a connection for the next request, if its response has come whole.
    fn keep(&mut self, link: Http1, posted: Posted) -> Posted {
        self.link = link.is_end().then_some(link);
        posted
    }

    async fn send(&self, link: &mut Http1, body: &Bytes) -> Result<Posted, LinkError> {
        let mut head = self.head.clone();
        write_header(&mut head, &CONTENT_LENGTH, itoa::Buffer::new().format(body.len()).as_bytes());
        head.extend_from_slice(b"\r\n");
        link.start(WireRequest { head, body: [body.clone()].into_iter().collect() });
        let head = poll_fn(|cx| link.poll_head(cx)).await?;
        let mut read = Vec::new();
        while read.len() < MAX_BODY
            && let Some(frame) = poll_fn(|cx| link.poll_frame(cx)).await
        {
            read.extend_from_slice(&frame.map_err(LinkError::Broken)?);
        }
        let retry_after = retry_after(&head.headers, SystemTime::now);
        Ok(Posted { status: head.status.as_u16(), retry_after, body: read })
    }
}
