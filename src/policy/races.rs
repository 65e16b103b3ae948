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
