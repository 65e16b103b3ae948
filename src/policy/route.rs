//! Which backends serve a model, and which name each of them uses for it.
//!
//! Routes are computed in advance: a [`Table`] holds a [`Route`] for every named route, every exact public name and
//! every prefix, so that a request costs one or two look-ups, for any number of backends. The table depends on the
//! configuration only; [`crate::policy::balance`] and [`crate::policy::breaker`] decide which targets of a route may
//! get a request *now*.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use xxhash_rust::xxh64::xxh64;

use crate::json::patch::ModelText;
use crate::policy::balance::BackendId;
use crate::policy::near::nearest;
use crate::policy::pattern::Pattern;

/// The name of the route for models that no other route serves.
pub(crate) const CATCH_ALL: &str = "*";

/// An entry of a backend's `models`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The name or the prefix that clients use.
    pub public: Pattern,
    /// The backend's own name for the model, if it differs. With a prefix it may end in `*`, which stands for the
    /// rest of the client's name.
    pub own: Option<Box<str>>,
}

/// The models that one backend serves, and its share of their requests.
#[derive(Clone, Debug, Default)]
pub(crate) struct Serves {
    /// `None`: any model, by the client's name.
    pub models: Option<Vec<Rule>>,
    /// The model for requests that name none.
    pub default_model: Option<String>,
    /// Weight of the backend; 0: drained in all routes.
    pub weight: u32,
    /// Backends of a lower number come first.
    pub priority: u32,
}

/// A route that the operator has named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The name, or [`CATCH_ALL`].
    pub name: String,
    /// In the order of the configuration; not empty.
    pub targets: Vec<NamedTarget>,
}

/// A target of a [`Named`] route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTarget {
    /// Index of the backend.
    pub backend: BackendId,
    /// The backend's own name for the model; `None`: the name that the client gave.
    pub model: Option<String>,
    /// Replaces the backend's weight.
    pub weight: Option<u32>,
    /// Replaces the backend's priority.
    pub priority: Option<u32>,
}

/// A route's index in its [`Table`].
pub(crate) type RouteId = usize;

/// A target's index in its [`Route`].
pub(crate) type TargetId = usize;

/// A backend with the model that it gets.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// The backend.
    pub backend: BackendId,
    /// The model that the backend gets.
    pub sent: Sent,
    /// Weight of the target; 0: drained.
    pub weight: u32,
    /// Targets of a lower number come first.
    pub priority: u32,
}

/// The model name that a target gets.
#[derive(Clone, Debug)]
pub(crate) enum Sent {
    /// The client's model name, or none if the client sent none.
    AsIs,
    /// A fixed name, whatever the client sent.
    Fixed {
        /// The name as JSON text for the splice.
        text: ModelText,
        /// [`model_key`] of the name.
        key: u64,
        /// A hash of the name, the same in every process.
        identity: u64,
        /// The name.
        name: Arc<str>,
    },
    /// The client's name with its first `cut` bytes replaced by `stem`.
    Rest {
        /// Bytes that are removed.
        cut: usize,
        /// Text that replaces them.
        stem: Box<str>,
    },
}

/// The targets for one model, one prefix, or requests without a model. Never empty.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    /// In the order of the configuration.
    pub targets: Box<[Target]>,
}

/// A model that `/v1/models` lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// The public name.
    pub name: Box<str>,
    /// The first backend that serves it; `None`: a named route.
    pub owner: Option<BackendId>,
}

/// All routes of a configuration.
#[derive(Debug, Default)]
pub(crate) struct Table {
    routes: Vec<Route>,
    exact: HashMap<Arc<str>, RouteId>,
    /// The names of `exact`, by route.
    names: Vec<Option<Arc<str>>>,
    prefixes: HashMap<Box<[u8]>, RouteId>,
    /// The lengths of `prefixes`, longest first.
    lengths: Vec<usize>,
    /// For names without a route of their own: the backends that take any model.
    any_model: Option<RouteId>,
    /// For requests that name no model.
    unnamed: Option<RouteId>,
    /// The named route [`CATCH_ALL`].
    catch_all: Option<RouteId>,
    /// For requests that have nothing to do with a model: all backends.
    any_backend: Option<RouteId>,
    listed: Vec<Listed>,
    models: Vec<ConfiguredModel>,
}

/// A model that the configuration names, at one of its backends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ConfiguredModel {
    /// The backend.
    pub backend: BackendId,
    /// The name that the backend is sent.
    pub name: Box<str>,
    /// The [`Target::key`] of the model.
    pub key: u64,
}

impl Target {
    /// Returns the model that replaces `asked` in the body for this target; `None`: the body's model stays.
    pub(crate) fn text(&self, asked: Option<&str>) -> Option<Cow<'_, ModelText>> {
        match &self.sent {
            Sent::AsIs => None,
            Sent::Fixed { text, .. } => Some(Cow::Borrowed(text)),
            Sent::Rest { .. } => Some(Cow::Owned(ModelText::new(&self.rest(asked)))),
        }
    }

    /// Returns the name of the model that [`text`](Self::text) writes.
    pub(crate) fn replacement(&self, asked: Option<&str>) -> Option<Cow<'_, str>> {
        match &self.sent {
            Sent::AsIs => None,
            Sent::Fixed { name, .. } => Some(Cow::Borrowed(name)),
            Sent::Rest { .. } => Some(Cow::Owned(self.rest(asked))),
        }
    }

    /// Returns [`model_key`] of the name that this target gets for `asked`; 0 if it gets none.
    pub(crate) fn key(&self, asked: Option<&str>) -> u64 {
        match &self.sent {
            Sent::AsIs => asked.map_or(0, model_key),
            Sent::Fixed { key, .. } => *key,
            Sent::Rest { .. } => model_key(&self.rest(asked)),
        }
    }

    /// [`name`](Self::name), shared.
    pub(crate) fn model(&self, asked: Option<&Arc<str>>) -> Option<Arc<str>> {
        match &self.sent {
            Sent::AsIs => asked.cloned(),
            Sent::Fixed { name, .. } => Some(name.clone()),
            Sent::Rest { .. } => Some(self.rest(asked.map(|name| &**name)).into()),
        }
    }

    /// The name that this target gets for `asked`; `None` if it gets none.
    pub(crate) fn name<'t>(&'t self, asked: Option<&'t str>) -> Option<Cow<'t, str>> {
        match &self.sent {
            Sent::AsIs => asked.map(Cow::Borrowed),
            Sent::Fixed { name, .. } => Some(Cow::Borrowed(name)),
            Sent::Rest { .. } => Some(self.rest(asked).into()),
        }
    }

    /// The client's name with its prefix replaced.
    fn rest(&self, asked: Option<&str>) -> String {
        match (&self.sent, asked) {
            (Sent::Rest { cut, stem }, Some(asked)) => [stem, asked.get(*cut..).unwrap_or_default()].concat(),
            _ => String::new(),
        }
    }
}

/// Seed of the hash of a model's name, so that it differs from the hash of a backend with the same name.
const MODEL_SEED: u64 = 1;

impl Sent {
    fn fixed(name: &str) -> Self {
        Sent::Fixed {
            text: ModelText::new(name),
            key: model_key(name),
            identity: xxh64(name.as_bytes(), MODEL_SEED),
            name: name.into(),
        }
    }
}

impl Table {
    /// Computes the routes of `backends` (by index) and of the `named` routes.
    pub(crate) fn new(backends: &[Serves], named: &[Named]) -> Self {
        let mut table = Table::default();
        for route in named {
            let id =
                table.add(route.targets.iter().filter_map(|t| named_target(t, backends.get(t.backend)?)));
            if route.name == CATCH_ALL {
                table.catch_all = id;
            } else if let Some(id) = id {
                table.exact.insert(route.name.as_str().into(), id);
                table.listed.push(Listed { name: route.name.as_str().into(), owner: None });
            }
        }
        for (backend, name) in exact_names(backends) {
            if !table.exact.contains_key(name)
                && let Some(id) = table.add_shared(backends, |b| sent_for(b, name))
            {
                table.exact.insert(name.into(), id);
                table.listed.push(Listed { name: name.into(), owner: Some(backend) });
            }
        }
        for stem in prefixes(backends) {
            if !table.prefixes.contains_key(stem.as_bytes())
                && let Some(id) = table.add_shared(backends, |b| sent_under(b, stem))
            {
                table.prefixes.insert(stem.as_bytes().into(), id);
                table.lengths.push(stem.len());
            }
        }
        table.lengths.sort_unstable_by(|a, b| b.cmp(a));
        table.lengths.dedup();
        table.models = table.configured_models();
        table.any_model = table.add_shared(backends, |b| b.models.is_none().then_some(Sent::AsIs));
        table.unnamed = table.add_shared(backends, |b| match (&b.default_model, &b.models) {
            (Some(name), _) => Some(Sent::fixed(name)),
            (None, None) => Some(Sent::AsIs),
            (None, Some(_)) => None,
        });
        // A drained backend still has what it has stored.
        let drained = |b: &Serves| Serves { weight: b.weight.max(1), ..b.clone() };
        let all: Vec<_> = backends.iter().map(drained).collect();
        table.any_backend = table.add_shared(&all, |_| Some(Sent::AsIs));
        table.names = vec![None; table.routes.len()];
        for (name, id) in &table.exact {
            table.names[*id] = Some(name.clone());
        }
        table
    }

    /// Returns the route for a model's name, or for a request without one. `whole`: the name was not truncated.
    pub(crate) fn find(&self, name: Option<&str>, whole: bool) -> Option<RouteId> {
        let Some(name) = name else { return self.unnamed };
        let exact = || self.exact.get(name).copied();
        let prefix = || {
            let at = |length: &usize| self.prefixes.get(name.as_bytes().get(..*length)?).copied();
            self.lengths.iter().find_map(at)
        };
        let known = if whole { exact().or_else(prefix) } else { None };
        known.or(self.any_model).or(self.catch_all)
    }

    /// Returns the route to all backends, for requests that have nothing to do with a model.
    pub(crate) fn any_backend(&self) -> Option<RouteId> {
        self.any_backend
    }

    /// Returns a route by its index.
    pub(crate) fn route(&self, id: RouteId) -> &Route {
        &self.routes[id]
    }

    /// Whether a route is for one name or prefix, and not a fallback for names without a route, or for no name.
    pub(crate) fn is_by_name(&self, id: RouteId) -> bool {
        ![self.any_model, self.unnamed, self.catch_all, self.any_backend].contains(&Some(id))
    }

    /// Returns all routes, by index.
    pub(crate) fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// Returns the models that `/v1/models` lists, each name once.
    pub(crate) fn listed(&self) -> &[Listed] {
        &self.listed
    }

    /// Returns up to three listed names similar to `name`, only those for which `may` returns `true`.
    pub(crate) fn near(&self, name: &str, may: impl Fn(&str) -> bool) -> Vec<&str> {
        nearest(name, self.listed.iter().map(|l| &*l.name).filter(|name| may(name)), 3)
    }

    /// Returns `name` as the configuration knows it; `None` if it does not.
    pub(crate) fn known_name(&self, name: &str) -> Option<&Arc<str>> {
        self.exact.get_key_value(name).map(|(name, _)| name)
    }

    /// Returns the name of a route for one name; `None` for any other route.
    pub(crate) fn name_of(&self, id: RouteId) -> Option<&Arc<str>> {
        self.names.get(id)?.as_ref()
    }

    /// The models that the configuration names, by backend.
    pub(crate) fn models(&self) -> &[ConfiguredModel] {
        &self.models
    }

    /// Collects the models of the routes for exact names.
    fn configured_models(&self) -> Vec<ConfiguredModel> {
        let of_route = |(public, route): (&str, &RouteId)| {
            let model = |target: &Target| ConfiguredModel {
                backend: target.backend,
                name: match &target.sent {
                    Sent::Fixed { name, .. } => (&**name).into(),
                    Sent::AsIs => public.into(),
                    Sent::Rest { .. } => target.rest(Some(public)).into(),
                },
                key: target.key(Some(public)),
            };
            self.routes[*route].targets.iter().map(model).collect::<Vec<_>>()
        };
        let mut models: Vec<_> =
            self.exact.iter().map(|(public, route)| (&**public, route)).flat_map(of_route).collect();
        models.sort_unstable();
        models.dedup();
        models
    }

    fn add(&mut self, targets: impl Iterator<Item = Target>) -> Option<RouteId> {
        let targets: Box<[Target]> = targets.collect();
        if targets.is_empty() {
            return None;
        }
        self.routes.push(Route { targets });
        Some(self.routes.len() - 1)
    }

    /// Adds a route over all backends for which `sent` returns a name.
    fn add_shared(&mut self, backends: &[Serves], sent: impl Fn(&Serves) -> Option<Sent>) -> Option<RouteId> {
        let target = |(backend, b): (BackendId, &Serves)| {
            Some(Target { backend, sent: sent(b)?, weight: b.weight, priority: b.priority })
        };
        self.add(backends.iter().enumerate().filter_map(target))
    }
}

fn named_target(target: &NamedTarget, backend: &Serves) -> Option<Target> {
    Some(Target {
        backend: target.backend,
        sent: target.model.as_deref().map_or(Sent::AsIs, Sent::fixed),
        weight: if backend.weight == 0 { 0 } else { target.weight.unwrap_or(backend.weight) },
        priority: target.priority.unwrap_or(backend.priority),
    })
}

/// Returns all exact names that backends serve, each with its backend. A default model is an exact name, even if it
/// is not in the backend's `models`.
fn exact_names(backends: &[Serves]) -> impl Iterator<Item = (BackendId, &str)> {
    backends.iter().enumerate().flat_map(|(id, b)| {
        let rules = b.models.iter().flatten().filter(|r| !r.public.is_prefix()).map(|r| r.public.stem());
        rules.chain(b.default_model.as_deref()).map(move |name| (id, name))
    })
}

fn prefixes(backends: &[Serves]) -> impl Iterator<Item = &str> {
    backends
        .iter()
        .flat_map(|b| b.models.iter().flatten())
        .filter(|r| r.public.is_prefix())
        .map(|r| r.public.stem())
}

/// Returns the model that a backend gets for `name`, by the first that applies: the backend takes any model, an exact
/// rule, its longest prefix, its default model. `None` if it does not serve `name`.
fn sent_for(backend: &Serves, name: &str) -> Option<Sent> {
    let Some(rules) = &backend.models else { return Some(Sent::AsIs) };
    let exact = rules.iter().find(|r| !r.public.is_prefix() && r.public.matches(name));
    if let Some(rule) = exact {
        return Some(rule.own.as_deref().map_or(Sent::AsIs, Sent::fixed));
    }
    let is_default = || (backend.default_model.as_deref() == Some(name)).then_some(Sent::AsIs);
    sent_under(backend, name).or_else(is_default)
}

/// Returns the model that a backend gets for names that begin with `stem` and match no longer prefix.
fn sent_under(backend: &Serves, stem: &str) -> Option<Sent> {
    let Some(rules) = &backend.models else { return Some(Sent::AsIs) };
    let fitting = rules.iter().filter(|r| r.public.is_prefix() && stem.starts_with(r.public.stem()));
    let rule = fitting.max_by_key(|r| r.public.stem().len())?;
    Some(match rule.own.as_deref() {
        None => Sent::AsIs,
        Some(own) => match own.strip_suffix('*') {
            Some(head) => Sent::Rest { cut: rule.public.stem().len(), stem: head.into() },
            None => Sent::fixed(own),
        },
    })
}

/// A hash of a model's name, the key of its cool-down.
pub(crate) fn model_key(name: &str) -> u64 {
    xxh64(name.as_bytes(), 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules(models: &[(&str, &str)]) -> Option<Vec<Rule>> {
        let rule = |(public, own): &(&str, &str)| Rule {
            public: Pattern::parse(public).unwrap(),
            own: Some(*own).filter(|own| !own.is_empty()).map(Into::into),
        };
        Some(models.iter().map(rule).collect())
    }

    fn serves(models: Option<Vec<Rule>>, default: &str) -> Serves {
        let default_model = Some(default).filter(|d| !d.is_empty()).map(str::to_owned);
        Serves { models, default_model, weight: 1, priority: 0 }
    }

    /// The targets for `name` as text: each backend and the model that it gets, such as `0:own 2:`.
    fn targets_for(table: &Table, name: Option<&str>) -> String {
        let Some(id) = table.find(name, true) else { return "none".to_owned() };
        let show = |t: &Target| {
            let text = t.text(name);
            let first = crate::json::patch::splices(
                &crate::json::members::Fields { members: 1, ..Default::default() },
                text.as_deref(),
                |_| false,
            )
            .next();
            let sent = first.map_or(String::new(), |s| {
                String::from_utf8_lossy(&s.insert)
                    .trim_start_matches("\"model\":")
                    .trim_matches(['"', ','])
                    .to_owned()
            });
            assert_eq!(
                t.key(name),
                match (&*sent, name) {
                    ("", None) => 0,
                    ("", Some(name)) => model_key(name),
                    (sent, _) => model_key(sent),
                }
            );
            format!("{}:{sent}", t.backend)
        };
        table.route(id).targets.iter().map(show).collect::<Vec<_>>().join(" ")
    }

    fn fleet() -> Table {
        let backends = [
            serves(rules(&[("llama-8b", ""), ("llama-70*", "")]), "llama-8b"),
            serves(rules(&[("llama-8b", "llama3:8b"), ("lla*", "any"), ("llama-70b-*", "l70/*")]), ""),
            serves(None, ""),
            serves(None, "own-default"),
        ];
        let target = |backend, model: &str| NamedTarget {
            backend,
            model: Some(model.to_owned()),
            weight: Some(3),
            priority: Some(backend as u32),
        };
        let named = [
            Named { name: "smart".into(), targets: vec![target(2, "gpt"), target(0, "x"), target(0, "y")] },
            Named { name: "llama-8b".into(), targets: vec![target(3, "hidden")] },
        ];
        Table::new(&backends, &named)
    }

    #[test]
    fn a_name_goes_to_all_its_backends_under_their_own_names() {
        let table = fleet();
        for (name, want) in [
            (Some("llama-8b"), "3:hidden"),
            (Some("smart"), "2:gpt 0:x 0:y"),
            (Some("llama-70b-x"), "0: 1:l70/x 2: 3:"),
            (Some("llama-70b-"), "0: 1:l70/ 2: 3:"),
            (Some("llama-70"), "0: 1:any 2: 3:"),
            (Some("llama-7"), "1:any 2: 3:"),
            (Some("lla"), "1:any 2: 3:"),
            (Some("gpt-4o"), "2: 3:"),
            (Some("own-default"), "2: 3:"),
            (None, "0:llama-8b 2: 3:own-default"),
        ] {
            assert_eq!(targets_for(&table, name), want, "{name:?}");
        }
    }

    #[test]
    fn a_name_has_no_route_if_no_backend_takes_any_model() {
        let only = [serves(rules(&[("a", ""), ("b*", "")]), ""), serves(rules(&[("c", "")]), "d")];
        let table = Table::new(&only, &[]);
        for (name, want) in
            [(Some("a"), "0:"), (Some("bb"), "0:"), (Some("d"), "1:"), (Some("e"), "none"), (None, "1:d")]
        {
            assert_eq!(targets_for(&table, name), want, "{name:?}");
        }
        assert_eq!(table.find(Some("a"), false), None, "a truncated name has no route");
        assert_eq!(table.near("aa", |_| true), ["a"]);
        assert_eq!(Table::new(&only[..1], &[]).find(None, true), None);
        let catch = Named {
            name: CATCH_ALL.into(),
            targets: vec![NamedTarget { backend: 1, model: None, weight: None, priority: None }],
        };
        let table = Table::new(&only, &[catch]);
        assert_eq!(targets_for(&table, Some("e")), "1:");
        assert_eq!(targets_for(&table, None), "1:d", "the catch-all route is only for requests with a model");
    }

    #[test]
    fn lists_each_name_once_with_its_first_backend() {
        let names: Vec<_> = fleet().listed().iter().map(|l| (l.name.to_string(), l.owner)).collect();
        let want = [("smart", None), ("llama-8b", None), ("own-default", Some(3))];
        assert_eq!(names, want.map(|(name, owner)| (name.to_owned(), owner)));
    }

    #[test]
    fn a_target_inherits_weight_and_priority_from_its_backend() {
        let mut backends = [serves(None, ""), serves(None, "")];
        backends[0].priority = 7;
        backends[1].weight = 0;
        let target = |backend, weight, priority| NamedTarget { backend, model: None, weight, priority };
        let named = Named {
            name: "n".into(),
            targets: vec![target(0, None, None), target(0, Some(5), Some(2)), target(1, Some(5), None)],
        };
        let table = Table::new(&backends, &[named]);
        let targets = &table.route(table.find(Some("n"), true).unwrap()).targets;
        let got: Vec<_> = targets.iter().map(|t| (t.weight, t.priority)).collect();
        assert_eq!(got, [(1, 7), (5, 2), (0, 0)], "a drained backend is drained in all routes");
    }

    proptest! {
        /// The precomputed table gives the same targets as a search over all backends.
        #[test]
        fn the_table_agrees_with_a_search_over_all_backends(
            fleet in prop::collection::vec(prop::option::of(prop::collection::vec(("[ab]{0,3}\\*?", "([xy]{1,2}\\*?)?"), 1..4)), 1..5),
            name in "[ab]{1,4}",
        ) {
            let read = |models: &Option<Vec<(String, String)>>| models.as_ref().map(|models| {
                models.iter().filter_map(|(public, own)| {
                    let public = Pattern::parse(public)?;
                    let own = if public.is_prefix() { own.clone() } else { own.replace('*', "") };
                    let own = Some(own).filter(|o| !o.is_empty()).map(Into::into);
                    Some(Rule { public, own })
                }).collect::<Vec<_>>()
            });
            let backends: Vec<_> = fleet.iter().map(|models| serves(read(models), "")).collect();
            let table = Table::new(&backends, &[]);
            let naive = backends.iter().enumerate().filter_map(|(id, b)| {
                let sent = match &b.models {
                    None => String::new(),
                    Some(rules) => {
                        let fitting = rules.iter().filter(|r| r.public.matches(&name));
                        // Exact before prefix, a long prefix before a short one; of equal exact rules the first.
                        let rank = |r: &Rule| if r.public.is_prefix() { r.public.stem().len() } else { usize::MAX };
                        let best = fitting.clone().map(rank).max()?;
                        let mut equals = fitting.filter(|r| rank(r) == best);
                        let rule = if best == usize::MAX { equals.next()? } else { equals.next_back()? };
                        match rule.own.as_deref() {
                            None => String::new(),
                            Some(own) => match own.strip_suffix('*') {
                                Some(head) => format!("{head}{}", &name[rule.public.stem().len()..]),
                                None => own.to_owned(),
                            },
                        }
                    }
                };
                Some(format!("{id}:{sent}"))
            }).collect::<Vec<_>>().join(" ");
            let naive = if naive.is_empty() { "none".to_owned() } else { naive };
            prop_assert_eq!(targets_for(&table, Some(&name)), naive);
        }
    }
}
