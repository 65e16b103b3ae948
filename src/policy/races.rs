//! Every interleaving, within a bound, of what threads do to the atomics of the policies: loom's models.
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

/// All interleavings with at most so many preemptions: most races need two (Musuvathi and Qadeer 2007).
fn model(preemptions: usize, run: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(run);
}

fn is_idle(admission: &Admission) -> bool {
    (admission.in_flight(), admission.depth()) == (0, 0)
}

/// Waits for a slot, if there is a place to wait at.
fn wait(admission: &Arc<Admission>) -> Option<Permit> {
    match admission.enter() {
        Ok(Admitted::Passed(slot)) => Some(slot),
        Ok(Admitted::Queued(place)) => Some(block_on(place)),
        Err(QueueFull) => None,
    }
}

#[test]
fn a_slot_is_one_threads_at_a_time_and_no_wakeup_is_lost() {
    model(3, || {
        let admission = Admission::new(1, 2);
        let inside = Arc::new(AtomicUsize::new(0));
        let run = |admission: Arc<Admission>, inside: Arc<AtomicUsize>| {
            move || {
                let slot = wait(&admission).expect("there is a place for both");
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                inside.fetch_sub(1, Ordering::SeqCst);
                drop(slot);
            }
        };
        let threads = [(); 2].map(|()| thread::spawn(run(admission.clone(), inside.clone())));
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert!(is_idle(&admission));
    });
}

#[test]
fn one_that_gives_up_takes_no_slot_with_it() {
    model(2, || {
        let admission = Admission::new(1, 2);
        let slot = wait(&admission).expect("it is free");
        let leaver = admission.enter().expect("a place");
        let theirs = admission.clone();
        let stays = thread::spawn(move || drop(wait(&theirs).expect("a place")));
        let leaves = thread::spawn(move || drop(leaver));
        drop(slot);
        stays.join().unwrap();
        leaves.join().unwrap();
        assert!(is_idle(&admission));
        assert!(admission.try_pass().is_some());
    });
}

#[test]
fn who_does_not_wait_takes_no_more_than_there_is() {
    model(3, || {
        let admission = Admission::new(1, 1);
        let held = Arc::new(AtomicUsize::new(0));
        let run = |admission: Arc<Admission>, held: Arc<AtomicUsize>| {
            move || {
                if let Some(slot) = admission.try_pass() {
                    assert_eq!(held.fetch_add(1, Ordering::SeqCst), 0);
                    held.fetch_sub(1, Ordering::SeqCst);
                    drop(slot);
                }
            }
        };
        let other = thread::spawn(run(admission.clone(), held.clone()));
        let waits = {
            let (admission, held) = (admission.clone(), held.clone());
            thread::spawn(move || {
                if let Some(slot) = wait(&admission) {
                    assert_eq!(held.fetch_add(1, Ordering::SeqCst), 0);
                    held.fetch_sub(1, Ordering::SeqCst);
                    drop(slot);
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
fn a_new_limit_reaches_those_who_wait() {
    model(3, || {
        let admission = Admission::new(1, 1);
        let _held = wait(&admission).expect("it is free");
        let theirs = admission.clone();
        // Nothing but the new limit frees a slot for this one.
        let waits = thread::spawn(move || drop(wait(&theirs).expect("a place")));
        admission.resize(2, 1);
        waits.join().unwrap();
        assert_eq!((admission.in_flight(), admission.depth()), (1, 0));
    });
}

#[test]
fn a_slot_that_is_given_back_while_the_limit_changes_is_not_lost() {
    model(3, || {
        let admission = Admission::new(1, 2);
        let slot = wait(&admission).expect("it is free");
        let queued = || match admission.enter() {
            Ok(Admitted::Queued(place)) => place,
            other => panic!("no place: {other:?}"),
        };
        let (first, second) = (queued(), queued());
        let gives_back = thread::spawn(move || drop(slot));
        admission.resize(2, 2);
        gives_back.join().unwrap();
        // There is a slot for each, whatever came first; neither is given back.
        let held = (block_on(first), block_on(second));
        assert_eq!((admission.in_flight(), admission.depth()), (2, 0));
        drop(held);
        assert!(is_idle(&admission));
    });
}

#[test]
fn a_turn_gives_each_its_weight_over_all_threads() {
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
fn one_change_of_state_has_one_author() {
    model(3, || {
        let breaker = Arc::new(Breaker::new());
        let failures = |breaker: Arc<Breaker>, n: usize| {
            move || (0..n).filter(|_| breaker.failure(LIMITS) == Some(Change::Down)).count()
        };
        let other = thread::spawn(failures(breaker.clone(), 2));
        let mine = failures(breaker.clone(), 1)();
        assert_eq!(mine + other.join().unwrap(), 1);
        assert_eq!(breaker.status(1), Status::Ejected);
    });
}

#[test]
fn ups_and_downs_take_turns_whatever_meets() {
    model(3, || {
        let breaker = Arc::new(Breaker::new());
        let theirs = breaker.clone();
        let traffic = thread::spawn(move || {
            let downs = (0..2).filter(|_| theirs.failure(LIMITS) == Some(Change::Down)).count();
            theirs.success(1);
            downs
        });
        let ups = usize::from(breaker.probed(Probe::Alive, LIMITS, 1) == Some(Change::Up));
        let downs = traffic.join().unwrap();
        let is_out = breaker.status(1) == Status::Ejected;
        assert_eq!(downs - ups, usize::from(is_out));
    });
}
