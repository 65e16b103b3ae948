//! Pages that are costly to make, within a share of the time: anyone may ask for them, as often as they like.

use bytes::Bytes;
use parking_lot::Mutex;

use crate::clock;
use crate::policy::allowance::Allowance;
use crate::time::{MILLI, Nanos, SECOND};

/// Time that all workers together spend on pages in a second, before pages are served again: a quarter of a core.
const MOST: Nanos = 250 * MILLI;

/// A page that is costly to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    /// `/metrics`.
    Metrics,
    /// `/status`.
    Status,
}

/// The last text of each page, and the time that was spent on them.
#[derive(Debug, Default)]
pub(crate) struct Pages(Mutex<Budgeted>);

#[derive(Debug, Default)]
struct Budgeted {
    spent: Allowance,
    /// By page: in which second it was made, and its text.
    last: [Option<(u64, Bytes)>; 2],
}

impl Pages {
    /// The text of `page`: made now, or where the time of this second is used up, the last one of this second.
    pub(crate) fn text(&self, page: Page, make: impl FnOnce() -> Bytes) -> Bytes {
        let began = clock::now();
        let kept = self.0.lock().kept(page, began);
        // Others may make it at the same time, each worker once: no worker waits for another.
        kept.unwrap_or_else(|| {
            let text = make();
            self.0.lock().keep(page, began, clock::now(), text.clone());
            text
        })
    }
}

impl Budgeted {
    fn kept(&self, page: Page, now: Nanos) -> Option<Bytes> {
        let (second, text) = self.last[page as usize].as_ref()?;
        (self.spent.used(now) >= MOST && *second >= now / SECOND).then(|| text.clone())
    }

    fn keep(&mut self, page: Page, began: Nanos, ended: Nanos, text: Bytes) {
        self.spent.spend(ended, ended.saturating_sub(began));
        self.last[page as usize] = Some((ended / SECOND, text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks for `page` at `now`, where making it takes `took`: the text, which says when it was made, and when it was here.
    fn ask(state: &mut Budgeted, page: Page, now: Nanos, took: Nanos) -> (Nanos, Nanos) {
        if let Some(text) = state.kept(page, now) {
            return (std::str::from_utf8(&text).unwrap().parse().unwrap(), now);
        }
        state.keep(page, now, now + took, now.to_string().into());
        (now, now + took)
    }

    #[test]
    fn a_flood_costs_a_quarter_of_the_time_and_gets_texts_of_this_second() {
        for took in [MILLI, 10 * MILLI, 100 * MILLI] {
            let (mut state, mut now, mut spent) = (Budgeted::default(), 0, 0);
            while now < 10 * SECOND {
                let (made, then) = ask(&mut state, Page::Metrics, now, took);
                assert!(now - made <= SECOND, "{made} at {now}");
                spent += then - now;
                now = then + MILLI / 10;
            }
            assert!(spent <= 10 * (MOST + took), "{spent} of {took} each");
        }
    }

    #[test]
    fn ordinary_scrapes_are_fresh_and_a_flood_of_one_page_leaves_the_other_a_text_a_second() {
        let mut state = Budgeted::default();
        for now in (0..100).map(|i| i * SECOND / 5) {
            assert_eq!(ask(&mut state, Page::Status, now, 20 * MILLI).0, now);
        }
        let start = 100 * SECOND;
        for i in 0..500 {
            ask(&mut state, Page::Metrics, start + i * MILLI, 10 * MILLI);
        }
        let asked = start + SECOND / 2;
        assert_eq!(ask(&mut state, Page::Status, asked, MILLI).0, asked);
        assert_eq!(ask(&mut state, Page::Status, asked + SECOND / 4, MILLI).0, asked);
        assert_eq!(ask(&mut state, Page::Status, start + SECOND, MILLI).0, start + SECOND);
    }
}
