//! A snapshot of the fleet: backends, routes, and the schedules of the targets that are up.
//!
//! All snapshots of one configuration share the routes. The schedules depend on the state of the backends, and are
//! rebuilt when that changes. So a pick by round robin costs the same for two targets and for two hundred.

use std::sync::Arc;

use crate::clock;
use crate::config;
use crate::config::{Config, Queue, Strategy};
use crate::json::members::Watch;
use crate::policy::balance::{BackendId, Schedule, mix, rendezvous};
use crate::policy::breaker::{Status, Thresholds};
use crate::policy::choose;
use crate::policy::choose::{Closed, Fleet, Rotation, TargetLoad};
use crate::policy::known_ids::MadeBy;
use crate::policy::latency::{Expected, SizeClass};
use crate::policy::queue::Turn;
use crate::policy::ratio::Demand;
use crate::policy::route::{Route, RouteId, Sent, Table, Target, TargetId};
use crate::protocol::Endpoint;
use crate::protocol::endpoint::{Api, Protocol};
use crate::time::Nanos;
use crate::upstream::account;
use crate::upstream::connect::Roots;
use crate::upstream::in_flight::QuotaWait;
use crate::upstream::limits::Candidate;
use crate::upstream::rotation::{RotationSet, TargetSet};
use crate::upstream::routing::Routing;
use crate::upstream::{BackendShare, Upstream};

/// A load that is above that of every backend in use: such a target is asked last.
const LAST: f64 = 1e12;

/// The fleet and its configuration. It is replaced as a whole.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// The configuration.
    pub config: Arc<Config>,
    /// All backends, also those with weight 0.
    pub backends: Arc<[Arc<Upstream>]>,
    routing: Arc<Routing>,
    /// The schedules of each [`TargetSet`].
    rotations: Box<[RotationSet]>,
}

/// The facts about a request on which the choice of a target depends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask<'a> {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The route of its model.
    pub route: RouteId,
    /// The model in the request, if it has one.
    pub model: Option<&'a str>,
    /// A hash of the prefix of the conversation.
    pub affinity: Option<u64>,
    /// What the request may use.
    pub demand: Demand,
    /// The backend that made what the request refers to.
    pub made_by: MadeBy,
    /// Whose turn it is while requests wait.
    pub turn: Turn,
    /// Under `least_latency`: a random number, and the class of the request by its size.
    pub by_latency: Option<(u64, SizeClass)>,
}

/// The targets of one request at one moment, as [`choose`] and [`dispatch`](crate::policy::dispatch) see them.
pub(crate) struct View<'a> {
    /// The fleet.
    pub snapshot: &'a Snapshot,
    /// The request.
    pub ask: &'a Ask<'a>,
    /// The time.
    pub now: Nanos,
    /// The request's places in the queues of quotas.
    pub tickets: &'a [(BackendId, QuotaWait)],
    /// The first backend of the [pool](Snapshot::pool) whose permit the request has waited for and now holds.
    pub granted: Option<BackendId>,
    /// Whether the request has begun to wait for busy targets.
    pub is_waiting: bool,
}

/// Why a target was passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passed {
    /// The target cannot take the request now.
    Closed(Closed),
    /// The target has more than its share of the load.
    Load,
    /// The request has tried the target already.
    Tried,
}

impl Snapshot {
    /// Creates the first snapshot of a configuration. The cursors of `before` are kept if the backends have the same
    /// names.
    pub(crate) fn new(
        config: Arc<Config>,
        backends: Arc<[Arc<Upstream>]>,
        before: Option<&Snapshot>,
    ) -> Self {
        let same_names =
            |b: &&Snapshot| b.backends.iter().map(|u| u.name()).eq(backends.iter().map(|u| u.name()));
        let routing = Routing::new(&config, &backends, before.filter(same_names).map(|b| &*b.routing));
        Self::with_schedules_of(config, backends, Arc::new(routing), &[])
    }

    /// Creates a snapshot of the same fleet with schedules for the present state.
    pub(crate) fn rebuilt(&self) -> Self {
        let Snapshot { config, backends, routing, rotations } = self;
        Self::with_schedules_of(config.clone(), backends.clone(), routing.clone(), rotations)
    }

    fn with_schedules_of(
        config: Arc<Config>,
        backends: Arc<[Arc<Upstream>]>,
        routing: Arc<Routing>,
        before: &[RotationSet],
    ) -> Self {
        let now = clock::now();
        let schedules = |(i, set): (usize, &TargetSet)| RotationSet::new(set, &backends, now, before.get(i));
        let rotations = routing.sets.iter().enumerate().map(schedules).collect();
        Snapshot { config, backends, routing, rotations }
    }

    /// Whether both snapshots have the same configuration. If so, ids of one are valid in the other.
    pub(crate) fn has_same_ids(&self, other: &Snapshot) -> bool {
        Arc::ptr_eq(&self.routing, &other.routing)
    }

    /// All routes.
    pub(crate) fn table(&self) -> &Table {
        &self.routing.table
    }

    /// The route of an [`Ask`].
    pub(crate) fn route(&self, ask: &Ask<'_>) -> &Route {
        self.routing.table.route(ask.route)
    }

    /// The targets that may serve an [`Ask`], up or not.
    pub(crate) fn targets<'s>(&'s self, ask: &Ask<'_>) -> impl Iterator<Item = &'s Target> + use<'s> {
        let targets = &self.route(ask).targets;
        self.rotations_of(ask).all.members().iter().map(move |(id, _)| &targets[*id])
    }

    /// The members of the body of a request to `api` that the scanner must find.
    pub(crate) fn watch(&self, api: &Api) -> &Watch {
        if api.is_stored { &self.routing.watch_stored } else { &self.routing.watch }
    }

    /// Whether anything is limited by tokens or money.
    pub(crate) fn limits_tokens(&self) -> bool {
        self.routing.limits_tokens
    }

    /// Whether a request may have to reserve something of its client's limits, or is too large for a backend's.
    pub(crate) fn limits_clients(&self) -> bool {
        self.routing.limits_clients
    }

    /// Whether a backend does not accept a member, given by its index in [`watch`](Self::watch).
    pub(crate) fn drops(&self, backend: BackendId, member: usize) -> bool {
        self.routing.drops[backend][member]
    }

    /// The backend of a target.
    pub(crate) fn upstream(&self, target: &Target) -> &Arc<Upstream> {
        &self.backends[target.backend]
    }

    /// The first of the backends that are one backend with several keys; `backend` itself if it has one key.
    pub(crate) fn pool(&self, backend: BackendId) -> BackendId {
        self.backends[backend].pool(backend)
    }

    /// Whether a target of a route speaks a protocol, though it may be drained or down.
    pub(crate) fn speaks(&self, route: RouteId, protocol: Protocol) -> bool {
        let targets = &self.routing.table.route(route).targets;
        targets.iter().any(|target| self.upstream(target).conf.protocols.contains(&protocol))
    }

    /// The numbers of failures and successes that change a backend's state.
    pub(crate) fn thresholds(&self) -> Thresholds {
        let health = &self.config.health;
        Thresholds {
            interval: clock::nanos(health.interval),
            failures: health.failure_threshold,
            successes: health.success_threshold,
        }
    }

    /// Checks whether a target can take a request at `now`.
    ///
    /// # Errors
    /// Returns the reason if the target cannot.
    pub(crate) fn check(&self, now: Nanos, ask: &Ask<'_>, target: TargetId) -> Result<(), Closed> {
        let t = &self.route(ask).targets[target];
        self.check_made_by(ask, t)?;
        self.upstream(t).check(&Candidate {
            target: Some((t, ask.model)),
            demand: &ask.demand,
            now,
            ticket: None,
            turn: ask.turn,
        })
    }

    /// Checks whether a target made what the request refers to, as far as that is known.
    fn check_made_by(&self, ask: &Ask<'_>, target: &Target) -> Result<(), Closed> {
        match ask.made_by {
            MadeBy::Backend(id) if self.upstream(target).state.id != id => Err(Closed::Elsewhere),
            MadeBy::Anybody | MadeBy::Backend(_) | MadeBy::Unknown => Ok(()),
        }
    }

    /// The targets that were passed over for `chosen`: targets of the same or a lower priority value that cannot take
    /// the request, and with affinity those that come first by hash. Without `chosen`, all that cannot take the
    /// request.
    pub(crate) fn passed(
        &self,
        now: Nanos,
        ask: &Ask<'_>,
        tried: &[TargetId],
        chosen: Option<TargetId>,
    ) -> impl Iterator<Item = (&Arc<Upstream>, Passed)> {
        let targets = &self.route(ask).targets;
        let last = chosen.map_or(u32::MAX, |id| targets[id].priority);
        let rank =
            |id: TargetId| rendezvous(ask.affinity.unwrap_or(0), self.identity(ask, id), targets[id].weight);
        let by_hash = self.config.strategy == Strategy::PrefixHash && ask.affinity.is_some();
        let home = chosen.filter(|_| by_hash).map(|id| (rank(id), targets[id].priority));
        self.rotations_of(ask).all.members().iter().filter_map(move |(id, _)| {
            let t = &targets[*id];
            if chosen == Some(*id) || t.priority > last {
                return None;
            }
            let passed = match self.check(now, ask, *id) {
                _ if tried.contains(id) => Passed::Tried,
                Err(closed) => Passed::Closed(closed),
                Ok(()) if home.is_some_and(|(r, p)| p == t.priority && rank(*id) > r) => Passed::Load,
                Ok(()) => return None,
            };
            Some((self.upstream(t), passed))
        })
    }

    fn rotations_of(&self, ask: &Ask<'_>) -> &RotationSet {
        &self.rotations[self.routing.set_of[ask.route][self.routing.class_of[ask.endpoint as usize]]]
    }

    /// A schedule, with the cursor of its `index` for the route and the endpoint of `ask`.
    fn rotation<'s>(&'s self, ask: &Ask<'_>, schedule: &'s Schedule, index: usize) -> Rotation<'s> {
        Rotation { schedule, cursor: &self.routing.cursors[ask.route][index][ask.endpoint as usize] }
    }

    /// The hash that identifies a target for affinity, the same in every process. It covers the backend, and the model
    /// if the route fixes one.
    fn identity(&self, ask: &Ask<'_>, id: TargetId) -> u64 {
        let t = &self.route(ask).targets[id];
        let model = if let Sent::Fixed { identity, .. } = &t.sent { *identity } else { 0 };
        self.upstream(t).identity ^ model
    }
}

impl<'a> View<'a> {
    fn target(&self, id: TargetId) -> &'a Target {
        &self.snapshot.route(self.ask).targets[id]
    }

    fn upstream(&self, id: TargetId) -> &'a Arc<Upstream> {
        self.snapshot.upstream(self.target(id))
    }

    /// The request as a candidate for a target.
    pub(crate) fn candidate(&self, id: TargetId) -> Candidate<'a> {
        let target = self.target(id);
        let ticket = self.tickets.iter().find(|(backend, _)| *backend == target.backend);
        Candidate {
            target: Some((target, self.ask.model)),
            demand: &self.ask.demand,
            now: self.now,
            ticket: ticket.and_then(|(_, wait)| wait.ticket()),
            turn: self.ask.turn,
        }
    }
}

impl Fleet for View<'_> {
    fn strategy(&self) -> choose::Choice {
        match (self.snapshot.config.strategy, self.ask.affinity) {
            (Strategy::PrefixHash, Some(key)) => choose::Choice::PrefixHash(key),
            (Strategy::LeastLoaded, _) => choose::Choice::LeastLoaded,
            (Strategy::LeastLatency, _) => {
                // Each try of a request draws anew.
                let random = self.ask.by_latency.map_or(self.now, |(random, _)| random);
                choose::Choice::LeastLatency(mix(random ^ self.now))
            }
            (Strategy::RoundRobin | Strategy::PrefixHash, _) => choose::Choice::RoundRobin,
        }
    }

    fn tier(&self, n: usize) -> Option<Rotation<'_>> {
        let schedule = self.snapshot.rotations_of(self.ask).tiers.get(n)?;
        Some(self.snapshot.rotation(self.ask, schedule, n))
    }

    fn all(&self) -> Rotation<'_> {
        let rotations = self.snapshot.rotations_of(self.ask);
        self.snapshot.rotation(self.ask, &rotations.all, rotations.tiers.len())
    }

    fn siblings(&self, target: TargetId) -> Option<Rotation<'_>> {
        let (schedule, index) = self.snapshot.rotations_of(self.ask).siblings[target].as_ref()?;
        Some(self.snapshot.rotation(self.ask, schedule, *index))
    }

    fn backend(&self, target: TargetId) -> BackendId {
        self.target(target).backend
    }

    fn pool(&self, target: TargetId) -> BackendId {
        self.snapshot.pool(self.backend(target))
    }

    fn weight(&self, target: TargetId) -> u32 {
        self.target(target).weight
    }

    fn identity(&self, target: TargetId) -> u64 {
        self.snapshot.identity(self.ask, target)
    }

    fn load(&self, target: TargetId) -> TargetLoad {
        let b = self.upstream(target);
        let (mut penalty, up_for) = (b.state.penalty.at(self.now), b.state.breaker.up_for(self.now));
        if b.state.breaker.status_of_backend(self.now) == Status::Misconfigured {
            penalty += LAST;
        }
        let in_flight = match &b.conf.pool {
            None => b.in_flight(),
            Some(pool) => {
                let keys = &self.snapshot.backends[pool.first..pool.first + pool.size as usize];
                keys.iter().map(|key| key.in_flight()).sum()
            }
        };
        TargetLoad { in_flight, penalty, up_for }
    }

    fn expected(&self, target: TargetId) -> Option<Expected> {
        let ((_, class), target) = (self.ask.by_latency?, self.target(target));
        self.snapshot.upstream(target).state.latencies.expect(target.key(self.ask.model), class)
    }

    fn check(&self, target: TargetId) -> Result<(), Closed> {
        let t = self.target(target);
        self.snapshot.check_made_by(self.ask, t)?;
        let (upstream, candidate) = (self.snapshot.upstream(t), self.candidate(target));
        match self.granted {
            Some(pool) if pool == self.pool(target) => upstream.check_with_permit(&candidate),
            _ => upstream.check(&candidate),
        }
    }

    fn check_ejected(&self, target: TargetId) -> Result<(), Closed> {
        self.snapshot.check_made_by(self.ask, self.target(target))?;
        self.upstream(target).check_ejected(&self.candidate(target))
    }

    fn trial(&self, target: TargetId) -> Option<Nanos> {
        self.upstream(target).trial(&self.candidate(target))
    }

    fn is_suspect(&self, target: TargetId) -> bool {
        let t = self.target(target);
        self.snapshot.upstream(t).state.breaker.pairs.is_suspect(|| t.key(self.ask.model))
    }

    fn granted(&self) -> Option<BackendId> {
        self.granted
    }

    fn is_waiting(&self) -> bool {
        self.is_waiting
    }
}

/// What each backend may have of the queue: with several, one that hangs must not take all slots.
pub(super) fn backend_share(config: &Config) -> BackendShare {
    let Queue { max_size: waiters, max_in_flight, backend_share, .. } = config.queue;
    // Several keys of one backend are one.
    let mut names = config.backends.iter().filter(|b| b.weight > 0).map(config::Backend::configured_name);
    let has_others = names.next().is_some_and(|first| names.any(|name| name != first));
    let slots = (max_in_flight as u64 * u64::from(backend_share) / 1_000_000).max(1) as usize;
    BackendShare { slots: (has_others && slots < max_in_flight).then_some(slots), waiters }
}

/// Prepares the fleet of a configuration. It shares state with the fleet `before`, which does not change. The function
/// reads certificates, so it may block.
///
/// # Errors
/// Returns a message for the operator for the first certificate or address that is invalid.
pub(crate) fn prepare(config: Config, before: Option<&Snapshot>) -> Result<Snapshot, String> {
    let mut config = config.with_a_backend_per_key();
    let roots = Roots::load(&config.backends);
    let needs_roots = |b: &config::Backend| b.url.https && b.ca_file.is_none();
    if roots.is_empty()
        && let Some(b) = config.backends.iter().find(|b| needs_roots(b))
    {
        config.warnings.push(format!(
            "the system has no root certificates, so TLS to backend {} will fail; install ca-certificates, or set ca_file",
            b.name
        ));
    }
    let earlier = before.into_iter().flat_map(|before| before.backends.iter()).map(|known| &**known);
    let share = backend_share(&config);
    let mut backends = Vec::<Arc<Upstream>>::new();
    for (id, b) in config.backends.iter().enumerate() {
        let conf = config::Backend { usage: config.usage_of(id), ..b.clone() };
        let known = account::earlier(b, &config, earlier.clone());
        let mut upstream = Upstream::new(conf, config.server.workers, &roots, share, known)?;
        match b.pool.as_ref().map(|pool| backends.get(pool.first)) {
            Some(Some(first)) => upstream.share_limits_of(first),
            // What requests with any key of the backend hold counts against its `max_in_flight`.
            Some(None) => {
                let is_same = |known: &&Upstream| {
                    known.configured_name() == b.configured_name() && known.conf.url == b.url
                };
                earlier.clone().find(is_same).into_iter().for_each(|known| upstream.keep_slots_of(known));
            }
            None => {}
        }
        backends.push(Arc::new(upstream));
    }
    Ok(Snapshot::new(Arc::new(config), backends.into(), before))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Backends `a`, `b`, `c`, and a route `two` to two models of `a`, where `big` has three times the weight of
    /// `small`, and to `b`.
    fn fleet(strategy: &str) -> Snapshot {
        let backend =
            |name: &str| format!("[[backends]]\nname = \"{name}\"\nurl = \"http://{name}\"\nweight = 4\n");
        let target = |backend: &str, model: &str, weight: u32| {
            format!("{{ backend = \"{backend}\", model = \"{model}\", weight = {weight} }}")
        };
        let text = [
            format!("[load_balancer]\nstrategy = \"{strategy}\"\n[health]\nfailure_threshold = 1\n"),
            format!(
                "[models.two]\ntargets = [{}, {}, {}]\n",
                target("a", "big", 3),
                target("a", "small", 1),
                target("b", "m", 4)
            ),
            ["a", "b", "c"].map(backend).concat(),
        ];
        let config = Config::of(&text.concat()).unwrap();
        prepare(config, None).unwrap()
    }

    fn ask<'a>(snapshot: &Snapshot, model: &'a str, affinity: Option<u64>) -> Ask<'a> {
        let route = snapshot.table().find(Some(model), true).unwrap();
        Ask {
            endpoint: Endpoint::Chat,
            route,
            model: Some(model),
            affinity,
            demand: Demand::default(),
            made_by: MadeBy::Anybody,
            turn: Turn::default(),
            by_latency: None,
        }
    }

    fn view<'a>(snapshot: &'a Snapshot, ask: &'a Ask<'a>) -> View<'a> {
        View { snapshot, ask, now: clock::now(), tickets: &[], granted: None, is_waiting: false }
    }

    #[test]
    fn no_conversation_finds_a_backend_and_a_model_of_one_name_the_same() {
        let backend =
            |name: &str| format!("[[backends]]\nname = \"{name}\"\nurl = \"http://{name}\"\nweight = 1\n");
        let route = "[models.two]\ntargets = [{ backend = \"x\", model = \"x\" }, { backend = \"y\", model = \"y\" }, { backend = \"x\", model = \"y\" }, { backend = \"y\", model = \"x\" }]\n";
        let text =
            ["[load_balancer]\nstrategy = \"prefix_hash\"\n", route, &backend("x"), &backend("y")].concat();
        let config = Config::of(&text).unwrap();
        let snapshot = prepare(config, None).unwrap();
        let mut picks = [0; 4];
        for n in 0..1000u64 {
            let two = ask(&snapshot, "two", Some(xxhash_rust::xxh64::xxh64(&n.to_le_bytes(), 0)));
            picks[choose::pick(&view(&snapshot, &two), true, |_| false).unwrap()] += 1;
        }
        assert!(picks.iter().all(|n| (200..=300).contains(n)), "{picks:?}");
    }

    #[test]
    fn a_model_that_cools_leaves_its_share_to_others_and_not_to_its_mate() {
        for strategy in ["round_robin", "least_loaded", "prefix_hash"] {
            let snapshot = fleet(strategy);
            let now = clock::now();
            let cooling = &snapshot.table().route(ask(&snapshot, "two", None).route).targets[0];
            snapshot.backends[0].state.breaker.pairs.cool(
                cooling.key(Some("two")),
                now + Nanos::MAX / 2,
                now,
            );
            let (mut held, mut picks) = (Vec::new(), [0; 3]);
            for n in 0..500 {
                let hash = xxhash_rust::xxh64::xxh64(&[n as u8, (n >> 8) as u8], 0);
                let two = ask(&snapshot, "two", Some(hash));
                let view = view(&snapshot, &two);
                let target = choose::pick(&view, true, |_| false).unwrap();
                picks[target] += 1;
                let upstream = snapshot.upstream(&snapshot.route(&two).targets[target]);
                held.extend(upstream.enter(&view.candidate(target), false));
            }
            assert_eq!(picks[0], 0, "{strategy}");
            assert!((90..=130).contains(&picks[1]), "a fifth: {picks:?} by {strategy}");
        }
    }

    #[test]
    fn a_request_undoes_its_trial_once() {
        let snapshot = fleet("round_robin");
        let request = ask(&snapshot, "two", None);
        let view = view(&snapshot, &request);
        let target = choose::pick(&view, true, |_| false).unwrap();
        let candidate = view.candidate(target);
        let upstream = snapshot.upstream(&snapshot.route(&request).targets[target]);
        upstream.state.breaker.pairs.cool(candidate.key(), candidate.now, candidate.now - 1);
        let enter = || upstream.enter(&candidate, false);
        let trial = enter().unwrap();
        assert!(enter().is_none(), "one request in a second");
        assert!(trial.undo_trial(candidate.now) && !trial.undo_trial(candidate.now));
        assert!(enter().is_some() && enter().is_none());
    }
}
