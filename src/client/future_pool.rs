//! Room for the futures of requests: taken from the heap once, then used by one request after the other.
//!
//! Such a future has some kilobytes, which hyper would keep with every connection as long as it lives, and which would
//! be the largest piece of memory that a request takes and gives back. So a future here serves requests for ever, one
//! at a time, and is not moved or made anew between two of them; one whose request is given up goes with it.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// Futures that a worker keeps for later: as many as requests usually wait at a time.
const MAX_FREE: usize = 256;

/// Where a future finds its requests `I` and leaves their answers `O`.
pub struct Desk<I, O> {
    request: Cell<Option<I>>,
    answer: Cell<Option<O>>,
}

impl<I, O> Desk<I, O> {
    /// The next request.
    pub async fn next(&self) -> I {
        poll_fn(|_| self.request.take().map_or(Poll::Pending, Poll::Ready)).await
    }

    /// Leaves the answer to it.
    pub fn leave(&self, answer: O) {
        self.answer.set(Some(answer));
    }
}

struct Room<I, O, F> {
    future: Pin<Box<F>>,
    desk: Rc<Desk<I, O>>,
}

/// A worker's rooms, the youngest one used first.
pub struct Rooms<I, O, F> {
    free: RefCell<Vec<Room<I, O, F>>>,
    furnish: Furnish<I, O, F>,
}

type Furnish<I, O, F> = Box<dyn Fn(Rc<Desk<I, O>>) -> F>;

/// The answer to one request, which has a room to itself until it is there.
pub struct Lodged<I, O, F> {
    room: Option<Room<I, O, F>>,
    rooms: Rc<Rooms<I, O, F>>,
}

impl<I, O, F> fmt::Debug for Rooms<I, O, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rooms").finish_non_exhaustive()
    }
}

impl<I, O, F> fmt::Debug for Lodged<I, O, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lodged").finish_non_exhaustive()
    }
}

impl<I, O> fmt::Debug for Desk<I, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

impl<I, O, F: Future> Rooms<I, O, F> {
    /// No room yet. `furnish` makes the future that serves what comes to a desk.
    pub fn new(furnish: impl Fn(Rc<Desk<I, O>>) -> F + 'static) -> Rc<Self> {
        Rc::new(Rooms { free: RefCell::default(), furnish: Box::new(furnish) })
    }

    /// Puts a request into a room.
    pub fn lodge(self: &Rc<Self>, request: I) -> Lodged<I, O, F> {
        let free = self.free.borrow_mut().pop();
        let room = free.unwrap_or_else(|| {
            let desk = Rc::new(Desk { request: Cell::default(), answer: Cell::default() });
            Room { future: Box::pin((self.furnish)(desk.clone())), desk }
        });
        room.desk.request.set(Some(request));
        Lodged { room: Some(room), rooms: self.clone() }
    }
}

impl<I, O, F: Future> Future for Lodged<I, O, F> {
    type Output = Result<O, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let Some(room) = &mut this.room else { return Poll::Pending };
        // It does not end: what it leaves is what counts.
        let _ = room.future.as_mut().poll(cx);
        let Some(answer) = room.desk.answer.take() else { return Poll::Pending };
        let mut free = this.rooms.free.borrow_mut();
        if free.len() < MAX_FREE {
            free.extend(this.room.take());
        }
        Poll::Ready(Ok(answer))
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Waker;

    use super::*;

    #[test]
    fn a_future_serves_one_request_after_the_other_and_goes_with_one_that_is_given_up() {
        let made = Rc::new(Cell::new(0));
        let count = made.clone();
        // It asks to be polled twice.
        let rooms = Rooms::new(move |desk: Rc<Desk<u32, u32>>| {
            count.set(count.get() + 1);
            async move {
                loop {
                    let request = desk.next().await;
                    let mut polled = false;
                    poll_fn(|_| {
                        if std::mem::replace(&mut polled, true) { Poll::Ready(()) } else { Poll::Pending }
                    })
                    .await;
                    desk.leave(request + 1);
                }
            }
        });
        let mut cx = Context::from_waker(Waker::noop());
        let free = || rooms.free.borrow().len();
        for request in 0..3 {
            let mut lodged = pin!(rooms.lodge(request));
            assert!(lodged.as_mut().poll(&mut cx).is_pending());
            assert_eq!(lodged.as_mut().poll(&mut cx), Poll::Ready(Ok(request + 1)));
            assert_eq!((made.get(), free()), (1, 1));
        }
        assert!(pin!(rooms.lodge(0)).poll(&mut cx).is_pending(), "dropped at once");
        assert_eq!((made.get(), free()), (1, 0));
        let mut given_up = Box::pin(rooms.lodge(7));
        assert!(given_up.as_mut().poll(&mut cx).is_pending());
        drop(given_up);
        assert_eq!((made.get(), free()), (2, 0));
        let mut many: Vec<_> = (0..MAX_FREE as u32 + 9).map(|n| Box::pin(rooms.lodge(n))).collect();
        for lodged in &mut many {
            assert!(lodged.as_mut().poll(&mut cx).is_pending());
            assert!(lodged.as_mut().poll(&mut cx).is_ready());
        }
        assert_eq!((made.get(), free()), (MAX_FREE + 11, MAX_FREE), "no more are kept");
    }

    #[test]
    fn a_free_room_holds_nothing_of_its_last_request() {
        let rooms = Rooms::new(|desk: Rc<Desk<Rc<()>, ()>>| async move {
            loop {
                let _held = desk.next().await;
                desk.leave(());
            }
        });
        let held = Rc::new(());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(pin!(rooms.lodge(held.clone())).poll(&mut cx).is_ready());
        assert_eq!((Rc::strong_count(&held), rooms.free.borrow().len()), (1, 1));
        drop(rooms.lodge(held.clone()));
        assert_eq!((Rc::strong_count(&held), rooms.free.borrow().len()), (1, 0), "never polled");
    }
}
