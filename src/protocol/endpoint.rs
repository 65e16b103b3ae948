//! The endpoints: one table that says all that Zap knows of each.
//!
//! Routes, the answer to a wrong method, labels, what a body must have and how a stream ends are read from it. A new
//! endpoint is a variant and a row.

/// What a path is for: the `endpoint` of metrics and log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
    Embeddings,
    Health,
    Images,
    Metrics,
    Models,
    Moderations,
    Other,
    Ready,
    Rerank,
    Responses,
    Speech,
    Status,
}

/// What is known of an endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    endpoint: Endpoint,
    /// As it stands in labels.
    pub(crate) name: &'static str,
    /// Its paths, compared byte by byte; one that ends in `/*` stands for all paths below it.
    pub(crate) paths: &'static [&'static str],
    /// Who answers.
    pub(crate) served: ServedBy,
}

/// Who answers a request to an endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ServedBy {
    /// A backend: POST with a JSON body.
    Backends(Api),
    /// Zap itself: GET and HEAD.
    Zap(Page),
    /// Nobody: the path is unknown.
    Nobody,
}

/// What Zap answers by itself.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub(crate) enum Page {
    Health,
    Metrics,
    Models,
    Ready,
    Status,
}

/// What a backend's endpoint asks for and answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Api {
    /// Its path behind the backend's API base.
    pub(crate) tail: &'static str,
    /// A request may leave its model to the backend's default.
    pub(crate) has_default_model: bool,
    /// The body must have an array of messages.
    pub(crate) needs_messages: bool,
    /// How its streams speak.
    pub(crate) stream: Stream,
}

/// How a stream of events says that it is over, and what Zap's error in it looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// `data: [DONE]`; an error is `data: {"error":…}`.
    Done,
    /// By its transport alone; an error is `data: {"error":…}`.
    Plain,
    /// An event such as `response.completed`; an error is `response.failed`.
    Responses,
}

const TABLE: [Row; 14] = [
    Row {
        endpoint: Endpoint::Chat,
        name: "chat",
        paths: &["/v1/chat/completions", "/chat"],
        served: ServedBy::Backends(Api {
            tail: "/chat/completions",
            has_default_model: true,
            needs_messages: true,
            stream: Stream::Done,
        }),
    },
    Row {
        endpoint: Endpoint::Completions,
        name: "completions",
        paths: &["/v1/completions"],
        served: ServedBy::Backends(Api {
            tail: "/completions",
            has_default_model: true,
            needs_messages: false,
            stream: Stream::Done,
        }),
    },
    Row::plain(Endpoint::Embeddings, "embeddings", &["/v1/embeddings"], "/embeddings"),
    Row::page(Endpoint::Health, "health", &["/health"], Page::Health),
    Row::plain(Endpoint::Images, "images", &["/v1/images/generations"], "/images/generations"),
    Row::page(Endpoint::Metrics, "metrics", &["/metrics"], Page::Metrics),
    Row::page(Endpoint::Models, "models", &["/v1/models", "/v1/models/*"], Page::Models),
    Row::plain(Endpoint::Moderations, "moderations", &["/v1/moderations"], "/moderations"),
    Row { endpoint: Endpoint::Other, name: "other", paths: &[], served: ServedBy::Nobody },
    Row::page(Endpoint::Ready, "ready", &["/ready"], Page::Ready),
    Row::plain(Endpoint::Rerank, "rerank", &["/v1/rerank"], "/rerank"),
    Row {
        endpoint: Endpoint::Responses,
        name: "responses",
        paths: &["/v1/responses"],
        served: ServedBy::Backends(Api {
            tail: "/responses",
            has_default_model: true,
            needs_messages: false,
            stream: Stream::Responses,
        }),
    },
    Row::plain(Endpoint::Speech, "speech", &["/v1/audio/speech"], "/audio/speech"),
    Row::page(Endpoint::Status, "status", &["/status"], Page::Status),
];

impl Row {
    /// An endpoint of a backend that must name its model.
    const fn plain(
        endpoint: Endpoint,
        name: &'static str,
        paths: &'static [&'static str],
        tail: &'static str,
    ) -> Self {
        let api = Api { tail, has_default_model: false, needs_messages: false, stream: Stream::Plain };
        Row { endpoint, name, paths, served: ServedBy::Backends(api) }
    }

    /// A page of Zap's own.
    const fn page(
        endpoint: Endpoint,
        name: &'static str,
        paths: &'static [&'static str],
        page: Page,
    ) -> Self {
        Row { endpoint, name, paths, served: ServedBy::Zap(page) }
    }

    /// The methods that the endpoint serves, as the `Allow` header lists them.
    pub(crate) fn allow(&self) -> &'static str {
        match self.served {
            ServedBy::Backends(_) => "POST",
            ServedBy::Zap(_) => "GET, HEAD",
            ServedBy::Nobody => "",
        }
    }
}

impl Endpoint {
    /// All endpoints, in the order of their discriminants.
    pub(crate) const ALL: [Endpoint; TABLE.len()] = {
        let mut all = [Endpoint::Other; TABLE.len()];
        let mut i = 0;
        while i < all.len() {
            all[i] = TABLE[i].endpoint;
            i += 1;
        }
        all
    };

    /// What a path is for.
    pub(crate) fn of(path: &str) -> Self {
        let is_one = |known: &&'static str| match known.strip_suffix('*') {
            Some(stem) => path.starts_with(stem),
            None => path == *known,
        };
        TABLE.iter().find(|row| row.paths.iter().any(is_one)).map_or(Endpoint::Other, |row| row.endpoint)
    }

    /// Its row in the table.
    pub(crate) fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// As it stands in labels.
    pub(crate) fn name(self) -> &'static str {
        self.row().name
    }

    /// What a backend's endpoint asks for; `None` where no backend serves it.
    pub(crate) fn api(self) -> Option<&'static Api> {
        match &self.row().served {
            ServedBy::Backends(api) => Some(api),
            ServedBy::Zap(_) | ServedBy::Nobody => None,
        }
    }
}

/// Whether only those who may call get to see what a path holds.
pub(crate) fn is_guarded(path: &str) -> bool {
    path == "/chat" || path.starts_with("/v1/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_stands_at_its_discriminant() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.endpoint as usize, i, "{}", row.name);
            assert!(row.paths.iter().all(|path| Endpoint::of(path) == row.endpoint), "{}", row.name);
        }
    }

    #[test]
    fn paths_are_exact() {
        for (path, endpoint) in [
            ("/chat", Endpoint::Chat),
            ("/v1/chat/completions", Endpoint::Chat),
            ("/v1/models", Endpoint::Models),
            ("/v1/models/a/b", Endpoint::Models),
            ("/v1/responses", Endpoint::Responses),
        ] {
            assert_eq!(Endpoint::of(path), endpoint, "{path}");
        }
        for path in ["/v1/modelsx", "/chat/", "/v1//chat", "/%63hat", "/Chat", "/", ""] {
            assert_eq!(Endpoint::of(path), Endpoint::Other, "{path}");
        }
    }

    #[test]
    fn every_path_of_a_backend_is_guarded() {
        for row in TABLE.iter().filter(|row| row.endpoint.api().is_some()) {
            assert!(row.paths.iter().all(|path| is_guarded(path)), "{}", row.name);
        }
    }
}
