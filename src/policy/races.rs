//! loom models: every interleaving, within a bound, of threads that use the atomics of the policies.
//!
//! `RUSTFLAGS="--cfg zap_loom" cargo test --lib --target-dir target/loom races`

use std::sync::Arc;

use loom::future::block_on;
use loom::model::Builder;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use crate::policy::balance::{Cursor, Schedule, Turns};
use crate::policy::breaker::{Breaker, Change, Probe, Status, Thresholds};
use crate::policy::queue::{Admission, Admitted, Permit, QueueFull, Turn};
use crate::policy::quota::{Quota, QuotaLimits};
use crate::policy::spend::{Period, Refused, SpendLimit};
use crate::time::Day;

/// Runs all interleavings with at most `preemptions` preemptions: most races need two (Musuvathi and Qadeer 2007).
fn model(preemptions: usize, run: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(run);
}

fn is_idle(admission: &Admission) -> bool {
    (admission.in_flight(), admission.depth()) == (0, 0)
}

/// Waits for a permit; `None` if the queue is full.
fn wait(admission: &Arc<Admission>) -> Option<Permit> {
    match admission.enter(Turn::default()) {
        Ok(Admitted::Passed(permit)) => Some(permit),
        Ok(Admitted::Queued(ticket)) => Some(block_on(ticket)),
        Err(QueueFull) => None,
    }
}

#[test]
fn one_thread_at_a_time_holds_a_slot_and_no_wakeup_is_lost() {
    model(3, || {
        let admission = Admission::new(1, 2);
        let inside = Arc::new(AtomicUsize::new(0));
        let run = |admission: Arc<Admission>, inside: Arc<AtomicUsize>| {
            move || {
                let permit = wait(&admission).expect("the queue has room for both");
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                inside.fetch_sub(1, Ordering::SeqCst);
                drop(permit);
            }
        };
        let threads = [(); 2].map(|()| thread::spawn(run(admission.clone(), inside.clone())));
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert!(is_idle(&admission));
    });
}

#[test]
fn a_waiter_that_gives_up_does_not_leak_a_slot() {
    model(2, || {
        let admission = Admission::new(1, 2);
        let permit = wait(&admission).expect("a slot is free");
        let leaver = admission.enter(Turn::default()).expect("the queue has room");
        let theirs = admission.clone();
        let stays = thread::spawn(move || drop(wait(&theirs).expect("the queue has room")));
        let leaves = thread::spawn(move || drop(leaver));
        drop(permit);
        stays.join().unwrap();
        leaves.join().unwrap();
        assert!(is_idle(&admission));
        assert!(admission.try_pass(Turn::default()).is_some());
    });
}

#[test]
fn try_pass_never_exceeds_the_slots() {
    model(3, || {
        let admission = Admission::new(1, 1);
        let held = Arc::new(AtomicUsize::new(0));
        let run = |admission: Arc<Admission>, held: Arc<AtomicUsize>| {
            move || {
                if let Some(permit) = admission.try_pass(Turn::default()) {
                    assert_eq!(held.fetch_add(1, Ordering::SeqCst), 0);
                    held.fetch_sub(1, Ordering::SeqCst);
                    drop(permit);
                }
            }
        };
        let other = thread::spawn(run(admission.clone(), held.clone()));
        let waits = {
            let (admission, held) = (admission.clone(), held.clone());
            thread::spawn(move || {
                if let Some(permit) = wait(&admission) {
                    assert_eq!(held.fetch_add(1, Ordering::SeqCst), 0);
                    held.fetch_sub(1, Ordering::SeqCst);
                    drop(permit);
                }
            })
        };
        run(admission.clone(), held)();
        other.join().unwrap();
        waits.join().unwrap();
        assert!(is_idle(&admission));
    });
}

#[test]
fn a_raised_limit_serves_the_waiters() {
    model(3, || {
        let admission = Admission::new(1, 1);
        let _held = wait(&admission).expect("a slot is free");
        let theirs = admission.clone();
        // Only the raised limit gives this waiter a slot.
        let waits = thread::spawn(move || drop(wait(&theirs).expect("the queue has room")));
        admission.resize(2, 1);
        waits.join().unwrap();
        assert_eq!((admission.in_flight(), admission.depth()), (1, 0));
    });
}

#[test]
fn a_slot_that_is_released_while_the_limit_changes_is_not_lost() {
    model(3, || {
        let admission = Admission::new(1, 2);
        let permit = wait(&admission).expect("a slot is free");
        let queued = || match admission.enter(Turn::default()) {
            Ok(Admitted::Queued(ticket)) => ticket,
            other => panic!("no ticket: {other:?}"),
        };
        let (first, second) = (queued(), queued());
        let releases = thread::spawn(move || drop(permit));
        admission.resize(2, 2);
        releases.join().unwrap();
        // Each waiter gets a slot, in any order of the two events; both hold theirs now.
        let held = (block_on(first), block_on(second));
        assert_eq!((admission.in_flight(), admission.depth()), (2, 0));
        drop(held);
        assert!(is_idle(&admission));
    });
}

#[test]
fn a_full_turn_gives_each_member_its_weight_over_all_threads() {
    model(3, || {
        let schedule = Arc::new((Schedule::new([(0, 2), (1, 1)]), Cursor::default()));
        let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let run = |schedule: Arc<(Schedule, Cursor)>, counts: Arc<[AtomicUsize; 2]>, picks: usize| {
            move || {
                let turns = Turns { cursor: &schedule.1, advance: true };
                for _ in 0..picks {
                    let id = schedule.0.round_robin(turns, |_| true).expect("all are eligible");
                    counts[id].fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        let other = thread::spawn(run(schedule.clone(), counts.clone(), 4));
        run(schedule, counts.clone(), 2)();
        other.join().unwrap();
        assert_eq!([0, 1].map(|i| counts[i].load(Ordering::Relaxed)), [4, 2]);
    });
}

const LIMITS: Thresholds = Thresholds { interval: 0, failures: 2, successes: 1 };

#[test]
fn only_one_thread_sees_a_change_of_state() {
    model(3, || {
        let breaker = Arc::new(Breaker::new());
        let failures = |breaker: Arc<Breaker>, n: usize| {
            move || (0..n).filter(|_| breaker.failure(LIMITS, 1) == Some(Change::Down)).count()
        };
        let other = thread::spawn(failures(breaker.clone(), 2));
        let mine = failures(breaker.clone(), 1)();
        assert_eq!(mine + other.join().unwrap(), 1);
        assert_eq!(breaker.status(1), Status::Ejected);
    });
}

#[test]
fn up_and_down_changes_alternate_in_every_interleaving() {
    model(3, || {
        let breaker = Arc::new(Breaker::new());
        let theirs = breaker.clone();
        let traffic = thread::spawn(move || {
            let downs = (0..2).filter(|_| theirs.failure(LIMITS, 1) == Some(Change::Down)).count();
            theirs.success(1);
            downs
        });
        let ups = usize::from(breaker.probed(Probe::Alive, LIMITS, 1) == Some(Change::Up));
        let downs = traffic.join().unwrap();
        let is_ejected = breaker.status(1) == Status::Ejected;
        assert_eq!(downs - ups, usize::from(is_ejected));
    });
}

/// A quota of 10 tokens, or of another number.
fn limits(tokens: u64) -> QuotaLimits {
    QuotaLimits { requests: None, tokens: Some(tokens) }
}

#[test]
fn reserved_tokens_never_exceed_the_limit_and_none_are_leaked() {
    model(3, || {
        let quota = Quota::new(limits(10)).expect("it has a limit");
        let held = Arc::new(AtomicUsize::new(0));
        // `held` is never more than what is reserved and used.
        let run = |amount: usize, used: Option<u64>| {
            let (quota, held) = (quota.clone(), held.clone());
            move || {
                let Some(hold) = quota.take(1, amount as u64, None) else { return 0 };
                assert!(held.fetch_add(amount, Ordering::SeqCst) + amount <= 10);
                held.fetch_sub(amount - used.unwrap_or(0) as usize, Ordering::SeqCst);
                match used {
                    Some(used) => assert_eq!(hold.settle(used, 2), 0),
                    None => drop(hold),
                }
                used.unwrap_or(0)
            }
        };
        let settles = thread::spawn(run(6, Some(5)));
        let refunds = thread::spawn(run(5, None));
        let used = run(4, Some(4))() + settles.join().unwrap() + refunds.join().unwrap();
        assert_eq!(quota.opens_at(3, 10 - used, None), Some(0), "all that was not used is free");
        assert!(quota.take(3, 10 - used, None).is_some());
    });
}

#[test]
fn the_number_of_free_tokens_is_that_of_the_last_change() {
    model(3, || {
        let quota = Quota::new(limits(10)).expect("it has a limit");
        let refunded = quota.take(1, 6, None).expect("there is room");
        let theirs = quota.clone();
        let reserves = thread::spawn(move || {
            let hold = theirs.take(1, 4, None).expect("there is room");
            assert_eq!(hold.settle(4, 1), 0);
        });
        drop(refunded);
        reserves.join().unwrap();
        assert_eq!(quota.opens_at(2, 6, None), Some(0));
        assert!(quota.opens_at(2, 7, None).is_some_and(|at| at > 2));
        let theirs = quota.clone();
        let lowers = thread::spawn(move || theirs.set_limits(limits(5), 2));
        let held = quota.take(2, 1, None);
        lowers.join().unwrap();
        drop(held);
        assert!(quota.opens_at(2, 2, None).is_some_and(|at| at > 2), "one of five is left");
        assert_eq!(quota.opens_at(2, 1, None), Some(0));
    });
}

#[test]
fn a_budget_is_never_exceeded_and_no_reservation_is_leaked() {
    model(3, || {
        let today = Day::parse("2026-11-25").expect("it is a day");
        let budget = SpendLimit::new(10, Period::Day, today);
        let run = |amount: u64, spent: Option<u64>| {
            let budget = budget.clone();
            move || match (budget.reserve(amount, today), spent) {
                (Ok(reservation), Some(spent)) => {
                    assert_eq!(reservation.settle(spent, today), 0);
                    assert!(budget.spent(today) <= 10);
                    spent
                }
                (Ok(_refunded), None) => 0,
                (Err(Refused::Reserved | Refused::Spent), _) => 0,
            }
        };
        let settles = thread::spawn(run(6, Some(6)));
        let refunds = thread::spawn(run(5, None));
        let spent = run(5, Some(5))() + settles.join().unwrap() + refunds.join().unwrap();
        assert!(spent <= 10, "6 and 5 cannot both pass");
        assert_eq!((budget.spent(today), budget.left(today)), (spent, 10 - spent));
    });
}

#[test]
fn a_settlement_during_a_sync_with_the_ledger_is_not_lost() {
    model(3, || {
        let today = Day::parse("2026-11-25").expect("it is a day");
        let budget = SpendLimit::new(20, Period::Day, today);
        // Another process has spent 2. A request is added to the ledger before it is settled.
        let ledger = Arc::new(AtomicUsize::new(2));
        let theirs = (budget.clone(), ledger.clone());
        let syncs = thread::spawn(move || theirs.0.sync(today, || theirs.1.load(Ordering::SeqCst) as u64));
        let reservation = budget.reserve(4, today).expect("there is room");
        ledger.fetch_add(4, Ordering::SeqCst);
        let _ = reservation.settle(4, today);
        assert!(budget.spent(today) >= 4);
        syncs.join().unwrap();
        let spent = budget.spent(today);
        assert!((6..=10).contains(&spent), "{spent}: at most once too often");
        budget.sync(today, || ledger.load(Ordering::SeqCst) as u64);
        assert_eq!((budget.spent(today), budget.left(today)), (6, 14));
    });
}
