//! The endpoints, in one table.
//!
//! The table defines the paths, the allowed methods, the metric labels, the required members of a body and the end of a
//! stream.
//!
//! To add an endpoint, add a variant, a row at the same position, and 1 to [`Endpoint::COUNT`]. Then describe it in
//! `src/manual/api.md`, `src/manual/metrics.md` and README.md; `tests/cli/manual.rs` checks the manual.

pub(crate) use crate::protocol::api_family::Protocol;

/// The beginning of the paths that SDKs have in their base URL.
pub(super) const VERSION: &str = "/v1";

/// An endpoint: the `endpoint` label of metrics and log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum Endpoint {
    Chat,
    Compact,
    Completions,
    CountTokens,
    Embeddings,
    Health,
    ImageEdits,
    ImageVariations,
    Images,
    InputTokens,
    Messages,
    Metrics,
    Models,
    Moderations,
    Other,
    Ready,
    Rerank,
    Responses,
    Root,
    Speech,
    Status,
    StoredResponse,
    Transcriptions,
    Translations,
    Usage,
}

/// The properties of an endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    endpoint: Endpoint,
    /// The name in labels.
    pub(crate) name: &'static str,
    /// The paths, compared byte by byte. A path that ends in `/*` matches all paths below it. A path below `/v1`
    /// matches without `/v1` too: half of all SDKs are given a base URL without it.
    pub(crate) paths: &'static [&'static str],
    /// What serves the requests.
    pub(crate) served: ServedBy,
}

/// What serves a request to an endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ServedBy {
    /// A backend. The method is POST.
    Backends(Api),
    /// The backend that has a stored response; [`crate::protocol::stored`] knows the paths and the methods.
    Stored(Api),
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
    Root,
    Status,
    Usage,
}

/// The requests and responses of an endpoint that backends serve.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Api {
    /// The path, relative to the backend's API base.
    pub(crate) tail: &'static str,
    /// The format of a request's body.
    pub(crate) body: BodyFormat,
    /// The protocol that a backend must speak.
    pub(crate) protocol: Protocol,
    /// Whether a request without a model gets the backend's default model. Without one, a form goes out as it is.
    pub(crate) has_default_model: bool,
    /// Whether the body must have an array `messages`.
    pub(crate) needs_messages: bool,
    /// The format of the endpoint's streams.
    pub(crate) stream: StreamFormat,
    /// What can be known of an answer's tokens.
    pub(crate) metering: Metering,
    /// The `gen_ai.operation.name` of OpenTelemetry; empty: the conventions have no word, the name in labels is it.
    pub(crate) operation: &'static str,
    /// Whether a provider may store the answers, so that later requests refer to them by their ids.
    pub(crate) is_stored: bool,
}

/// The format of a request's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyFormat {
    /// A form (RFC 7578), which may have a part `model`.
    Form,
    /// A JSON object.
    Json,
    /// There is none. A body that a client sends is not forwarded.
    Nothing,
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
    /// Nothing; the counts in the answer are not what the request used.
    Off,
}

/// How an event stream signals its end, and the format of an error that Zap adds to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamFormat {
    /// The stream ends with `data: [DONE]`; an error is `data: {"error":…}`.
    Done,
    /// The stream ends with `message_stop`; an error is `event: error`.
    Messages,
    /// The stream ends with the body; an error is `data: {"error":…}`.
    Plain,
    /// The stream ends with an event such as `response.completed`; an error is `response.failed`.
    Responses,
}

const TABLE: [Row; Endpoint::COUNT] = [
    Row::api(
        Endpoint::Chat,
        "chat",
        &["/v1/chat/completions", "/chat"],
        Api {
            has_default_model: true,
            needs_messages: true,
            stream: StreamFormat::Done,
            metering: Metering::Full,
            operation: "chat",
            ..Api::at("/chat/completions")
        },
    ),
    Row::api(
        Endpoint::Compact,
        "compact",
        &["/v1/responses/compact"],
        Api {
            has_default_model: true,
            metering: Metering::Full,
            is_stored: true,
            operation: "chat",
            ..Api::at("/responses/compact")
        },
    ),
    Row::api(
        Endpoint::Completions,
        "completions",
        &["/v1/completions"],
        Api {
            has_default_model: true,
            stream: StreamFormat::Done,
            metering: Metering::Full,
            operation: "text_completion",
            ..Api::at("/completions")
        },
    ),
    Row::api(
        Endpoint::CountTokens,
        "count_tokens",
        &["/v1/messages/count_tokens"],
        Api {
            protocol: Protocol::Anthropic,
            has_default_model: true,
            needs_messages: true,
            metering: Metering::Off,
            ..Api::at("/messages/count_tokens")
        },
    ),
    Row::api(
        Endpoint::Embeddings,
        "embeddings",
        &["/v1/embeddings"],
        Api { metering: Metering::Input, operation: "embeddings", ..Api::at("/embeddings") },
    ),
    Row::page(Endpoint::Health, "health", &["/health"], Page::Health),
    Row::api(Endpoint::ImageEdits, "image_edits", &["/v1/images/edits"], Api::form("/images/edits")),
    Row::api(
        Endpoint::ImageVariations,
        "image_variations",
        &["/v1/images/variations"],
        Api::form("/images/variations"),
    ),
    Row::api(Endpoint::Images, "images", &["/v1/images/generations"], Api::at("/images/generations")),
    Row::api(
        Endpoint::InputTokens,
        "input_tokens",
        &["/v1/responses/input_tokens"],
        Api {
            has_default_model: true,
            metering: Metering::Off,
            is_stored: true,
            ..Api::at("/responses/input_tokens")
        },
    ),
    Row::api(
        Endpoint::Messages,
        "messages",
        &["/v1/messages"],
        Api {
            protocol: Protocol::Anthropic,
            has_default_model: true,
            needs_messages: true,
            stream: StreamFormat::Messages,
            metering: Metering::Full,
            operation: "chat",
            ..Api::at("/messages")
        },
    ),
    Row::page(Endpoint::Metrics, "metrics", &["/metrics"], Page::Metrics),
    Row::page(Endpoint::Models, "models", &["/v1/models", "/v1/models/*"], Page::Models),
    Row::api(Endpoint::Moderations, "moderations", &["/v1/moderations"], Api::at("/moderations")),
    Row { endpoint: Endpoint::Other, name: "other", paths: &[], served: ServedBy::Nobody },
    Row::page(Endpoint::Ready, "ready", &["/ready"], Page::Ready),
    Row::api(
        Endpoint::Rerank,
        "rerank",
        &["/v1/rerank"],
        Api { metering: Metering::Input, ..Api::at("/rerank") },
    ),
    Row::api(
        Endpoint::Responses,
        "responses",
        &["/v1/responses"],
        Api {
            has_default_model: true,
            stream: StreamFormat::Responses,
            metering: Metering::Full,
            is_stored: true,
            operation: "chat",
            ..Api::at("/responses")
        },
    ),
    Row::page(Endpoint::Root, "root", &["/"], Page::Root),
    Row::api(Endpoint::Speech, "speech", &["/v1/audio/speech"], Api::at("/audio/speech")),
    Row::page(Endpoint::Status, "status", &["/status"], Page::Status),
    Row {
        endpoint: Endpoint::StoredResponse,
        name: "stored_response",
        // Behind the paths below it that have a row of their own.
        paths: &["/v1/responses/*"],
        served: ServedBy::Stored(Api {
            body: BodyFormat::Nothing,
            has_default_model: true,
            stream: StreamFormat::Responses,
            metering: Metering::Off,
            is_stored: true,
            ..Api::at("/responses")
        }),
    },
    Row::api(
        Endpoint::Transcriptions,
        "transcriptions",
        &["/v1/audio/transcriptions"],
        Api::form("/audio/transcriptions"),
    ),
    Row::api(
        Endpoint::Translations,
        "translations",
        &["/v1/audio/translations"],
        Api::form("/audio/translations"),
    ),
    Row::page(Endpoint::Usage, "usage", &["/usage"], Page::Usage),
];

impl Api {
    /// Creates an endpoint whose requests are JSON and must name a model.
    const fn at(tail: &'static str) -> Self {
        Api {
            tail,
            body: BodyFormat::Json,
            protocol: Protocol::OpenAi,
            has_default_model: false,
            needs_messages: false,
            stream: StreamFormat::Plain,
            metering: Metering::Told,
            operation: "",
            is_stored: false,
        }
    }

    /// Creates an endpoint whose requests are forms.
    const fn form(tail: &'static str) -> Self {
        Api { body: BodyFormat::Form, has_default_model: true, ..Api::at(tail) }
    }
}

impl Row {
    /// Creates the row of an endpoint that backends serve.
    const fn api(endpoint: Endpoint, name: &'static str, paths: &'static [&'static str], api: Api) -> Self {
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

    /// Whether the row is that of a path. `has_version`: the path is below [`VERSION`].
    fn has(&self, path: &str, has_version: bool) -> bool {
        self.paths.iter().any(|known| {
            let known = if has_version { known } else { known.strip_prefix(VERSION).unwrap_or(known) };
            match known.strip_suffix('*') {
                Some(stem) => path.starts_with(stem),
                None => path == known,
            }
        })
    }

    /// The allowed methods, as the value of the `Allow` header. Not each path of a stored response has all of them.
    pub(crate) fn allow(&self) -> &'static str {
        match self.served {
            ServedBy::Backends(_) => "POST",
            ServedBy::Zap(_) => "GET, HEAD",
            ServedBy::Stored(_) => "GET, DELETE, POST",
            ServedBy::Nobody => "",
        }
    }
}

impl Endpoint {
    /// Number of endpoints. This is a literal because array types use it: a constant computed from the table would make
    /// the optimizing compiler fail with an evaluation cycle.
    pub(crate) const COUNT: usize = 25;

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
        let has_version = is_below_version(path);
        TABLE.iter().find(|row| row.has(path, has_version)).map_or(Endpoint::Other, |row| row.endpoint)
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
            ServedBy::Backends(api) | ServedBy::Stored(api) => Some(api),
            ServedBy::Zap(_) | ServedBy::Nobody => None,
        }
    }

    /// What a request to the endpoint does, as OpenTelemetry says it.
    pub(crate) fn operation(self) -> &'static str {
        let operation = self.api().map_or("", |api| api.operation);
        if operation.is_empty() { self.name() } else { operation }
    }

    /// The first of the paths, which stands for all of them; `None` if the path is unknown.
    pub(crate) fn route(self) -> Option<&'static str> {
        self.row().paths.first().copied()
    }

    /// The protocol of the endpoint: it decides what an error looks like.
    pub(crate) fn protocol(self) -> Protocol {
        self.api().map_or(Protocol::default(), |api| api.protocol)
    }

    /// Whether the endpoint is a page that tells operators about all clients and backends.
    pub(crate) fn is_for_operators(self) -> bool {
        matches!(self.row().served, ServedBy::Zap(Page::Metrics | Page::Status | Page::Usage))
    }

    /// Whether monitors ask here how Zap is.
    pub(crate) fn is_health_check(self) -> bool {
        matches!(self, Endpoint::Health | Endpoint::Ready)
    }

    /// Whether a request to `path` of this endpoint needs a client key, if client keys are configured. Unknown paths
    /// below `/v1/` need one too.
    pub(crate) fn is_guarded(self, path: &str) -> bool {
        let is_own = match self.row().served {
            ServedBy::Backends(_) | ServedBy::Stored(_) | ServedBy::Zap(Page::Models) => true,
            ServedBy::Zap(_) | ServedBy::Nobody => false,
        };
        is_own || is_below_version(path)
    }

    /// Whether the endpoint is one that a monitor or an operator asks about Zap itself.
    pub(crate) fn is_probe(self) -> bool {
        match self.row().served {
            ServedBy::Zap(Page::Models) => false,
            ServedBy::Zap(_) => true,
            ServedBy::Backends(_) | ServedBy::Stored(_) | ServedBy::Nobody => false,
        }
    }
}

fn is_below_version(path: &str) -> bool {
    path.strip_prefix(VERSION).is_some_and(|rest| rest.starts_with('/'))
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
            ("/models", Endpoint::Models),
            ("/models/a/b", Endpoint::Models),
            ("/v1/responses", Endpoint::Responses),
            ("/responses", Endpoint::Responses),
            ("/responses/compact", Endpoint::Compact),
            ("/chat/completions", Endpoint::Chat),
            ("/v1/messages", Endpoint::Messages),
            ("/messages/count_tokens", Endpoint::CountTokens),
        ] {
            assert_eq!(Endpoint::of(path), endpoint, "{path}");
        }
        for path in [
            "/v1/modelsx",
            "/chat/",
            "/v1//chat",
            "/%63hat",
            "/Chat",
            "",
            "/v1/chat",
            "/v1",
            "/v1/v1/models",
            "/v1/messages/",
            "/v1/health",
        ] {
            assert_eq!(Endpoint::of(path), Endpoint::Other, "{path}");
        }
    }

    #[test]
    fn every_path_that_backends_serve_is_guarded() {
        for row in TABLE.iter().filter(|row| row.endpoint.api().is_some()) {
            let is_guarded = |path: &str| Endpoint::of(path).is_guarded(path);
            let is_guarded = |path: &&str| is_guarded(path) && is_guarded(path.trim_start_matches("/v1"));
            assert!(row.paths.iter().all(is_guarded), "{}", row.name);
        }
        for (path, want) in
            [("/models", true), ("/v1/models/a", true), ("/v1/x", true), ("/v1x", false), ("/health", false)]
        {
            assert_eq!(Endpoint::of(path).is_guarded(path), want, "{path}");
        }
    }

    #[test]
    fn operations_have_the_words_of_the_conventions() {
        for (endpoint, want) in [
            (Endpoint::Chat, "chat"),
            (Endpoint::Messages, "chat"),
            (Endpoint::Responses, "chat"),
            (Endpoint::Completions, "text_completion"),
            (Endpoint::Embeddings, "embeddings"),
            (Endpoint::Rerank, "rerank"),
            (Endpoint::StoredResponse, "stored_response"),
        ] {
            assert_eq!(endpoint.operation(), want);
        }
    }
}
