//! Which models a backend may be sent, by its `models`, its `default_model` and the routes.
//!
//! Weights do not count: a file stays valid if a backend is drained and then gets its weight back.

use crate::config::{Backend, Config};
use crate::policy::balance::BackendId;
use crate::policy::pattern::Pattern;
use crate::policy::route::{CATCH_ALL, Named};

/// The set of names that a pattern matches. Two sets are disjoint, or one contains the other.
#[derive(Clone)]
pub(super) struct Names {
    stem: String,
    is_prefix: bool,
}

impl Names {
    fn any() -> Self {
        Self { stem: String::new(), is_prefix: true }
    }

    /// Only `name`; a `*` in it stands for itself.
    fn one(name: &str) -> Self {
        Self { stem: name.to_owned(), is_prefix: false }
    }

    /// A name, or a prefix that ends in `*`.
    pub(super) fn written(text: &str) -> Self {
        match text.strip_suffix('*') {
            Some(stem) => Self { stem: stem.to_owned(), is_prefix: true },
            None => Self::one(text),
        }
    }

    fn of(pattern: &Pattern) -> Self {
        Self { stem: pattern.stem().to_owned(), is_prefix: pattern.is_prefix() }
    }

    /// Whether all names of `other` are among these.
    pub(super) fn contain(&self, other: &Names) -> bool {
        match self.is_prefix {
            true => other.stem.starts_with(&self.stem),
            false => !other.is_prefix && other.stem == self.stem,
        }
    }

    /// The names that are in both.
    fn in_both(&self, other: &Names) -> Option<Names> {
        let narrower = if self.contain(other) { other } else { self };
        (self.contain(other) || other.contain(self)).then(|| narrower.clone())
    }

    pub(super) fn text(&self) -> String {
        format!("{}{}", self.stem, if self.is_prefix { "*" } else { "" })
    }
}

/// A mapping from requested names to the name that the backend is sent.
pub(super) struct Mapping {
    /// The requested names; `None`: the request names no model.
    requested: Option<Names>,
    becomes: Becomes,
}

/// What a backend is sent for the requested name.
enum Becomes {
    /// The same name.
    Same,
    /// Another name.
    Fixed(Names),
    /// The name with its first `cut` bytes replaced by `head`.
    Rest { cut: usize, head: String },
}

impl Mapping {
    /// The names that the backend is sent for the requested names.
    fn sent(&self, requested: &Names) -> Names {
        match &self.becomes {
            Becomes::Same => requested.clone(),
            Becomes::Fixed(names) => names.clone(),
            Becomes::Rest { cut, head } => {
                let rest = requested.stem.get(*cut..).unwrap_or_default();
                Names { stem: format!("{head}{rest}"), is_prefix: requested.is_prefix }
            }
        }
    }
}

/// Returns the names that a client limited to `allowed` can cause the backend to be sent; `None`: any model, or none.
pub(super) fn sent(mappings: &[Mapping], allowed: Option<&[Pattern]>) -> Vec<Names> {
    let of_mapping = |mapping: &Mapping| -> Vec<Names> {
        match (allowed, &mapping.requested) {
            (None, requested) => vec![mapping.sent(requested.as_ref().unwrap_or(&Names::any()))],
            (Some(_), None) => Vec::new(),
            (Some(allowed), Some(requested)) => {
                let both = allowed.iter().filter_map(|pattern| Names::of(pattern).in_both(requested));
                both.map(|names| mapping.sent(&names)).collect()
            }
        }
    };
    mappings.iter().flat_map(of_mapping).collect()
}

/// Returns all mappings of a backend. The list may be too long: a named route takes precedence over a model of the same
/// name.
pub(super) fn mappings(id: BackendId, backend: &Backend, routes: &[Named]) -> Vec<Mapping> {
    let mut mappings = Vec::new();
    let mut add = |requested: Option<Names>, becomes: Becomes| mappings.push(Mapping { requested, becomes });
    match &backend.models {
        None => add(Some(Names::any()), Becomes::Same),
        Some(rules) => {
            for rule in rules {
                let becomes = match rule.own.as_deref() {
                    None => Becomes::Same,
                    Some(own) => match own.strip_suffix('*') {
                        Some(head) => Becomes::Rest { cut: rule.public.stem().len(), head: head.to_owned() },
                        None => Becomes::Fixed(Names::one(own)),
                    },
                };
                add(Some(Names::of(&rule.public)), becomes);
            }
        }
    }
    if let Some(name) = &backend.default_model {
        add(None, Becomes::Fixed(Names::one(name)));
        // A client may also ask for it by its name, if `models` does not make another name of it.
        if !backend.models.iter().flatten().any(|rule| rule.public.matches(name)) {
            add(Some(Names::one(name)), Becomes::Same);
        }
    }
    for route in routes {
        for target in route.targets.iter().filter(|target| target.backend == id) {
            let requested = if route.name == CATCH_ALL { Names::any() } else { Names::one(&route.name) };
            let becomes =
                target.model.as_deref().map_or(Becomes::Same, |model| Becomes::Fixed(Names::one(model)));
            add(Some(requested), becomes);
        }
    }
    mappings
}

/// Whether any backend or route serves a name of `pattern`.
pub(super) fn is_served(config: &Config, pattern: &Pattern) -> bool {
    let allowed = std::slice::from_ref(pattern);
    config
        .backends
        .iter()
        .enumerate()
        .any(|(id, backend)| !sent(&mappings(id, backend, &config.routes), Some(allowed)).is_empty())
}
