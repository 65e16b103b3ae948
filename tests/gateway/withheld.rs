//! No header, cookie or credential of a client reaches a backend that the configuration does not name: random requests
//! with every feature on, compared with a model of the documented rules.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use fastrand::Rng;

use crate::support::provider::{After, Seen, chunk, end_chunks, reply, start_events};
use crate::support::{Client, Ledger, Provider, Zap};

const REQUESTS: usize = 10_000;

const KEYS: usize = 8;

const SETTINGS: &str = "[server]\nworkers = 2\ncors_origins = [\"https://app.example\"]\n\
    trusted_proxies = [\"127.0.0.1\"]\nallowed_hosts = [\"zap\"]\n\
    [load_balancer]\nstrategy = \"prefix_hash\"\n\
    [health]\nfailure_threshold = 1000\n\
    [retry]\nbudget_percent = 100\nbase_delay_ms = 1\nmax_delay_ms = 1\n\
    [rate_limit]\nrequests_per_minute = 1000000\nrequests_per_minute_per_address = 1000000\n\
    [models.any]\n\
    targets = [{ backend = \"flaky\", model = \"one\" }, { backend = \"ruled\", model = \"two\" }]\n";

/// A backend, and what its configuration says about headers.
struct Rules {
    name: &'static str,
    speaks_anthropic: bool,
    /// `forward_authorization`
    forwards_account: bool,
    /// `forward_headers` and `drop_headers`
    forward: &'static [&'static str],
    drop: &'static [&'static str],
    /// The headers of its own.
    own: &'static [(&'static str, &'static str)],
    /// The rest of its configuration.
    more: &'static str,
}

const BACKENDS: [Rules; 6] = [
    Rules {
        name: "plain",
        speaks_anthropic: false,
        forwards_account: false,
        forward: &[],
        drop: &[],
        own: &[("authorization", "Bearer sk-own")],
        more: "api_key = \"sk-own\"",
    },
    Rules {
        name: "ruled",
        speaks_anthropic: false,
        forwards_account: false,
        forward: &["x-title", "X-Codex-*", "x-t*", "c*", "p*", "t*", "k*"],
        drop: &["x-stainless-os", "openai-beta", "accept"],
        own: &[("x-api-key", "sk-own"), ("http-referer", "own"), ("x-codex-own", "mine")],
        more: "api_key = \"sk-own\"\nauth_header = \"x-api-key\"\n\
            extra_headers = { http-referer = \"own\", X-Codex-Own = \"mine\" }\ndrop_fields = [\"user\"]",
    },
    Rules {
        name: "keyless",
        speaks_anthropic: false,
        forwards_account: true,
        forward: &["x-*", "my-*", "o*", "s*", "a*"],
        drop: &["x-other", "x-forwarded-*", "user-agent"],
        own: &[],
        more: "forward_authorization = true",
    },
    // The provider of this one is its proxy.
    Rules {
        name: "behind",
        speaks_anthropic: false,
        forwards_account: false,
        forward: &["x-title", "p*", "baggage"],
        drop: &["trace*"],
        own: &[("authorization", "Bearer sk-own"), ("proxy-authorization", "Basic dXNlcjpzay1wYXNz")],
        more: "api_key = \"sk-own\"\nusage = \"inject\"",
    },
    Rules {
        name: "claude",
        speaks_anthropic: true,
        forwards_account: false,
        forward: &["a*", "x-title", "c*"],
        drop: &["anthropic-other"],
        own: &[("x-api-key", "sk-own")],
        more: "api_key = \"sk-own\"\nprotocols = [\"anthropic\"]",
    },
    // It fails half of its requests: they go on to "ruled".
    Rules {
        name: "flaky",
        speaks_anthropic: false,
        forwards_account: false,
        forward: &["x-other", "http-referer"],
        drop: &["x-stainless-*", "idempotency-key"],
        own: &[],
        more: "",
    },
];

/// Headers that may hold the key of a client, in the order in which Zap looks at them.
const KEY_HEADERS: [&str; 4] = ["authorization", "api-key", "x-api-key", "x-goog-api-key"];

/// Other headers that carry a credential, a cookie, or something of the connection. No rule lets them pass.
const WITHHELD: [&str; 22] = [
    "cookie",
    "cookie2",
    "set-cookie",
    "x-litellm-api-key",
    "ocp-apim-subscription-key",
    "proxy-authorization",
    "proxy-authenticate",
    "x-forwarded-authorization",
    "x-auth-token",
    "x-amz-security-token",
    "x-amz-signature",
    "x-user-password",
    "helicone-auth",
    "x-codex-token",
    "x-title-secret",
    "te",
    "trailer",
    "upgrade",
    "keep-alive",
    "proxy-connection",
    "x-csrf-token",
    "http2-settings",
];

/// Headers that pass where the standard list or a rule names them.
const OPEN: [&str; 40] = [
    "x-title",
    "x-titles",
    "x-codex-a",
    "x-codex-own",
    "x-codex",
    "x-other",
    "http-referer",
    "referer",
    "accept",
    "accept-language",
    "user-agent",
    "idempotency-key",
    "openai-beta",
    "openai-organization",
    "openai-project",
    "anthropic-beta",
    "anthropic-version",
    "anthropic-other",
    "x-stainless-os",
    "x-stainless-lang",
    "traceparent",
    "tracestate",
    "baggage",
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-real-ip",
    "cf-connecting-ip",
    "origin",
    "sec-fetch-site",
    "access-control-request-method",
    "pragma",
    "cache-control",
    "x-max-tokens",
    "x-cache-key",
    "priority",
    "x-zap-session",
    "x-claude-code-session-id",
    "session-id",
    "thread-id",
];

/// Words of made-up names. A name with one of the last ten is that of a credential.
const WORDS: [&str; 22] = [
    "title",
    "codex",
    "id",
    "lang",
    "turn",
    "t",
    "k",
    "own",
    "client",
    "page",
    "org",
    "a",
    "auth",
    "token",
    "key",
    "cookie",
    "secret",
    "jwt",
    "bearer",
    "password",
    "credential",
    "signature",
];

const OPENAI_PATHS: [&str; 9] = [
    "/chat",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/responses/input_tokens",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/images/generations",
    "/v1/audio/transcriptions",
];

/// Requests for a stored response. Its id gets the number of the request.
const STORED: [(&str, &str); 4] = [
    ("GET", "/v1/responses/resp_"),
    ("DELETE", "/v1/responses/resp_"),
    ("POST", "/v1/responses/resp_/cancel"),
    ("GET", "/v1/responses/resp_/input_items"),
];

const ANTHROPIC_PATHS: [&str; 2] = ["/v1/messages", "/v1/messages/count_tokens"];

const FORM: &str = "multipart/form-data; boundary=b";

impl Rules {
    /// The `[[backends]]` entry.
    fn entry(&self, address: SocketAddr) -> String {
        let Rules { name, forward, drop, more, .. } = self;
        let place = match *name {
            "behind" => format!("url = \"http://api.test\"\nproxy = \"http://user:sk-pass@{address}\""),
            _ => format!("url = \"http://{address}\""),
        };
        format!(
            "[[backends]]\nname = \"{name}\"\nweight = 1\n{place}\nmodels = [\"{name}\"]\n\
             prices = {{ \"*\" = {{ input = 1, output = 1 }} }}\nforward_headers = {forward:?}\n\
             drop_headers = {drop:?}\n{more}\n"
        )
    }

    /// Whether a header of the client is one that the backend is to get.
    fn names(&self, header: &Header) -> bool {
        let name = header.name.to_ascii_lowercase();
        let lists = |patterns: &[&str]| {
            patterns.iter().map(|pattern| pattern.to_ascii_lowercase()).any(|pattern| {
                match pattern.strip_suffix('*') {
                    Some(begin) => name.starts_with(begin),
                    None => name == pattern,
                }
            })
        };
        let is_standard = match &*name {
            "accept" | "idempotency-key" | "traceparent" | "tracestate" | "user-agent" => true,
            "authorization" | "openai-organization" | "openai-project" => self.forwards_account,
            "openai-beta" => !self.speaks_anthropic,
            "anthropic-beta" | "anthropic-version" => self.speaks_anthropic,
            name => name.starts_with("x-stainless-"),
        };
        let is_own = self.own.iter().any(|(own, _)| *own == name);
        let is_named = is_standard || lists(self.forward) && !header.is_secret;
        is_named && !lists(self.drop) && !is_own
    }
}

/// A header of a client.
struct Header {
    name: String,
    value: String,
    is_secret: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The backend of this number.
    Backend(usize),
    /// The route `any`.
    Route,
    /// The maker of a response that Zap does not know.
    Maker,
}

impl Target {
    /// Whether a request may come to the backend `name`.
    fn allows(self, name: &str) -> bool {
        match self {
            Target::Backend(number) => BACKENDS[number].name == name,
            Target::Route => ["ruled", "flaky"].contains(&name),
            Target::Maker => name != "claude",
        }
    }
}

/// A random request of a client.
struct Request {
    target: Target,
    method: &'static str,
    path: &'static str,
    headers: Vec<Header>,
    /// A header that `Connection` nominates, in lower case.
    nominated: Option<String>,
    is_streamed: bool,
    is_chunked: bool,
}

impl Request {
    /// Makes request `n`: the same one each time.
    fn new(seed: u64, n: usize) -> Self {
        let mut rng = Rng::with_seed(seed.wrapping_add(n as u64));
        // A request for "flaky" itself would fail.
        let target = match rng.usize(..8) {
            number @ 0..5 => Target::Backend(number),
            5 | 6 => Target::Route,
            _ => Target::Maker,
        };
        let (method, path) = match target {
            Target::Maker => STORED[rng.usize(..STORED.len())],
            Target::Backend(number) if BACKENDS[number].speaks_anthropic => {
                ("POST", ANTHROPIC_PATHS[rng.usize(..ANTHROPIC_PATHS.len())])
            }
            _ => ("POST", OPENAI_PATHS[rng.usize(..OPENAI_PATHS.len())]),
        };
        let mut headers = Vec::new();
        let mut add = |rng: &mut Rng, name: &str, value: String, is_secret| {
            let cased = |c: char| if rng.bool() { c.to_ascii_uppercase() } else { c };
            headers.push(Header { name: name.chars().map(cased).collect(), value, is_secret });
        };
        // The client's key; what stands before it is no key, and what stands behind it is not looked at.
        let (place, key) = (rng.usize(..KEY_HEADERS.len()), format!("sk-client-{}", rng.usize(..KEYS)));
        for (i, name) in KEY_HEADERS.into_iter().enumerate() {
            let bearer = if i == 0 { "Bearer " } else { "" };
            if i == place {
                add(&mut rng, name, format!("{bearer}{key}"), true);
            } else if i == 0 && rng.bool() {
                add(&mut rng, name, format!("Basic sk-client-{n}"), true);
            } else if i > place && rng.bool() {
                add(&mut rng, name, format!("sk-client-{n}-{i}"), true);
            }
        }
        for i in 0..rng.usize(..14) {
            let (name, is_secret) = match rng.u8(..3) {
                0 => (WITHHELD[rng.usize(..WITHHELD.len())].to_owned(), true),
                1 => (OPEN[rng.usize(..OPEN.len())].to_owned(), false),
                _ => {
                    let words: Vec<_> = (0..rng.usize(1..4)).map(|_| rng.usize(..WORDS.len())).collect();
                    let begin = ["x", "my", "c", "p"][rng.usize(..4)];
                    let name = words.iter().fold(begin.to_owned(), |name, i| name + "-" + WORDS[*i]);
                    (name, words.iter().any(|i| *i >= WORDS.len() - 10))
                }
            };
            if KEY_HEADERS.contains(&&*name) {
                continue;
            }
            let value = format!("{}-{n}-{i}", if is_secret { "sk-client" } else { "value" });
            add(&mut rng, &name, value, is_secret);
        }
        let nominated = rng.choice(&headers).filter(|_| rng.u8(..4) == 0);
        let nominated = nominated.map(|header| header.name.to_ascii_lowercase());
        let is_form = path.ends_with("transcriptions");
        let is_streamed = rng.bool() && ["/chat", "/v1/chat/completions", "/v1/completions"].contains(&path);
        let is_chunked = !is_form && target != Target::Maker && rng.u8(..4) == 0;
        Request { target, method, path, headers, nominated, is_streamed, is_chunked }
    }

    fn body(&self, n: usize) -> String {
        let model = match self.target {
            Target::Backend(number) => BACKENDS[number].name,
            Target::Route => "any",
            Target::Maker if self.method == "POST" => return format!("{{\"user\":\"sk-client-{n}\"}}"),
            Target::Maker => return String::new(),
        };
        if self.path.ends_with("transcriptions") {
            return format!(
                "--b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n--b--\r\n"
            );
        }
        let talk = format!("[{{\"role\":\"user\",\"content\":\"talk {}\"}}]", n % 50);
        let stream = self.is_streamed;
        format!(
            "{{\"model\":\"{model}\",\"stream\":{stream},\"user\":\"u\",\"max_tokens\":9,\"messages\":{talk},\
             \"prompt\":\"p\",\"input\":\"i\",\"query\":\"q\",\"documents\":[\"d\"]}}"
        )
    }

    /// All bytes of the request.
    fn bytes(&self, n: usize) -> String {
        let path = self.path.replace("resp_", &format!("resp_{n}"));
        let query = match self.target {
            // The one query that is forwarded.
            Target::Maker => "?include=all".to_owned(),
            _ if n.is_multiple_of(3) => format!("?key=sk-client-{n}"),
            _ => String::new(),
        };
        let line = format!("{} {path}{query} HTTP/1.1", self.method);
        let mut head = format!("{line}\r\nhost: zap\r\nx-request-id: n-{n}\r\n");
        if self.path.ends_with("transcriptions") {
            head += &format!("content-type: {FORM}\r\n");
        } else if n.is_multiple_of(2) {
            head += "content-type: text/plain; value=sk-client\r\n";
        }
        for Header { name, value, .. } in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        if let Some(name) = &self.nominated {
            head += &format!("connection: keep-alive, {name}\r\n");
        }
        let body = self.body(n);
        match self.is_chunked {
            true => format!(
                "{head}transfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\nx-title: sk-client-{n}\r\n\r\n",
                body.len()
            ),
            false => format!("{head}content-length: {}\r\n\r\n{body}", body.len()),
        }
    }

    /// The headers that a backend is to get, sorted, without `host` and `content-length`.
    fn expected(&self, n: usize, rules: &Rules) -> Vec<(String, String)> {
        let mut expected: Vec<(String, String)> = self
            .headers
            .iter()
            .filter(|header| rules.names(header))
            .map(|header| (header.name.to_ascii_lowercase(), header.value.clone()))
            .filter(|(name, _)| self.nominated.as_ref() != Some(name))
            .collect();
        let form = self.path.ends_with("transcriptions");
        let mut further = rules.own.to_vec();
        let id = format!("n-{n}");
        further.extend([("accept-encoding", "identity"), ("x-request-id", &id)]);
        // A request for a stored response has no body.
        if self.target != Target::Maker {
            further.push(("content-type", if form { FORM } else { "application/json" }));
        }
        for (name, value) in [("accept", "*/*"), ("user-agent", "zap")] {
            if expected.iter().all(|(found, _)| found != name) {
                further.push((name, value));
            }
        }
        expected.extend(further.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())));
        expected.sort();
        expected
    }
}

fn number_of(seen: &Seen) -> usize {
    seen.header("x-request-id").unwrap().strip_prefix("n-").unwrap().parse().unwrap()
}

fn start(rules: &Rules) -> Provider {
    let is_flaky = rules.name == "flaky";
    Provider::start(move |seen, stream| {
        if is_flaky && number_of(seen).is_multiple_of(2) {
            reply(stream, 500, "", b"{\"error\":{\"message\":\"down\"}}");
        } else if memchr::memmem::find(&seen.body, b"\"stream\":true").is_some() {
            start_events(stream);
            chunk(stream, "data: {\"choices\":[{\"text\":\"a\",\"delta\":{\"content\":\"a\"}}]}\n\n");
            chunk(stream, "data: [DONE]\n\n");
            end_chunks(stream);
        } else {
            let answer = b"{\"choices\":[{\"message\":{\"content\":\"a\"}}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1}}";
            reply(stream, 200, "content-type: application/json\r\n", answer);
        }
        After::Keep
    })
}

#[test]
fn no_header_of_a_client_reaches_a_backend_that_the_configuration_does_not_name() {
    let seed = fastrand::u64(..);
    let providers = BACKENDS.each_ref().map(start);
    let ledger = Ledger::new();
    let mut settings = SETTINGS.to_owned() + &ledger.settings();
    for i in 0..KEYS {
        settings += &format!(
            "[[client_keys]]\nname = \"client-{i}\"\nkey = \"sk-client-{i}\"\nmax_in_flight = 100\n\
             tokens_per_minute = 1000000000\nbudget = {{ usd = 1000000, per = \"month\" }}\n"
        );
    }
    let entries: Vec<_> =
        BACKENDS.iter().zip(&providers).map(|(rules, provider)| rules.entry(provider.address)).collect();
    let zap = Zap::with_log(&settings, &entries);

    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut client: Client = zap.client();
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= REQUESTS {
                        break;
                    }
                    let request = Request::new(seed, n).bytes(n);
                    client.send(&request);
                    let answer = client.response();
                    let is_served = answer.status == 200 && answer.whole;
                    assert!(is_served, "seed {seed}: {request}\n{}: {}", answer.status, answer.text());
                }
            });
        }
    });

    let mut tries = HashMap::<usize, Vec<&str>>::new();
    for (rules, provider) in BACKENDS.iter().zip(&providers) {
        for mut seen in provider.seen() {
            let (n, name) = (number_of(&seen), rules.name);
            let request = Request::new(seed, n);
            let (is_stored, query) = (request.target == Target::Maker, seen.line.split_once('?'));
            let query = query.map(|(_, query)| query.split(' ').next().unwrap());
            assert_eq!(query, is_stored.then_some("include=all"), "seed {seed}: {}", seen.line);
            assert!(!is_stored || seen.body.is_empty(), "seed {seed}: {}", seen.line);
            seen.headers.retain(|(name, _)| !["host", "content-length"].contains(&&**name));
            seen.headers.sort();
            let expected = request.expected(n, rules);
            assert_eq!(seen.headers, expected, "seed {seed}: {name} got {}", request.bytes(n));
            tries.entry(n).or_default().push(name);
        }
        let probes = provider.probes();
        assert!(probes.iter().flat_map(|seen| &seen.headers).all(|(_, value)| !value.contains("sk-client")));
    }
    let mut moved = 0;
    for n in 0..REQUESTS {
        let (target, tries) = (Request::new(seed, n).target, &tries[&n]);
        assert!(tries.iter().all(|name| target.allows(name)), "seed {seed}: {n} came to {tries:?}");
        moved += usize::from(tries.len() == 2);
    }
    assert!(moved > REQUESTS / 50, "{moved} requests were tried at two backends");
    for line in zap.lines(REQUESTS) {
        assert!(!line.to_string().contains("sk-"), "seed {seed}: {line}");
    }
}
