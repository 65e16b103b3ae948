//! The endpoints, in one table.
//!
//! The table defines the paths, the allowed methods, the metric labels, the required members of a body and the end of a
//! stream.
//!
//! To add an endpoint, add a variant, a row at the same position, and 1 to [`Endpoint::COUNT`]. Then describe it in
//! `src/manual/api.md`, `src/manual/metrics.md` and README.md; `tests/cli/manual.rs` checks the manual.

/// An endpoint: the `endpoint` label of metrics and log.
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
    Usage,
}

/// The properties of an endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    endpoint: Endpoint,
    /// The name in labels.
    pub(crate) name: &'static str,
    /// The paths, compared byte by byte. A path that ends in `/*` matches all paths below it.
    pub(crate) paths: &'static [&'static str],
    /// What serves the requests.
    pub(crate) served: ServedBy,
}

/// What serves a request to an endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ServedBy {
    /// A backend. The method is POST, the body is JSON.
    Backends(Api),
    /// Zap itself. The methods are GET and HEAD.
    Zap(Page),
    /// Nothing: the path is unknown.
    Nobody,
}

/// A page that Zap itself serves.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub(crate) enum Page {
    Health,
    Metrics,
    Models,
    Ready,
    Status,
    Usage,
}

/// The requests and responses of an endpoint that backends serve.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Api {
    /// The path, relative to the backend's API base.
    pub(crate) tail: &'static str,
    /// Whether a request without a model gets the backend's default model.
    pub(crate) has_default_model: bool,
    /// Whether the body must have an array `messages`.
    pub(crate) needs_messages: bool,
    /// The format of the endpoint's streams.
    pub(crate) stream: StreamFormat,
    /// What can be known of an answer's tokens.
    pub(crate) metering: Metering,
}

/// What can be known of the tokens of an answer whose provider does not tell them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metering {
    /// Input and output, by the text of the request and of the answer.
    Full,
    /// The input. The answer has no text.
    Input,
    /// Nothing.
    Told,
}

/// How an event stream signals its end, and the format of an error that Zap adds to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamFormat {
    /// The stream ends with `data: [DONE]`; an error is `data: {"error":…}`.
    Done,
    /// The stream ends with the body; an error is `data: {"error":…}`.
    Plain,
    /// The stream ends with an event such as `response.completed`; an error is `response.failed`.
    Responses,
}

const TABLE: [Row; Endpoint::COUNT] = [
    Row {
        endpoint: Endpoint::Chat,
        name: "chat",
        paths: &["/v1/chat/completions", "/chat"],
        served: ServedBy::Backends(Api {
            tail: "/chat/completions",
            has_default_model: true,
            needs_messages: true,
            stream: StreamFormat::Done,
            metering: Metering::Full,
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
            stream: StreamFormat::Done,
            metering: Metering::Full,
        }),
    },
    Row::plain(Endpoint::Embeddings, "embeddings", &["/v1/embeddings"], ("/embeddings", Metering::Input)),
    Row::page(Endpoint::Health, "health", &["/health"], Page::Health),
    Row::plain(
        Endpoint::Images,
        "images",
        &["/v1/images/generations"],
        ("/images/generations", Metering::Told),
    ),
    Row::page(Endpoint::Metrics, "metrics", &["/metrics"], Page::Metrics),
    Row::page(Endpoint::Models, "models", &["/v1/models", "/v1/models/*"], Page::Models),
    Row::plain(Endpoint::Moderations, "moderations", &["/v1/moderations"], ("/moderations", Metering::Told)),
    Row { endpoint: Endpoint::Other, name: "other", paths: &[], served: ServedBy::Nobody },
    Row::page(Endpoint::Ready, "ready", &["/ready"], Page::Ready),
    Row::plain(Endpoint::Rerank, "rerank", &["/v1/rerank"], ("/rerank", Metering::Input)),
    Row {
        endpoint: Endpoint::Responses,
        name: "responses",
        paths: &["/v1/responses"],
        served: ServedBy::Backends(Api {
            tail: "/responses",
            has_default_model: true,
            needs_messages: false,
            stream: StreamFormat::Responses,
            metering: Metering::Full,
        }),
    },
    Row::plain(Endpoint::Speech, "speech", &["/v1/audio/speech"], ("/audio/speech", Metering::Told)),
    Row::page(Endpoint::Status, "status", &["/status"], Page::Status),
    Row::page(Endpoint::Usage, "usage", &["/usage"], Page::Usage),
];

impl Row {
    /// Creates the row of an endpoint that backends serve and whose requests must name a model.
    const fn plain(
        endpoint: Endpoint,
        name: &'static str,
        paths: &'static [&'static str],
        (tail, metering): (&'static str, Metering),
    ) -> Self {
        let api = Api {
            tail,
            has_default_model: false,
            needs_messages: false,
            stream: StreamFormat::Plain,
            metering,
        };
        Row { endpoint, name, paths, served: ServedBy::Backends(api) }
    }

    /// Creates the row of a page that Zap itself serves.
    const fn page(
        endpoint: Endpoint,
        name: &'static str,
        paths: &'static [&'static str],
        page: Page,
    ) -> Self {
        Row { endpoint, name, paths, served: ServedBy::Zap(page) }
    }

    /// The allowed methods, as the value of the `Allow` header.
    pub(crate) fn allow(&self) -> &'static str {
        match self.served {
            ServedBy::Backends(_) => "POST",
            ServedBy::Zap(_) => "GET, HEAD",
            ServedBy::Nobody => "",
        }
    }
}

impl Endpoint {
    /// Number of endpoints. This is a literal because array types use it: a constant computed from the table would make
    /// the optimizing compiler fail with an evaluation cycle.
    pub(crate) const COUNT: usize = 15;

    /// All endpoints, in the order of their discriminants.
    pub(crate) const ALL: [Endpoint; Endpoint::COUNT] = {
        let mut all = [Endpoint::Other; Endpoint::COUNT];
        let mut i = 0;
        while i < Endpoint::COUNT {
            all[i] = TABLE[i].endpoint;
            i += 1;
        }
        all
    };

    /// The endpoint that a path belongs to.
    pub(crate) fn of(path: &str) -> Self {
        let matches = |known: &&'static str| match known.strip_suffix('*') {
            Some(stem) => path.starts_with(stem),
            None => path == *known,
        };
        TABLE.iter().find(|row| row.paths.iter().any(matches)).map_or(Endpoint::Other, |row| row.endpoint)
    }

    /// The endpoint's row in the table.
    pub(crate) fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// The name in labels.
    pub(crate) fn name(self) -> &'static str {
        self.row().name
    }

    /// The requests and responses of the endpoint; `None` if backends do not serve it.
    pub(crate) fn api(self) -> Option<&'static Api> {
        match &self.row().served {
            ServedBy::Backends(api) => Some(api),
            ServedBy::Zap(_) | ServedBy::Nobody => None,
        }
    }
}

/// Whether a path needs a client key, if client keys are configured. Unknown paths below `/v1/` need one too.
pub(crate) fn is_guarded(path: &str) -> bool {
    path == "/chat" || path.starts_with("/v1/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_of_a_row_is_its_discriminant() {
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
    fn every_path_that_backends_serve_is_guarded() {
        for row in TABLE.iter().filter(|row| row.endpoint.api().is_some()) {
            assert!(row.paths.iter().all(|path| is_guarded(path)), "{}", row.name);
        }
    }
}
