//! What requests are routed by and does not change before a reload: routes, sets of targets, and the members of a body
//! that the scanner must find.

use std::collections::HashMap;
use std::sync::Arc;

use crate::config::{Config, Strategy, scale};
use crate::json::members::Watch;
use crate::policy::balance::Cursor;
use crate::policy::route::{Named, NamedTarget, RouteId, Serves, Table};
use crate::protocol::Endpoint;
use crate::protocol::request_limits;
use crate::protocol::stored;
use crate::protocol::usage_request::STREAM_OPTIONS;
use crate::upstream::Upstream;
use crate::upstream::rotation::TargetSet;

/// The part of a snapshot that depends on the configuration only.
#[derive(Debug)]
pub(super) struct Routing {
    /// The routes.
    pub(super) table: Table,
    /// The members of a request body that the scanner must find.
    pub(super) watch: Watch,
    /// The same, and those that refer to what a provider has stored.
    pub(super) watch_stored: Watch,
    /// Whether anything is limited by tokens or money.
    pub(super) limits_tokens: bool,
    /// Whether a request may have to reserve something of its client's limits, or is too large for a backend's.
    pub(super) limits_clients: bool,
    /// `drops[backend][index]`: whether member `index` of a watch is not sent to the backend.
    pub(super) drops: Box<[Box<[bool]>]>,
    /// The distinct sets of targets.
    pub(super) sets: Vec<TargetSet>,
    /// The class of each endpoint: endpoints of one class are served by the same backends.
    pub(super) class_of: [usize; Endpoint::COUNT],
    /// For each route, and each class of endpoints: the index of its set.
    pub(super) set_of: Vec<Box<[usize]>>,
    /// For each route and each index of a schedule: a cursor for each endpoint. Endpoints that share a cursor would
    /// skip targets.
    pub(super) cursors: Vec<Box<[EndpointCursors]>>,
}

pub(super) type EndpointCursors = [Cursor; Endpoint::COUNT];

impl Routing {
    /// Creates the routing. The cursors of `before`, whose backends have the same names, are kept for equal routes.
    pub(super) fn new(config: &Config, backends: &[Arc<Upstream>], before: Option<&Routing>) -> Self {
        let scale = scale(&config.backends);
        let serves = |b: &crate::config::Backend| Serves {
            models: b.models.clone(),
            default_model: b.default_model.clone(),
            weight: b.share(b.weight, scale),
            priority: b.priority,
        };
        let share = |target: &NamedTarget| {
            let weight = target.weight.map(|weight| config.backends[target.backend].share(weight, scale));
            NamedTarget { weight, ..target.clone() }
        };
        let named =
            |route: &Named| Named { targets: route.targets.iter().map(share).collect(), ..route.clone() };
        let table = Table::new(
            &config.backends.iter().map(serves).collect::<Vec<_>>(),
            &config.routes.iter().map(named).collect::<Vec<_>>(),
        );
        let mut droppable: Vec<Box<str>> =
            config.backends.iter().flat_map(|b| b.drop_fields.iter().cloned()).collect();
        if backends.iter().any(|b| b.asks_for_usage()) {
            droppable.push(STREAM_OPTIONS.into());
        }
        let limits_tokens = config.limits_tokens();
        if limits_tokens {
            droppable.extend(request_limits::members().map(Into::into));
        }
        droppable.sort_unstable();
        droppable.dedup();
        // The index of a member is the same in both lists.
        let mut and_stored = droppable.clone();
        let further =
            stored::MEMBERS.into_iter().filter(|name| !droppable.iter().any(|known| **known == **name));
        and_stored.extend(further.map(Into::into));
        let drops =
            config.backends.iter().map(|b| and_stored.iter().map(|d| b.drop_fields.contains(d)).collect());
        let drops = drops.collect();
        let affinity = config.strategy == Strategy::PrefixHash;
        let watch = Watch { affinity, droppable };
        let watch_stored = Watch { affinity, droppable: and_stored };
        let mut known = HashMap::new();
        let mut sets = Vec::new();
        let mut intern = |set: TargetSet| {
            *known.entry(set).or_insert_with_key(|set| {
                sets.push(set.clone());
                sets.len() - 1
            })
        };
        let (class_of, classes) = classes(backends);
        let sets_of_route = |route| {
            classes
                .iter()
                .map(|serves| {
                    intern(TargetSet::new(route, |t| serves[t.backend], |id| backends[id].pool(id)))
                })
                .collect()
        };
        let set_of = table.routes().iter().map(sets_of_route).collect();
        let limits_clients =
            limits_tokens || config.clients.iter().any(|client| client.max_in_flight.is_some());
        let cursors = Vec::new();
        let mut routing = Routing {
            table,
            watch,
            watch_stored,
            limits_tokens,
            limits_clients,
            drops,
            sets,
            class_of,
            set_of,
            cursors,
        };
        let cursors = |route: RouteId| {
            let counts = routing.set_of[route].iter().map(|set| routing.sets[*set].schedule_count());
            let known = before.filter(|b| {
                Endpoint::ALL.iter().all(|endpoint| b.set(route, *endpoint) == routing.set(route, *endpoint))
            });
            let cursor = |index: usize, endpoint: usize| {
                let resumed = known.map(|b| Cursor::resumed(&b.cursors[route][index][endpoint]));
                let start = if routing.table.is_by_name(route) { route + endpoint } else { endpoint };
                resumed.unwrap_or_else(|| Cursor::starting_at(start as u64))
            };
            (0..counts.max().unwrap_or(0))
                .map(|index| std::array::from_fn(|endpoint| cursor(index, endpoint)))
                .collect()
        };
        routing.cursors = (0..routing.set_of.len()).map(cursors).collect();
        routing
    }

    /// The targets of a route for an endpoint; `None` if there is no such route.
    fn set(&self, route: RouteId, endpoint: Endpoint) -> Option<&TargetSet> {
        Some(&self.sets[self.set_of.get(route)?[self.class_of[endpoint as usize]]])
    }
}

/// The class of each endpoint, and for each class which backends serve its endpoints. Endpoints that no backend ever
/// serves are in the first class.
fn classes(backends: &[Arc<Upstream>]) -> ([usize; Endpoint::COUNT], Vec<Vec<bool>>) {
    let mut classes = Vec::new();
    let mut class_of = [0; Endpoint::COUNT];
    for endpoint in Endpoint::ALL.into_iter().filter(|endpoint| endpoint.api().is_some()) {
        let serves: Vec<bool> = backends.iter().map(|b| b.serves(endpoint)).collect();
        class_of[endpoint as usize] =
            classes.iter().position(|known| *known == serves).unwrap_or(classes.len());
        if class_of[endpoint as usize] == classes.len() {
            classes.push(serves);
        }
    }
    (class_of, classes)
}
