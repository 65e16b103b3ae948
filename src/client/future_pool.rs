//! A pool of the futures that handle requests. A future is allocated once and serves one request after the other.
//!
//! Such a future has some kilobytes. hyper would keep one with every connection, and it would be the largest piece of
//! memory that a request allocates. A future of a dropped request is dropped with it.
//!
//! Benefit: without the pool, `benches/exact.py` counts 2.2 % more instructions and 2 more allocations for each JSON
//! request, and 2.5 % and 2 for each stream. To remove it, let `client::serve` await the handler itself.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// Most unused futures in a worker's pool.
const MAX_FREE: usize = 256;

/// Passes requests `I` to a future, and its responses `O` back.
pub(crate) struct Mailbox<I, O> {
    request: Cell<Option<I>>,
    response: Cell<Option<O>>,
}

impl<I, O> Mailbox<I, O> {
    /// Waits for the next request.
    pub(crate) async fn next(&self) -> I {
        poll_fn(|_| self.request.take().map_or(Poll::Pending, Poll::Ready)).await
    }

    /// Responds to the current request.
    pub(crate) fn reply(&self, response: O) {
        self.response.set(Some(response));
    }
}

struct PooledFuture<I, O, F> {
    future: Pin<Box<F>>,
    mailbox: Rc<Mailbox<I, O>>,
}

/// A worker's pool. The future that was used last is used first.
pub(crate) struct FuturePool<I, O, F> {
    free: RefCell<Vec<PooledFuture<I, O, F>>>,
    make: Make<I, O, F>,
}

type Make<I, O, F> = Box<dyn Fn(Rc<Mailbox<I, O>>) -> F>;

/// The answer to one request, which has a future to itself until it is there.
pub(crate) struct Running<I, O, F> {
    future: Option<PooledFuture<I, O, F>>,
    pool: Rc<FuturePool<I, O, F>>,
}

impl<I, O, F> fmt::Debug for FuturePool<I, O, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FuturePool").finish_non_exhaustive()
    }
}

impl<I, O, F> fmt::Debug for Running<I, O, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").finish_non_exhaustive()
    }
}

impl<I, O> fmt::Debug for Mailbox<I, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}

impl<I, O, F: Future> FuturePool<I, O, F> {
    /// Creates an empty pool. `make` creates the future that serves the requests of a mailbox.
    pub(crate) fn new(make: impl Fn(Rc<Mailbox<I, O>>) -> F + 'static) -> Rc<Self> {
        Rc::new(FuturePool { free: RefCell::default(), make: Box::new(make) })
    }

    /// Passes a request to a future of the pool, or to a new one.
    pub(crate) fn run(self: &Rc<Self>, request: I) -> Running<I, O, F> {
        let free = self.free.borrow_mut().pop();
        let future = free.unwrap_or_else(|| {
            let mailbox = Rc::new(Mailbox { request: Cell::default(), response: Cell::default() });
            PooledFuture { future: Box::pin((self.make)(mailbox.clone())), mailbox }
        });
        future.mailbox.request.set(Some(request));
        Running { future: Some(future), pool: self.clone() }
    }
}

impl<I, O, F: Future> Future for Running<I, O, F> {
    type Output = Result<O, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let Some(future) = &mut this.future else { return Poll::Pending };
        // The future never ends; the mailbox tells whether it has responded.
        let _ = future.future.as_mut().poll(cx);
        let Some(response) = future.mailbox.response.take() else { return Poll::Pending };
        let mut free = this.pool.free.borrow_mut();
        if free.len() < MAX_FREE {
            free.extend(this.future.take());
        }
        Poll::Ready(Ok(response))
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Waker;

    use super::*;

    #[test]
    fn a_future_is_reused_and_is_dropped_with_a_dropped_request() {
        let made = Rc::new(Cell::new(0));
        let count = made.clone();
        // Each request needs two polls.
        let pool = FuturePool::new(move |mailbox: Rc<Mailbox<u32, u32>>| {
            count.set(count.get() + 1);
            async move {
                loop {
                    let request = mailbox.next().await;
                    let mut polled = false;
                    poll_fn(|_| {
                        if std::mem::replace(&mut polled, true) { Poll::Ready(()) } else { Poll::Pending }
                    })
                    .await;
                    mailbox.reply(request + 1);
                }
            }
        });
        let mut cx = Context::from_waker(Waker::noop());
        let free = || pool.free.borrow().len();
        for request in 0..3 {
            let mut running = pin!(pool.run(request));
            assert!(running.as_mut().poll(&mut cx).is_pending());
            assert_eq!(running.as_mut().poll(&mut cx), Poll::Ready(Ok(request + 1)));
            assert_eq!((made.get(), free()), (1, 1));
        }
        assert!(pin!(pool.run(0)).poll(&mut cx).is_pending(), "dropped at once");
        assert_eq!((made.get(), free()), (1, 0));
        let mut dropped = Box::pin(pool.run(7));
        assert!(dropped.as_mut().poll(&mut cx).is_pending());
        drop(dropped);
        assert_eq!((made.get(), free()), (2, 0));
        let mut many: Vec<_> = (0..MAX_FREE as u32 + 9).map(|n| Box::pin(pool.run(n))).collect();
        for running in &mut many {
            assert!(running.as_mut().poll(&mut cx).is_pending());
            assert!(running.as_mut().poll(&mut cx).is_ready());
        }
        assert_eq!((made.get(), free()), (MAX_FREE + 11, MAX_FREE), "no more are kept");
    }

    #[test]
    fn an_unused_future_holds_nothing_of_its_last_request() {
        let pool = FuturePool::new(|mailbox: Rc<Mailbox<Rc<()>, ()>>| async move {
            loop {
                let _held = mailbox.next().await;
                mailbox.reply(());
            }
        });
        let held = Rc::new(());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(pin!(pool.run(held.clone())).poll(&mut cx).is_ready());
        assert_eq!((Rc::strong_count(&held), pool.free.borrow().len()), (1, 1));
        drop(pool.run(held.clone()));
        assert_eq!((Rc::strong_count(&held), pool.free.borrow().len()), (1, 0), "never polled");
    }
}
