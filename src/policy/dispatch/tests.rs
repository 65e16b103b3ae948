//! TableFleet tests: the state and the responses of each target, and the steps that Zap takes.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};

use super::*;
use crate::policy::balance::{Cursor, Schedule};
use crate::policy::choose::{Choice, Rotation, TargetLoad};
use crate::time::{MILLI, SECOND};

/// Targets, parsed from a text such as `a b*3 c/1 d!`. Marks after the name: `*N` weight, `/N` priority, `@b` a further
/// model of backend `b`, `!` ejected, `?` key refused, `#` full, `~N` cooling for N s, `%N` quota used up for N s.
struct TableFleet {
    names: Vec<char>,
    backends: Vec<BackendId>,
    closed: RefCell<Vec<Result<(), Closed>>>,
    tiers: Vec<(Schedule, Cursor)>,
    all: (Schedule, Cursor),
    strategy: Choice,
    penalty: Vec<f64>,
    granted: Option<BackendId>,
    is_waiting: bool,
}

impl TableFleet {
    fn new(text: &str) -> Self {
        let (mut names, mut backends, mut closed, mut members) = (vec![], vec![], vec![], vec![]);
        for word in text.split_whitespace() {
            let mut marks = word[1..].chars().peekable();
            let (mut weight, mut priority, mut state) = (1, 0, Ok(()));
            let id = names.len();
            let mut backend = id;
            while let Some(mark) = marks.next() {
                let mut digits = String::new();
                while let Some(digit) = marks.next_if(char::is_ascii_digit) {
                    digits.push(digit);
                }
                let number = || digits.parse::<u64>().unwrap();
                match mark {
                    '*' => weight = number() as u32,
                    '/' => priority = number() as u32,
                    '@' => {
                        let of = marks.next().unwrap();
                        backend = backends[names.iter().position(|n| *n == of).unwrap()];
                    }
                    '!' => state = Err(Closed::Out(Status::Ejected)),
                    '?' => state = Err(Closed::Out(Status::Misconfigured)),
                    '#' => state = Err(Closed::Full),
                    '~' => state = Err(Closed::Cooling(number() * SECOND)),
                    '%' => state = Err(Closed::Quota(number() * SECOND)),
                    other => panic!("{other} in {word}"),
                }
            }
            names.push(word.chars().next().unwrap());
            backends.push(backend);
            closed.push(state);
            members.push((id, weight, priority));
        }
        let schedule = |wanted: Option<u32>| {
            let of = members.iter().filter(|m| wanted.is_none_or(|p| p == m.2)).map(|m| (m.0, m.1));
            (Schedule::new(of), Cursor::default())
        };
        let priorities: BTreeSet<u32> = members.iter().filter(|m| m.1 > 0).map(|m| m.2).collect();
        TableFleet {
            tiers: priorities.into_iter().map(|p| schedule(Some(p))).collect(),
            all: schedule(None),
            strategy: Choice::RoundRobin,
            penalty: vec![0.0; names.len()],
            granted: None,
            is_waiting: false,
            closed: RefCell::new(closed),
            names,
            backends,
        }
    }

    fn id(&self, name: char) -> TargetId {
        self.names.iter().position(|n| *n == name).unwrap()
    }

    fn set(&self, name: char, state: Result<(), Closed>) {
        self.closed.borrow_mut()[self.id(name)] = state;
    }
}

impl Fleet for TableFleet {
    fn strategy(&self) -> Choice {
        self.strategy
    }

    fn tier(&self, n: usize) -> Option<Rotation<'_>> {
        self.tiers.get(n).map(|(schedule, cursor)| Rotation { schedule, cursor })
    }

    fn all(&self) -> Rotation<'_> {
        Rotation { schedule: &self.all.0, cursor: &self.all.1 }
    }

    fn siblings(&self, _: TargetId) -> Option<Rotation<'_>> {
        None
    }

    fn up(&self) -> usize {
        self.all().targets().filter(|id| !matches!(self.check(*id), Err(Closed::Out(_)))).count()
    }

    fn backend(&self, target: TargetId) -> BackendId {
        self.backends[target]
    }

    fn weight(&self, target: TargetId) -> u32 {
        self.all.0.members().iter().find(|m| m.0 == target).map_or(0, |m| m.1)
    }

    fn identity(&self, target: TargetId) -> u64 {
        target as u64
    }

    fn load(&self, target: TargetId) -> TargetLoad {
        TargetLoad { in_flight: 0, penalty: self.penalty[target], up_for: Nanos::MAX }
    }

    fn check(&self, target: TargetId) -> Result<(), Closed> {
        match self.closed.borrow()[target] {
            Err(Closed::Full) if self.granted == Some(self.backends[target]) => Ok(()),
            state => state,
        }
    }

    fn check_ejected(&self, target: TargetId) -> Result<(), Closed> {
        match self.check(target) {
            Err(Closed::Out(Status::Ejected)) => Ok(()),
            Err(Closed::Out(out)) => Err(Closed::Out(out)),
            _ => Err(Closed::Out(Status::Healthy)),
        }
    }

    fn granted(&self) -> Option<BackendId> {
        self.granted
    }

    fn is_waiting(&self) -> bool {
        self.is_waiting
    }
}

const RULES: Rules = Rules {
    max_retries: 2,
    base_delay: Duration::from_millis(100),
    max_delay: Duration::from_millis(2_000),
    deadline: 300 * SECOND,
};

/// The results of each target's tries in order: `a:500,200 b:refused`. The last result repeats. A result is a status or
/// one of: `refused`, `timeout` (no response in time), `files` (this machine has no free file), `missed` (another
/// request took the last permit), `cut` (Zap shuts down), `body` (a good head, then the body fails). With the suffix
/// `+out` the failure also ejects the backend.
struct Results(Vec<(char, RefCell<VecDeque<String>>)>);

impl Results {
    fn new(text: &str) -> Self {
        let one = |word: &str| {
            let (name, results) = word.split_once(':').unwrap();
            (name.chars().next().unwrap(), RefCell::new(results.split(',').map(str::to_owned).collect()))
        };
        Results(text.split_whitespace().map(one).collect())
    }

    fn next(&self, name: char) -> String {
        let queue = &self.0.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("{name} was tried")).1;
        let mut queue = queue.borrow_mut();
        if queue.len() > 1 { queue.pop_front().unwrap() } else { queue[0].clone() }
    }
}

/// Runs one request and returns its steps: each try as `a500` (`a500!` in panic), `backoff`, `wait(..)`, and the end:
/// `ok`, `deliver`, or the reason of the refusal.
fn trace(rules: Rules, table: &TableFleet, results: &str, budget: &Budget) -> String {
    let results = Results::new(results);
    let mut dispatch = Dispatch::new(rules);
    let (mut now, mut steps) = (0, Vec::<String>::new());
    for _ in 0..40 {
        match dispatch.next(now, table, budget, || u64::MAX / 3) {
            Do::Try { target, until, panic } => {
                let name = table.names[target];
                let result = results.next(name);
                let (result, is_out) = result.strip_suffix("+out").map_or((&*result, false), |a| (a, true));
                if result == "missed" {
                    dispatch.missed();
                    table.set(name, Err(Closed::Full));
                    steps.push(format!("{name}-"));
                    continue;
                }
                steps.push(format!("{name}{result}{}", if panic { "!" } else { "" }));
                let event = match result {
                    "refused" => Event::Broke(Code::UpstreamUnreachable),
                    "timeout" => {
                        now = until;
                        Event::TimedOut
                    }
                    "files" => Event::Exhausted,
                    "cut" => Event::Cut,
                    "body" => Event::Head { status: 200, own_key: true },
                    status => Event::Head { status: status.parse().unwrap(), own_key: true },
                };
                let mut verdict = dispatch.on(event);
                if result == "body" {
                    assert_eq!(verdict, Verdict::Deliver);
                    verdict = dispatch.on(Event::Broke(Code::UpstreamUnreachable));
                }
                let Verdict::Failed(failure) = verdict else {
                    steps.push("ok".into());
                    return steps.join(" ");
                };
                match failure.mark {
                    Some(Mark::BadKey) => table.set(name, Err(Closed::Out(Status::Misconfigured))),
                    Some(Mark::Cool) => table.set(name, Err(Closed::Cooling(now + 5 * SECOND))),
                    None => {}
                }
                assert!(!is_out || failure.blame, "{result} does not count against the backend");
                if is_out {
                    table.set(name, Err(Closed::Out(Status::Ejected)));
                }
            }
            Do::Backoff { until } => {
                now = until;
                steps.push("backoff".into());
            }
            Do::Wait(Busy { opens, full }) => {
                let opens = opens.map(|(at, id, by_quota)| {
                    format!("{id}@{}{}", at / SECOND, if by_quota { "q" } else { "" })
                });
                steps.push(format!("wait({} full {full:?})", opens.unwrap_or_default()));
                return steps.join(" ");
            }
            Do::Deliver => {
                steps.push("deliver".into());
                return steps.join(" ");
            }
            Do::Refuse(why) => {
                steps.push(match why {
                    Refusal::Busy(_) => "busy".into(),
                    Refusal::Failed(code) => code.text().into(),
                    Refusal::KeysRefused => "keys_refused".into(),
                    Refusal::NoBackend => "no_backend".into(),
                });
                return steps.join(" ");
            }
        }
    }
    panic!("the request does not end: {steps:?}");
}

fn run(targets: &str, results: &str) -> String {
    trace(RULES, &TableFleet::new(targets), results, &Budget::new(100))
}

/// The ids are those of the fault table in `tests/README.md`.
#[test]
fn every_fault_leads_to_the_expected_steps() {
    #[rustfmt::skip]
    let rows = [
        // description, targets, results, steps
        ("-", "a", "a:200", "a200 ok"),
        ("U1 another target serves", "a b", "a:refused b:200", "arefused b200 ok"),
        ("U1 alone", "a", "a:refused", "arefused backoff arefused backoff arefused upstream_unreachable"),
        ("U3 silent, another target serves", "a b", "a:timeout b:200", "atimeout b200 ok"),
        ("U3 silent, alone", "a", "a:timeout", "atimeout upstream_timeout"),
        ("U3 silent, not retried", "a b", "a:timeout b:500", "atimeout b500 backoff b500 deliver"),
        ("U6 the body fails", "a b", "a:body b:200", "abody b200 ok"),
        ("U6 alone", "a", "a:body", "abody backoff abody backoff abody upstream_unreachable"),
        ("U13 redirect", "a b", "a:301", "a301 upstream_redirect"),
        ("U13 304 is delivered", "a b", "a:304", "a304 ok"),
        ("U14 429, another target serves", "a b", "a:429 b:200", "a429 b200 ok"),
        ("U14 429 from all", "a b", "a:429 b:429", "a429 b429 deliver"),
        ("U15 500 once", "a b", "a:500 b:200", "a500 b200 ok"),
        ("U15 500 always", "a b", "a:500 b:502", "a500 b502 backoff a500 deliver"),
        ("U15 529, alone", "a", "a:529", "a529 backoff a529 backoff a529 deliver"),
        ("U15 the failure ejects the backend", "a", "a:500+out", "a500 deliver"),
        ("U15 the second round keeps the order of the first", "b a*9", "a:500,200 b:502", "a500 b502 backoff a200 ok"),
        ("U16 400", "a b", "a:400", "a400 ok"),
        ("U16 404", "a b", "a:404", "a404 ok"),
        ("U17 401, another target serves", "a b", "a:401 b:200", "a401 b200 ok"),
        ("U17 401, alone", "a", "a:401", "a401 upstream_auth_error"),
        ("U17 all keys are refused", "a? b?", "", "keys_refused"),
        ("402, another target serves", "a b", "a:402 b:200", "a402 b200 ok"),
        ("403 is not retried", "a b", "a:403 b:403", "a403 b403 deliver"),
        ("403 alone", "a", "a:403", "a403 deliver"),
        ("403, then no response", "a b", "a:403 b:refused", "a403 brefused backoff brefused deliver"),
        ("500, then 401", "a b", "a:500+out b:401", "a500 b401 deliver"),
        ("500, then a redirect", "a b", "a:500 b:302", "a500 b302 upstream_redirect"),
        ("408", "a b", "a:408 b:200", "a408 b200 ok"),
        ("498", "a b", "a:498 b:200", "a498 b200 ok"),
        ("a status above 599", "a b", "a:700 b:200", "a700 b200 ok"),
        ("no free file", "a b", "a:files b:200", "afiles b200 ok"),
        ("Zap shuts down", "a b", "a:cut", "acut draining"),
        ("Zap shuts down after a kept response", "a b", "a:500 b:cut", "a500 bcut draining"),
        ("O4 panic: all targets in turn", "a! b! c!", "a:500 b:500 c:200", "a500! b500! c200! ok"),
        ("O4 panic within max_retries", "a! b! c! d!", "a:500 b:500 c:500 d:200", "a500! b500! c500! deliver"),
        ("O4 panic: one try per target", "a! b!", "a:500 b:refused", "a500! brefused! deliver"),
        ("O4 panic, alone", "a!", "a:refused", "arefused! upstream_unreachable"),
        ("panic skips refused keys", "a? b!", "b:200", "b200! ok"),
        ("ejected by this request, then panic", "a b!", "a:500+out b:200", "a500 b200! ok"),
        ("no panic while a target is up", "a b!", "a:500,200", "a500 backoff a200 ok"),
        ("priority", "a/1 b", "b:500 a:200", "b500 a200 ok"),
        ("priority: no better target is available", "a/1 b! c#", "a:200", "a200 ok"),
        ("all weights are 0", "a*0 b*0", "", "no_backend"),
        ("all cooling", "a~7 b~3", "", "wait(1@3 full [])"),
        ("one cooling, one full", "a~7 b#", "", "wait(0@7 full [1])"),
        ("quota used up", "a%9", "", "wait(0@9q full [])"),
        ("the last permit is taken", "a b", "a:missed b:200", "a- b200 ok"),
        ("the last permit is taken, alone", "a", "a:missed", "a- wait( full [0])"),
        ("a retry does not wait for a busy target", "a b#", "a:500", "a500 backoff a500 backoff a500 deliver"),
    ];
    for (description, targets, results, want) in rows {
        assert_eq!(run(targets, results), want, "{description}: {targets}, {results}");
    }
}

#[test]
fn no_retries_means_one_try() {
    let rules = Rules { max_retries: 0, ..RULES };
    let run = |targets, results| trace(rules, &TableFleet::new(targets), results, &Budget::new(100));
    assert_eq!(run("a b", "a:500"), "a500 deliver");
    assert_eq!(run("a b", "a:refused"), "arefused upstream_unreachable");
    assert_eq!(run("a! b!", "a:500"), "a500! deliver");
}

#[test]
fn a_used_up_budget_ends_the_retries() {
    let budget = Budget::new(0);
    while budget.try_withdraw(0) {}
    assert_eq!(trace(RULES, &TableFleet::new("a b"), "a:500", &budget), "a500 deliver");
    assert_eq!(trace(RULES, &TableFleet::new("a"), "a:refused", &budget), "arefused upstream_unreachable");
}

#[test]
fn only_retries_that_are_made_are_charged() {
    let left = |budget: &Budget| (0..99).filter(|_| budget.try_withdraw(0)).count();
    for (targets, results, spent) in [
        ("a b", "a:200", 0),
        ("a", "a:403", 0),
        ("a", "a:timeout", 0),
        ("a b", "a:500 b:200", 1),
        ("a b", "a:500 b:502", 2),
        ("a b c", "a:missed b:missed c:200", 0),
        ("a b c", "a:500 b:missed c:200", 1),
    ] {
        let budget = Budget::new(0);
        trace(RULES, &TableFleet::new(targets), results, &budget);
        assert_eq!(left(&budget), 10 - spent, "{targets}, {results}");
    }
}

#[test]
fn a_granted_permit_is_used() {
    let mut table = TableFleet::new("a#*9 b");
    table.granted = Some(0);
    assert_eq!(trace(RULES, &table, "a:200", &Budget::new(0)), "a200 ok");
    // The backend was ejected during the wait. The permit is valid in panic too.
    let mut table = TableFleet::new("a!");
    table.granted = Some(0);
    assert_eq!(trace(RULES, &table, "a:200", &Budget::new(0)), "a200! ok");
}

#[test]
fn untried_targets_share_the_time_left() {
    let until = |targets: &str, tried: &[TargetId]| {
        let mut dispatch = Dispatch::new(RULES);
        dispatch.tried = tried.to_vec();
        match dispatch.next(0, &TableFleet::new(targets), &Budget::new(100), || 0) {
            Do::Try { until, .. } => until / SECOND,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(until("a", &[]), 300);
    assert_eq!(until("a b c", &[]), 100);
    assert_eq!(until("a b c!", &[]), 150);
    assert_eq!(until("a b c", &[0]), 150);
    assert_eq!(until("a! b! c!", &[]), 100, "in panic the other targets are tried too");
}

#[test]
fn no_try_starts_after_the_deadline() {
    let rules = Rules { deadline: MILLI, ..RULES };
    // The backoff would end after the deadline.
    assert_eq!(trace(rules, &TableFleet::new("a"), "a:500", &Budget::new(100)), "a500 deliver");
    let mut dispatch = Dispatch::new(rules);
    let table = TableFleet::new("a b");
    assert!(matches!(dispatch.next(0, &table, &Budget::new(100), || 0), Do::Try { .. }));
    dispatch.on(Event::Broke(Code::UpstreamUnreachable));
    let late = dispatch.next(MILLI, &table, &Budget::new(100), || 0);
    assert_eq!(late, Do::Refuse(Refusal::Failed(Code::UpstreamUnreachable)));
}

#[test]
fn a_reopened_target_comes_before_failed_ones() {
    let table = TableFleet::new("a b!");
    let mut dispatch = Dispatch::new(RULES);
    let budget = Budget::new(100);
    let mut next = |now| dispatch.next(now, &table, &budget, || 0);
    assert!(matches!(next(0), Do::Try { target: 0, .. }));
    dispatch.on(Event::Head { status: 500, own_key: true });
    let mut next = |now| dispatch.next(now, &table, &budget, || 0);
    assert!(matches!(next(0), Do::Backoff { .. }));
    table.set('b', Ok(()));
    assert!(matches!(next(1), Do::Try { target: 1, .. }));
}

#[test]
fn each_strategy_chooses_by_its_rule() {
    let first = |table: &TableFleet| match Dispatch::new(RULES).next(0, table, &Budget::new(0), || 0) {
        Do::Try { target, .. } => table.names[target],
        other => panic!("{other:?}"),
    };
    let mut table = TableFleet::new("a b c");
    table.strategy = Choice::LeastLoaded;
    table.penalty = vec![5.0, 0.0, 7.0];
    assert_eq!((0..3).map(|_| first(&table)).collect::<String>(), "bbb");
    table.strategy = Choice::RoundRobin;
    assert_eq!((0..3).map(|_| first(&table)).collect::<BTreeSet<_>>().len(), 3);
    table.strategy = Choice::PrefixHash(7);
    let home = first(&table);
    assert_eq!(first(&table), home);
    table.set(home, Err(Closed::Cooling(SECOND)));
    assert_ne!(first(&table), home);
}
