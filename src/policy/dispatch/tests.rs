//! TableFleet tests: the state and the responses of each target, and the steps that Zap takes.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use super::*;
use crate::policy::balance::{BackendId, Cursor, Schedule};
use crate::policy::breaker::Status;
use crate::policy::choose::Closed;
use crate::policy::choose::{Choice, Rotation, TargetLoad};
use crate::policy::latency::Expected;
use crate::policy::spend::Refused;
use crate::time::{MILLI, SECOND};

/// Targets, parsed from a text such as `a b*3 c/1 d!`. Marks after the name: `*N` weight, `/N` priority, `@b` a further
/// model of backend `b`, `!` ejected, `!N` ejected until a trial after N s, `?` key refused, `#` full, `~N` cooling for
/// N s, `%N` quota used up for N s, `%` quota reserved by others, `$` budget spent, `=` budget reserved by others, `>`
/// quota too small.
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
    suspects: Vec<TargetId>,
    /// Empty: each target has a backend of one key.
    pools: Vec<BackendId>,
    trials: Vec<(TargetId, Nanos)>,
    /// Empty: nothing is known.
    expected: Vec<Option<Expected>>,
}

impl TableFleet {
    fn new(text: &str) -> Self {
        let (mut names, mut backends, mut closed, mut members) = (vec![], vec![], vec![], vec![]);
        let mut trials = vec![];
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
                    '!' => {
                        state = Err(Closed::Out(Status::Ejected));
                        trials.extend(digits.parse::<u64>().ok().map(|secs| (id, secs * SECOND)));
                    }
                    '?' => state = Err(Closed::Out(Status::Unauthorized)),
                    '#' => state = Err(Closed::Full),
                    '~' => state = Err(Closed::Cooling(number() * SECOND)),
                    '%' if digits.is_empty() => state = Err(Closed::Reserved),
                    '%' => state = Err(Closed::Quota(number() * SECOND)),
                    '$' => state = Err(Closed::Budget(Refused::Spent)),
                    '=' => state = Err(Closed::Budget(Refused::Reserved)),
                    '>' => state = Err(Closed::TooLarge),
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
            suspects: Vec::new(),
            pools: Vec::new(),
            trials,
            expected: Vec::new(),
            closed: RefCell::new(closed),
            names,
            backends,
        }
    }

    /// The same targets, with what another table knows of their times.
    fn knowing(self, other: &TableFleet) -> Self {
        TableFleet { expected: other.expected.clone(), ..self }
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

    fn backend(&self, target: TargetId) -> BackendId {
        self.backends[target]
    }

    fn pool(&self, target: TargetId) -> BackendId {
        self.pools.get(target).copied().unwrap_or(self.backends[target])
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

    fn expected(&self, target: TargetId) -> Option<Expected> {
        self.expected.get(target).copied().flatten()
    }

    fn check(&self, target: TargetId) -> Result<(), Closed> {
        match self.closed.borrow()[target] {
            Err(Closed::Full) if self.granted == Some(self.pool(target)) => Ok(()),
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

    fn trial(&self, target: TargetId) -> Option<Nanos> {
        self.trials.iter().find(|(id, _)| *id == target).map(|(_, at)| *at)
    }

    fn is_suspect(&self, target: TargetId) -> bool {
        self.suspects.contains(&target)
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
    wait_until: 30 * SECOND,
    deadline: 300 * SECOND,
};

/// The results of each target's tries in order: `a:500,200 b:refused`. The last result repeats. A result is a status or
/// one of: `refused`, `timeout` (no response in time), `files` (this machine has no free file), `missed` (another
/// request took the last permit), `cut` (Zap shuts down), `ejected` (while the request waited). After a good head:
/// `body` (the body fails), `empty`, `silent`, `model` (a 404 of the model), `unknown` (a 404 of what the request
/// refers to), `in503` (an error inside a 200). `alive503`: 503 of a target that serves others. With the suffix `+out`
/// the failure also ejects the target.
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
    whole_trace(rules, table, results, budget).0
}

/// The names of the targets to blame.
fn blamed(dispatch: &Dispatch, table: &TableFleet, was_served: bool) -> String {
    dispatch.blamed(was_served, |id| table.pool(id)).map(|target| table.names[target]).collect()
}

/// The steps of [`trace`], and the names of the targets to blame.
fn whole_trace(rules: Rules, table: &TableFleet, results: &str, budget: &Budget) -> (String, String) {
    let results = Results::new(results);
    let mut dispatch = Dispatch::new(rules);
    let (mut now, mut steps) = (0, Vec::<String>::new());
    for _ in 0..40 {
        match dispatch.next(now, table, budget, || u64::MAX / 3) {
            Do::Try { target, panic } => {
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
                let head = |status, is_alive| Event::Head { status, own_key: true, is_alive };
                let event = match result {
                    "refused" => Event::Broke(Code::UpstreamUnreachable),
                    "timeout" => Event::TimedOut,
                    "files" => Event::Exhausted,
                    "cut" => Event::Cut,
                    "ejected" => Event::Ejected,
                    "body" | "empty" | "silent" | "in503" | "in400" => head(200, false),
                    "model" | "unknown" => head(404, false),
                    status => match status.strip_prefix("alive") {
                        Some(status) => head(status.parse().unwrap(), true),
                        None => head(status.parse().unwrap(), false),
                    },
                };
                let mut verdict = dispatch.on(event);
                let unfit = match result {
                    "body" => Some(Unfit::CutShort),
                    "empty" => Some(Unfit::Empty),
                    "silent" => Some(Unfit::Silent),
                    "in503" => Some(Unfit::Error { status: 503, own_key: true, is_alive: false }),
                    "in400" => Some(Unfit::Error { status: 400, own_key: true, is_alive: false }),
                    "model" => Some(Unfit::OtherModel(404)),
                    "unknown" => Some(Unfit::NotHere(404)),
                    _ => None,
                };
                if let Some(unfit) = unfit {
                    assert_eq!(verdict, Verdict::Deliver);
                    verdict = dispatch.on(Event::Unfit(unfit));
                }
                let Verdict::Failed(failure) = verdict else {
                    steps.push("ok".into());
                    let is_served = result.parse::<u16>().is_ok_and(|status| status < 400);
                    return (steps.join(" "), blamed(&dispatch, table, is_served));
                };
                match failure.mark {
                    Some(Mark::BadKey) => table.set(name, Err(Closed::Out(Status::Unauthorized))),
                    Some(Mark::Limited) => table.set(name, Err(Closed::Cooling(now + 5 * SECOND))),
                    Some(Mark::Busy) => table.set(name, Err(Closed::Cooling(now + SECOND))),
                    Some(Mark::NoResult) | None => {}
                }
                if is_out {
                    table.set(name, Err(Closed::Out(Status::Ejected)));
                }
            }
            Do::Backoff { until } => {
                now = until;
                steps.push("backoff".into());
            }
            Do::Wait(Busy { opens, full, reserved, trial }) => {
                let opens = opens.map(|(at, id, by_quota)| {
                    format!("{id}@{}{}", at / SECOND, if by_quota { "q" } else { "" })
                });
                let reserved =
                    if reserved.is_empty() { "".into() } else { format!(" reserved {reserved:?}") };
                let trial = trial.map_or("".into(), |at| format!(" trial {}", at / SECOND));
                steps.push(format!("wait({} full {full:?}{reserved}{trial})", opens.unwrap_or_default()));
                return (steps.join(" "), blamed(&dispatch, table, false));
            }
            Do::Deliver => {
                steps.push("deliver".into());
                return (steps.join(" "), blamed(&dispatch, table, false));
            }
            Do::Refuse(why) => {
                steps.push(match why {
                    Refusal::Busy(_) => "busy".into(),
                    Refusal::Failed(code) => code.text().into(),
                    Refusal::Budget(why) => format!("budget {why:?}"),
                    Refusal::KeysRefused => "keys_refused".into(),
                    Refusal::NoBackend => "no_backend".into(),
                    Refusal::TooLarge => "too_large".into(),
                });
                return (steps.join(" "), blamed(&dispatch, table, false));
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
        ("an ejected target may be tried before a full one is free", "a!1 b#", "", "wait( full [1] trial 1)"),
        ("another has room", "a% b", "b:200", "b200 ok"),
        ("all tokens are reserved", "a% b%", "", "wait( full [] reserved [0, 1])"),
        ("one quota opens, one is reserved", "a%3 b%", "", "wait(0@3q full [] reserved [1])"),
        ("a budget is spent, another target serves", "a$ b", "b:200", "b200 ok"),
        ("all budgets are spent", "a$ b$", "", "budget Spent"),
        ("one budget is reserved only", "a$ b= c$", "", "budget Reserved"),
        ("a budget is spent, and the other target is ejected", "a$ b!", "b:200", "b200! ok"),
        ("a budget is spent, and the other target cools", "a$ b~3", "", "wait(1@3 full [])"),
        ("a budget is spent after a failed try", "a b$", "a:refused a:refused a:refused", "arefused backoff arefused backoff arefused upstream_unreachable"),
        ("a quota is too small", "a> b", "b:200", "b200 ok"),
        ("all quotas are too small", "a> b>", "", "too_large"),
        ("a due trial of a full target is no reason to look again", "a!1# b#", "", "wait( full [0, 1])"),
        ("U1 another target serves", "a b", "a:refused b:200", "arefused b200 ok"),
        ("U1 alone", "a", "a:refused", "arefused backoff arefused backoff arefused upstream_unreachable"),
        ("U3 silent, another target serves", "a b", "a:timeout b:200", "atimeout b200 ok"),
        ("U3 silent, alone", "a", "a:timeout", "atimeout upstream_timeout"),
        ("U3 silent, not retried", "a b", "a:timeout b:500", "atimeout b500 backoff b500 deliver"),
        ("U6 the body fails", "a b", "a:body b:200", "abody b200 ok"),
        ("U6 alone", "a", "a:body", "abody backoff abody backoff abody stream_interrupted"),
        ("U13 redirect", "a b", "a:301", "a301 upstream_redirect"),
        ("U13 304 is delivered", "a b", "a:304", "a304 ok"),
        ("U14 429, another target serves", "a b", "a:429 b:200", "a429 b200 ok"),
        ("U14 429 from all", "a b", "a:429 b:429", "a429 b429 wait(0@5 full [])"),
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
    // A wait costs no budget: the request comes back to the target that made it wait.
    assert_eq!(trace(RULES, &TableFleet::new("a b"), "a:429", &budget), "a429 wait(0@5 full [])");
    let table = TableFleet::new("a b");
    let mut dispatch = Dispatch::new(RULES);
    let step = |dispatch: &mut Dispatch| dispatch.next(0, &table, &budget, || 0);
    assert_eq!(step(&mut dispatch), Do::Try { target: 0, panic: false });
    let _ = dispatch.on(Event::Head { status: 429, own_key: true, is_alive: false });
    assert_eq!(step(&mut dispatch), Do::Try { target: 0, panic: false }, "it has reopened already");
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
fn another_target_is_left_only_within_the_limits_of_the_request() {
    let left = |rules: Rules, targets: &str, tried: &[TargetId], percent: u32| {
        let (table, budget) = (TableFleet::new(targets), Budget::new(percent));
        let mut dispatch = Dispatch::new(rules);
        dispatch.tried = tried.to_vec();
        assert!(matches!(dispatch.next(0, &table, &budget, || 0), Do::Try { .. }));
        while percent == 0 && budget.try_withdraw(0) {}
        dispatch.has_next(0, &table, &budget)
    };
    assert!(left(RULES, "a b", &[], 100));
    assert!(!left(RULES, "a", &[], 100), "the same target is no other one");
    assert!(!left(RULES, "a b", &[1], 100));
    assert!(!left(RULES, "a b! c# d~9", &[], 100));
    assert!(left(RULES, "a! b!", &[], 100), "in panic mode");
    assert!(!left(Rules { max_retries: 0, ..RULES }, "a b", &[], 100));
    assert!(!left(RULES, "a b", &[], 0), "the budget is spent");
}

/// The blame rules: what each target answered, the steps, and who is to blame.
#[test]
fn a_target_is_judged_by_more_than_one_request() {
    #[rustfmt::skip]
    let rows = [
        // description, targets, results, steps, blamed
        ("served by another", "a b", "a:500 b:200", "a500 b200 ok", "a"),
        ("served by a third", "a b c", "a:500 b:503 c:200", "a500 b503 c200 ok", "ab"),
        ("one target asked", "a", "a:500", "a500 backoff a500 backoff a500 deliver", "a"),
        ("all gave the same status", "a b", "a:500 b:500", "a500 b500 backoff a500 deliver", ""),
        ("all gave the same status, in a 200", "a b", "a:503 b:in503", "a503 bin503 backoff a503 deliver", ""),
        ("different statuses", "a b", "a:500 b:502", "a500 b502 backoff a500 deliver", "ab"),
        ("one gave a 4xx", "a b", "a:500 b:400", "a500 b400 ok", ""),
        ("one refused", "a b", "a:500+out b:403", "a500 b403 deliver", ""),
        ("402 and 403 blame nobody", "a b", "a:402 b:200", "a402 b200 ok", ""),
        ("403 from all", "a b", "a:403 b:403", "a403 b403 deliver", ""),
        ("413 goes to another target", "a b", "a:413 b:200", "a413 b200 ok", ""),
        ("413 from all", "a b", "a:413 b:413", "a413 b413 deliver", ""),
        ("the model is not there", "a b", "a:model b:200", "amodel b200 ok", ""),
        ("the model is nowhere", "a b", "a:model b:model", "amodel bmodel deliver", ""),
        ("501 is the client's", "a b", "a:501", "a501 ok", ""),
        ("a wait says nothing", "a b", "a:429 b:200", "a429 b200 ok", ""),
        ("a wait and a failure", "a b", "a:429 b:500+out", "a429 b500 wait(0@5 full [])", "b"),
        ("429 from all: wait", "a b", "a:429 b:429", "a429 b429 wait(0@5 full [])", ""),
        ("429 of a target that serves others", "a", "a:alive429", "aalive429 wait(0@1 full [])", ""),
        ("busy, not broken", "a b", "a:alive503 b:200", "aalive503 b200 ok", ""),
        ("busy, alone: wait", "a", "a:alive529", "aalive529 wait(0@1 full [])", ""),
        ("broken, not busy", "a b", "a:503 b:200", "a503 b200 ok", "a"),
        ("silent, served by another", "a b", "a:timeout b:200", "atimeout b200 ok", "a"),
        ("silent after the head", "a b", "a:silent b:200", "asilent b200 ok", "a"),
        ("silence from all", "a b", "a:timeout b:timeout", "atimeout btimeout upstream_timeout", "ab"),
        ("cut before content", "a b", "a:body b:200", "abody b200 ok", "a"),
        ("an error in a 200", "a b", "a:in503 b:200", "ain503 b200 ok", "a"),
        ("an error in a 200, alone", "a", "a:in503+out", "ain503 deliver", "a"),
        ("a 4xx in a 200", "a b", "a:in400 b:200", "ain400 b200 ok", ""),
        ("empty", "a b", "a:empty b:200", "aempty b200 ok", "a"),
        ("empty, alone", "a", "a:empty+out", "aempty upstream_empty", "a"),
        ("empty everywhere", "a b", "a:empty+out b:empty+out", "aempty bempty upstream_empty", ""),
        ("ejected meanwhile", "a b", "a:ejected b:200", "aejected b200 ok", ""),
        ("the transport is judged by the backend", "a b", "a:refused b:200", "arefused b200 ok", ""),
        ("a wrong key", "a b", "a:401 b:200", "a401 b200 ok", ""),
        ("a wrong key that others use", "a", "a:401", "a401 upstream_auth_error", ""),
        ("served by itself", "a", "a:500,200", "a500 backoff a200 ok", ""),
        ("501 behind a failure", "a b", "a:500 b:501", "a500 b501 ok", "a"),
        ("who has it is asked of all", "a b c d e", "a:unknown b:unknown c:unknown d:unknown e:200", "aunknown bunknown cunknown dunknown e200 ok", ""),
        ("nobody has it", "a b c d", "a:unknown b:unknown c:unknown d:unknown", "aunknown bunknown cunknown dunknown deliver", ""),
        ("a search has its tries too", "a b c d e", "a:unknown b:500 c:500 d:500 e:200", "aunknown b500 c500 d500 upstream_unreachable", ""),
        ("it may be at a full one", "a b#", "a:unknown", "aunknown wait( full [1])", ""),
        ("or at one that is down", "a b", "a:unknown b:refused", "aunknown brefused backoff brefused backoff brefused upstream_unreachable", ""),
        ("all tries made, one waits", "a b c", "a:429 b:500 c:500", "a429 b500 c500 wait(0@5 full [])", ""),
        ("each target costs a try", "a b c d", "a:429 b:429 c:429 d:200", "a429 b429 c429 wait(0@5 full [])", ""),
    ];
    for (description, targets, results, steps, blamed) in rows {
        let found = whole_trace(RULES, &TableFleet::new(targets), results, &Budget::new(100));
        assert_eq!(found, (steps.to_owned(), blamed.to_owned()), "{description}: {targets}, {results}");
    }
}

#[test]
fn a_request_without_a_further_try_comes_back_to_the_target_that_made_it_wait() {
    let run = |rules, budget: &Budget| trace(rules, &TableFleet::new("a b"), "a:429 b:500", budget);
    let waits = "a429 b500 wait(0@5 full [])";
    assert_eq!(run(Rules { max_retries: 1, ..RULES }, &Budget::new(100)), waits);
    // The budget pays for the second target, and not for another round.
    let withdraw = |budget: &Budget, most| (0..most).take_while(|_| budget.try_withdraw(0)).count();
    let all = withdraw(&Budget::new(0), usize::MAX);
    let budget = Budget::new(0);
    withdraw(&budget, all - 1);
    assert_eq!(run(RULES, &budget), waits);
}

#[test]
fn a_backend_with_several_keys_has_one_try() {
    #[rustfmt::skip]
    let rows = [
        // description, results, steps
        ("a key that waits", "a:429 b:429 c:200", "a429 b429 c200 ok"),
        ("a key that is refused", "a:401 b:401 c:401 d:200", "a401 b401 c401 d200 ok"),
        ("all keys wait", "a:429 b:429 c:429 d:500", "a429 b429 c429 d500 wait(0@5 full [])"),
        ("a failure is the backend's", "a:500 b:200 d:200", "a500 d200 ok"),
        ("its next round has another key", "a:500 b:200 d:500", "a500 d500 deliver"),
        ("a key, then the backend", "a:429 b:500 c:200 d:200", "a429 b500 d200 ok"),
    ];
    for (description, results, steps) in rows {
        let mut table = TableFleet::new("a b c d");
        table.pools = vec![0, 0, 0, 3];
        let rules = Rules { max_retries: 1, ..RULES };
        // The first try is free; one more is charged.
        assert_eq!(trace(rules, &table, results, &Budget::new(100)), steps, "{description}");
    }
    let mut table = TableFleet::new("a b");
    table.pools = vec![0, 0];
    let found = whole_trace(RULES, &table, "a:500 b:500", &Budget::new(100));
    assert_eq!(
        found,
        ("a500 backoff b500 backoff a500 deliver".into(), "ab".into()),
        "two keys are no two opinions"
    );
    let mut table = TableFleet::new("a b");
    table.pools = vec![0, 0];
    let found = whole_trace(RULES, &table, "a:unknown b:200", &Budget::new(100));
    assert_eq!(found.0, "aunknown b200 ok", "the other key may be of another organization");
    let mut table = TableFleet::new("a b c");
    table.pools = vec![0, 0, 2];
    assert_eq!(trace(RULES, &table, "a:500 b:200 c:500", &Budget::new(100)), "a500 c500 backoff b200 ok");
}

#[test]
fn a_request_that_an_sdk_sends_again_gets_one_try_a_target() {
    let (table, budget) = (TableFleet::new("a b"), Budget::new(100));
    let mut dispatch = Dispatch::new(RULES);
    dispatch.forbid_rounds();
    let failed = Event::Head { status: 500, own_key: true, is_alive: false };
    for target in 0..2 {
        assert_eq!(dispatch.next(0, &table, &budget, || 0), Do::Try { target, panic: false });
        dispatch.on(failed);
    }
    assert_eq!(dispatch.next(0, &table, &budget, || 0), Do::Deliver);
}

#[test]
fn a_response_that_came_is_kept_if_all_targets_are_out_after_a_wait() {
    let (table, budget) = (TableFleet::new("a"), Budget::new(100));
    let mut dispatch = Dispatch::new(RULES);
    assert!(matches!(dispatch.next(0, &table, &budget, || 0), Do::Try { .. }));
    dispatch.on(Event::Head { status: 429, own_key: true, is_alive: false });
    table.set('a', Err(Closed::Cooling(SECOND)));
    assert!(matches!(dispatch.next(0, &table, &budget, || 0), Do::Wait(_)));
    table.set('a', Err(Closed::Out(Status::Unauthorized)));
    assert_eq!(dispatch.next(SECOND, &table, &budget, || 0), Do::Deliver);
}

#[test]
fn a_wait_after_a_429_ends_within_the_time_for_waits() {
    let run = |rules| trace(rules, &TableFleet::new("a"), "a:429", &Budget::new(100));
    assert_eq!(run(Rules { wait_until: 5 * SECOND - 1, ..RULES }), "a429 deliver");
    assert_eq!(run(Rules { max_retries: 0, ..RULES }), "a429 deliver");
    assert_eq!(run(RULES), "a429 wait(0@5 full [])");
}

#[test]
fn a_suspect_target_is_asked_only_if_no_other_is_left() {
    let mut table = TableFleet::new("a*9 b/1");
    table.suspects = vec![0];
    let budget = Budget::new(100);
    assert_eq!(trace(RULES, &table, "b:200", &budget), "b200 ok", "whatever the weights and priorities are");
    assert_eq!(trace(RULES, &table, "a:200 b:500", &budget), "b500 a200 ok");
    table.suspects = vec![0, 1];
    assert_eq!(trace(RULES, &table, "a:200", &budget), "a200 ok");
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
    dispatch.on(Event::Head { status: 500, own_key: true, is_alive: false });
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

#[test]
fn the_better_of_two_by_expected_time_and_load_is_chosen() {
    let mut table = TableFleet::new("a b*4 c");
    // Neither explores nor differs in what it draws: 1 << 8 draws targets 1 and 2, 0 draws 0 and 1.
    let first = |table: &TableFleet, random: u64| {
        let table = TableFleet { strategy: Choice::LeastLatency(random), ..TableFleet::new("a b*4 c") }
            .knowing(table);
        match Dispatch::new(RULES).next(0, &table, &Budget::new(0), || 0) {
            Do::Try { target, .. } => table.names[target],
            other => panic!("{other:?}"),
        }
    };
    let known = |ms: u64, at| Some(Expected { nanos: (ms * MILLI) as f64, at });
    assert_eq!(first(&table, 1), 'b', "nothing is known: the larger weight");
    table.expected = vec![known(10, 5), known(100, 3), known(30, 4)];
    assert_eq!(
        [first(&table, 1), first(&table, 1 | 1 << 8)],
        ['a', 'b'],
        "100 ms by a weight of 4 are 25 ms"
    );
    table.expected[1] = known(200, 3);
    assert_eq!(first(&table, 1 | 1 << 8), 'c');
    table.expected[0] = None;
    assert_eq!(first(&table, 1), 'a', "what is not known gets one request, whatever its weight");
    assert_eq!(first(&table, 64), 'a', "what is not known is explored");
    table.expected[0] = known(10, 5);
    assert_eq!(first(&table, 64), 'b', "then the oldest time");
    let picks: BTreeSet<_> =
        (0..200u64).map(|n| first(&table, n.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)).collect();
    assert_eq!(picks.into_iter().collect::<String>(), "ac");
}
