//! What a backend's configuration says about the client's headers: which pass beside the standard list, and which do
//! not pass.

use http::HeaderName;

/// Headers of the connection (RFC 9110, section 7.6.1), and those that Zap sets itself or that describe the body as the
/// client sent it.
const NOT_THE_CLIENTS: [&str; 17] = [
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-request-id",
];

/// A part of a name that marks a credential.
const CREDENTIAL_PARTS: [&str; 9] =
    ["accesskey", "apikey", "authoriz", "cookie", "credential", "passw", "secret", "signature", "token"];

/// A word of a name that marks a credential.
const CREDENTIAL_WORDS: [&str; 6] = ["auth", "bearer", "jwt", "key", "keys", "pass"];

/// Words of a name whose key opens nothing: `idempotency-key`, `x-cache-key`.
const HARMLESS_KEYS: [&str; 3] = ["cache", "idempotency", "routing"];

/// The rules of one backend. Empty rules pass the standard list and nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderRules {
    /// Headers that pass beside the standard list.
    pub forward: Vec<NamePattern>,
    /// Headers that do not pass.
    pub drop: Vec<NamePattern>,
}

/// A name of headers, or with a `*` at its end all names that begin so. Case does not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePattern {
    /// In lower case, without the `*`.
    text: Box<str>,
    is_prefix: bool,
}

impl NamePattern {
    /// Parses a pattern. Returns `None` if `text` is not a name, or if no header of this name may pass: credentials,
    /// cookies, headers of the connection, headers that Zap sets itself.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, is_prefix) = match text.strip_suffix('*') {
            Some(name) => (name, true),
            None => (text, false),
        };
        let name = HeaderName::from_bytes(name.as_bytes()).ok().filter(|_| !name.contains('*'))?;
        // `cookie*` and `x-api-key-*` name nothing else.
        let whole_words = name.as_str().trim_end_matches('-');
        (!is_withheld(name.as_str()) && !is_withheld(whole_words))
            .then(|| NamePattern { text: name.as_str().into(), is_prefix })
    }

    fn matches(&self, name: &str) -> bool {
        match self.is_prefix {
            true => name.starts_with(&*self.text),
            false => *self.text == *name,
        }
    }
}

impl HeaderRules {
    /// Whether there are no rules, as nearly always.
    pub(crate) fn is_empty(&self) -> bool {
        self.forward.is_empty() && self.drop.is_empty()
    }

    /// Whether a client's header passes although it is not on the standard list. A pattern never covers a credential.
    pub(crate) fn forwards(&self, name: &str) -> bool {
        self.forward.iter().any(|p| p.matches(name)) && !is_withheld(name)
    }

    /// Whether a client's header does not pass although it is allowed.
    pub(crate) fn drops(&self, name: &str) -> bool {
        self.drop.iter().any(|p| p.matches(name))
    }
}

/// Whether a header belongs to the connection, or Zap sets it itself. `name` is in lower case.
pub(crate) fn is_reserved(name: &str) -> bool {
    NOT_THE_CLIENTS.contains(&name)
}

/// Whether a header never passes by a rule. `name` is in lower case. A name is taken for a credential by its words,
/// since every gateway and provider has its own.
fn is_withheld(name: &str) -> bool {
    let words = || name.split(['-', '_', '.']);
    let is_harmless_key = || words().any(|word| HARMLESS_KEYS.contains(&word));
    // A number of tokens is not a credential: `x-max-tokens`.
    let has_part = |part: &&str| {
        name.match_indices(*part).any(|(at, _)| *part != "token" || !name[at + part.len()..].starts_with('s'))
    };
    is_reserved(name)
        || CREDENTIAL_PARTS.iter().any(has_part)
        || words().any(|word| CREDENTIAL_WORDS.contains(&word)) && !is_harmless_key()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(forward: &[&str], drop: &[&str]) -> HeaderRules {
        let parse = |all: &[&str]| all.iter().map(|text| NamePattern::parse(text).unwrap()).collect();
        HeaderRules { forward: parse(forward), drop: parse(drop) }
    }

    #[test]
    fn names_and_prefixes_match_in_any_case() {
        let rules = rules(&["HTTP-Referer", "x-codex-*", "x-title"], &["X-Stainless-*", "user-agent"]);
        for (name, forwards, drops) in [
            ("http-referer", true, false),
            ("http-referer-2", false, false),
            ("x-codex-", true, false),
            ("x-codex-turn", true, false),
            ("x-codex", false, false),
            ("x-codex-session-token", false, false),
            ("x-stainless-lang", false, true),
            ("user-agent", false, true),
            ("accept", false, false),
        ] {
            assert_eq!((rules.forwards(name), rules.drops(name)), (forwards, drops), "{name}");
        }
        assert!(!HeaderRules::default().forwards("x-title") && !HeaderRules::default().drops("x-title"));
    }

    #[test]
    fn credentials_cookies_and_headers_of_the_connection_cannot_be_listed() {
        for name in [
            "authorization",
            "Proxy-Authorization",
            "x-forwarded-authorization",
            "cf-aig-authorization",
            "Cookie",
            "cookie2",
            "set-cookie",
            "api-key",
            "X-API-Key",
            "x-goog-api-key",
            "x-litellm-api-key",
            "apikey",
            "ocp-apim-subscription-key",
            "x-functions-key",
            "x-master-key",
            "helicone-auth",
            "x-auth-token",
            "x-amz-security-token",
            "x-forwarded-access-token",
            "cf-access-jwt-assertion",
            "x-csrf-token",
            "x-client-secret",
            "x-password",
            "connection",
            "te",
            "Transfer-Encoding",
            "upgrade",
            "host",
            "content-length",
            "content-type",
            "accept-encoding",
            "x-request-id",
            "",
            "*",
            "a b",
            "x-*-y",
            "x-ä",
            "cookie*",
            "x-api-key*",
            "x-api-key-*",
            "authorization*",
            "proxy-auth*",
        ] {
            assert_eq!(NamePattern::parse(name), None, "{name}");
        }
        for name in [
            "http-referer",
            "x-title",
            "anthropic-beta",
            "x-codex-*",
            "x-*",
            "a*",
            "x-max-tokens",
            "x-cache-key",
            "idempotency-key",
            "user-agent",
            "accept",
            "x-forwarded-for",
            "x-claude-code-session-id",
            "x-author",
        ] {
            assert!(NamePattern::parse(name).is_some(), "{name}");
        }
    }

    #[test]
    fn a_prefix_never_covers_a_credential() {
        let rules = rules(&["x-*", "a*", "c*", "p*", "t*"], &[]);
        for name in [
            "x-api-key",
            "api-key",
            "authorization",
            "cookie",
            "connection",
            "content-type",
            "proxy-authorization",
            "te",
            "transfer-encoding",
            "x-request-id",
            "x-goog-api-key",
            "accept-encoding",
        ] {
            assert!(!rules.forwards(name), "{name}");
        }
        assert!(rules.forwards("x-other") && rules.forwards("anthropic-beta"));
    }
}
