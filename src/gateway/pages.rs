//! Pages that are expensive to render. The time spent on them is bounded, since any client may request them at any
//! rate.

use bytes::Bytes;
use parking_lot::Mutex;

use crate::clock;
use crate::policy::allowance::Allowance;
use crate::time::{MILLI, Nanos, SECOND};

/// Time that all workers together spend on pages in a second; after that, cached pages are served. A quarter of a core.
const MAX_RENDER_TIME: Nanos = 250 * MILLI;

/// How old a page may be that is shared even if there is time to render it again.
const SHARED: Nanos = SECOND / 2;

/// A page that is expensive to render.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CachedPage {
    /// `/metrics`.
    Metrics,
    /// The same, compressed.
    MetricsGzip,
    /// `/metrics` as OpenMetrics.
    OpenMetrics,
    /// The same, compressed.
    OpenMetricsGzip,
    /// `/status`.
    Status,
    /// `/status` as HTML. Many may look at it, each once a second: they share what is rendered twice a second.
    StatusPage,
}

/// The number of pages.
const PAGES: usize = CachedPage::StatusPage as usize + 1;

/// The pages, with a cache that all workers share.
#[derive(Debug, Default)]
pub(crate) struct Pages(Mutex<PageCache>);

/// The last text of each page, and the time spent on rendering.
#[derive(Debug, Default)]
struct PageCache {
    /// Render time of the current second.
    spent: Allowance,
    /// By page: when it was rendered, and its text.
    last: [Option<(Nanos, Bytes)>; PAGES],
}

impl Pages {
    /// Returns the text of `page`. Calls `render`, unless the time of this second is used up and the cache has a text
    /// of this second.
    pub(crate) fn text(&self, page: CachedPage, render: impl FnOnce() -> Bytes) -> Bytes {
        let began = clock::now();
        let cached = self.0.lock().get(page, began);
        // The lock is not held while a page is rendered, so several workers may render it at once: no worker waits for
        // another one.
        cached.unwrap_or_else(|| {
            let text = render();
            self.0.lock().put(page, began, clock::now(), text.clone());
            text
        })
    }
}

impl PageCache {
    /// Returns the cached text, if rendering is out of time and the text is of this second, or if the page is shared.
    fn get(&self, page: CachedPage, now: Nanos) -> Option<Bytes> {
        let (rendered, text) = self.last[page as usize].as_ref()?;
        let is_out_of_time = self.spent.used(now) >= MAX_RENDER_TIME;
        let is_shared = page == CachedPage::StatusPage && now < rendered + SHARED;
        (is_shared || is_out_of_time && rendered / SECOND >= now / SECOND).then(|| text.clone())
    }

    /// Stores a text that was rendered from `began` to `ended`.
    fn put(&mut self, page: CachedPage, began: Nanos, ended: Nanos, text: Bytes) {
        self.spent.spend(ended, ended.saturating_sub(began));
        self.last[page as usize] = Some((ended, text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests `page` at `now`; rendering takes `took`. Returns when the text was rendered, and when it was ready.
    fn request(cache: &mut PageCache, page: CachedPage, now: Nanos, took: Nanos) -> (Nanos, Nanos) {
        if let Some(text) = cache.get(page, now) {
            return (std::str::from_utf8(&text).unwrap().parse().unwrap(), now);
        }
        cache.put(page, now, now + took, now.to_string().into());
        (now, now + took)
    }

    #[test]
    fn a_flood_uses_a_quarter_of_a_core_and_gets_texts_at_most_a_second_old() {
        for took in [MILLI, 10 * MILLI, 100 * MILLI] {
            let (mut cache, mut now, mut spent) = (PageCache::default(), 0, 0);
            while now < 10 * SECOND {
                let (rendered, ready) = request(&mut cache, CachedPage::Metrics, now, took);
                assert!(now - rendered <= SECOND, "a text of {rendered} was served at {now}");
                spent += ready - now;
                now = ready + MILLI / 10;
            }
            assert!(spent <= 10 * (MAX_RENDER_TIME + took), "{spent} ns spent, {took} ns for each page");
        }
    }

    #[test]
    fn those_who_look_at_the_status_page_share_it_for_half_a_second() {
        let mut cache = PageCache::default();
        for (at, rendered) in [(0, 0), (400, 0), (550, 550), (1000, 550), (1100, 1100)] {
            let page = request(&mut cache, CachedPage::StatusPage, at * MILLI, MILLI).0;
            assert_eq!(page, rendered * MILLI, "{at}");
        }
    }

    #[test]
    fn normal_scrapes_are_fresh_and_a_flood_of_one_page_leaves_the_other_one_text_a_second() {
        let mut cache = PageCache::default();
        for now in (0..100).map(|i| i * SECOND / 5) {
            assert_eq!(request(&mut cache, CachedPage::Status, now, 20 * MILLI).0, now);
        }
        let start = 100 * SECOND;
        for i in 0..500 {
            request(&mut cache, CachedPage::Metrics, start + i * MILLI, 10 * MILLI);
        }
        let asked = start + SECOND / 2;
        assert_eq!(request(&mut cache, CachedPage::Status, asked, MILLI).0, asked);
        assert_eq!(request(&mut cache, CachedPage::Status, asked + SECOND / 4, MILLI).0, asked);
        assert_eq!(request(&mut cache, CachedPage::Status, start + SECOND, MILLI).0, start + SECOND);
    }
}
