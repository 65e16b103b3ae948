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
use crate::policy::queue::{Admission, Admitted, Permit, QueueFull};
use crate::policy::reservation::BackendTokens;
use crate::policy::spend::{Period, Refused, SpendLimit};

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
    match admission.enter() {
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
        let leaver = admission.enter().expect("the queue has room");
        let theirs = admission.clone();
        let stays = thread::spawn(move || drop(wait(&theirs).expect("the queue has room")));
        let leaves = thread::spawn(move || drop(leaver));
        drop(permit);
        stays.join().unwrap();
        leaves.join().unwrap();
        assert!(is_idle(&admission));
        assert!(admission.try_pass().is_some());
    });
}

#[test]
fn try_pass_never_exceeds_the_slots() {
    model(3, || {
        let admission = Admission::new(1, 1);
        let held = Arc::new(AtomicUsize::new(0));
        let run = |admission: Arc<Admission>, held: Arc<AtomicUsize>| {
            move || {
                if let Some(permit) = admission.try_pass() {
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
        let queued = || match admission.enter() {
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

#[test]
fn reserved_tokens_never_exceed_the_limit_and_none_are_leaked() {
    model(3, || {
        let tokens = BackendTokens::new(10);
        let held = Arc::new(AtomicUsize::new(0));
        // `held` is never more than what is reserved and used.
        let run = |amount: usize, used: Option<u64>| {
            let (tokens, held) = (tokens.clone(), held.clone());
            move || {
                let Some(reservation) = tokens.try_reserve(amount as u64, 1) else { return 0 };
                assert!(held.fetch_add(amount, Ordering::SeqCst) + amount <= 10);
                held.fetch_sub(amount - used.unwrap_or(0) as usize, Ordering::SeqCst);
                match used {
                    Some(used) => assert_eq!(reservation.settle(used, 2), 0),
                    None => drop(reservation),
                }
                used.unwrap_or(0)
            }
        };
        let settles = thread::spawn(run(6, Some(5)));
        let refunds = thread::spawn(run(5, None));
        let used = run(4, Some(4))() + settles.join().unwrap() + refunds.join().unwrap();
        assert_eq!(tokens.opens_at(3, 10 - used), Some(3), "all that was not used is free");
        assert!(tokens.try_reserve(10 - used, 3).is_some());
    });
}

#[test]
fn the_number_of_free_tokens_is_that_of_the_last_change() {
    model(3, || {
        let tokens = BackendTokens::new(10);
        let refunded = tokens.try_reserve(6, 1).expect("there is room");
        let theirs = tokens.clone();
        let reserves = thread::spawn(move || theirs.try_reserve(4, 1).expect("there is room"));
        drop(refunded);
        let held = reserves.join().unwrap();
        assert_eq!((tokens.opens_at(2, 6), tokens.opens_at(2, 7)), (Some(2), None));
        let theirs = tokens.clone();
        let limits = thread::spawn(move || theirs.set_limit(5));
        drop(held);
        limits.join().unwrap();
        let whole = tokens.try_reserve(10, 2).expect("the whole limit is free");
        assert_eq!((tokens.opens_at(2, 1), whole.settle(10, 2)), (None, 5));
    });
}

#[test]
fn a_budget_is_never_exceeded_and_no_reservation_is_leaked() {
    model(3, || {
        let budget = SpendLimit::new(10, Period::Day);
        let run = |amount: u64, spent: Option<u64>| {
            let budget = budget.clone();
            move || match (budget.reserve(amount, 1), spent) {
                (Ok(reservation), Some(spent)) => {
                    assert_eq!(reservation.settle(spent, 1), 0);
                    assert!(budget.spent(1) <= 10);
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
        assert_eq!((budget.spent(1), budget.left(1)), (spent, 10 - spent));
    });
}

#[test]
fn a_settlement_during_a_sync_with_the_ledger_counts_once() {
    model(3, || {
        let budget = SpendLimit::new(10, Period::Day);
        budget.reserve(3, 1).expect("there is room").settle(3, 1);
        let theirs = budget.clone();
        // The ledger has written the first 3; another process has spent 2.
        let syncs = thread::spawn(move || theirs.synced(5, 3, 1));
        let other = budget.clone();
        let settles = thread::spawn(move || other.reserve(4, 1).map(|r| r.settle(4, 1)));
        let seen = budget.spent(1);
        assert!([3, 5, 7, 9].contains(&seen), "{seen}");
        syncs.join().unwrap();
        settles.join().unwrap().expect("there is room in any order");
        assert_eq!((budget.spent(1), budget.left(1)), (9, 1));
    });
}
