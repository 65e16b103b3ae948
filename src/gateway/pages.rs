//! Pages that are expensive to render. The time spent on them is bounded, since any client may request them at any
//! rate.

use std::sync::Arc;
use std::{fmt, panic, thread};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;

use crate::clock;
use crate::policy::allowance::Allowance;
use crate::time::{MILLI, Nanos, SECOND};

/// Time that is spent on pages in a second; after that, cached pages are served. A quarter of a core.
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
    /// The same, compressed.
    StatusGzip,
    /// `/status` as HTML. Many may look at it, each once a second: they share what is rendered twice a second.
    StatusPage,
    /// The same, compressed.
    StatusPageGzip,
}

impl CachedPage {
    const COUNT: usize = CachedPage::StatusPageGzip as usize + 1;

    /// The same page, compressed.
    pub(crate) fn compressed(self) -> Self {
        match self {
            CachedPage::Metrics | CachedPage::MetricsGzip => CachedPage::MetricsGzip,
            CachedPage::OpenMetrics | CachedPage::OpenMetricsGzip => CachedPage::OpenMetricsGzip,
            CachedPage::Status | CachedPage::StatusGzip => CachedPage::StatusGzip,
            CachedPage::StatusPage | CachedPage::StatusPageGzip => CachedPage::StatusPageGzip,
        }
    }

    /// Whether many look at it at once.
    fn is_shared(self) -> bool {
        self.compressed() == CachedPage::StatusPageGzip
    }
}

/// The pages, with a cache that all workers share. They are rendered on a thread of their own, which begins with the
/// first page that is asked for: a page of hundreds of backends takes tens of milliseconds, and a worker that renders
/// it would keep its requests waiting.
#[derive(Debug, Default)]
pub(crate) struct Pages(Arc<Queue>);

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    /// Notified when a page is wanted, or when the thread must end.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    cache: PageCache,
    /// By page: who waits for it.
    wanted: [Option<Wanted>; CachedPage::COUNT],
    /// The page that was rendered last: the others are next.
    last: usize,
    has_thread: bool,
    is_over: bool,
}

/// A page that must be rendered.
struct Wanted {
    render: Box<dyn FnOnce() -> Bytes + Send>,
    readers: Vec<oneshot::Sender<Bytes>>,
}

impl fmt::Debug for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wanted").field("readers", &self.readers.len()).finish_non_exhaustive()
    }
}

/// The last text of each page, and the time spent on rendering.
#[derive(Debug, Default)]
struct PageCache {
    /// Render time of the current second.
    spent: Allowance,
    /// By page: when it was rendered, and its text.
    last: [Option<(Nanos, Bytes)>; CachedPage::COUNT],
}

/// How much the thread gives way to the workers (`nice`): on a busy core it has a tenth of their time, and a request
/// that arrives interrupts it.
const NICENESS: i32 = 10;

impl Pages {
    /// Returns the text of `page`, from the cache or from `render`. Requests that arrive during a rendering share
    /// the next one, so that no text is older than its request, except a shared one, or if the time of this second is
    /// used up. `None` if `render` panics.
    pub(crate) async fn text(
        &self,
        page: CachedPage,
        render: impl FnOnce() -> Bytes + Send + 'static,
    ) -> Option<Bytes> {
        let rendered = {
            let mut state = self.0.state.lock();
            if let Some(text) = state.cache.get(page, clock::now()) {
                return Some(text);
            }
            state.has_thread = state.has_thread || self.start_thread();
            if !state.has_thread {
                // No thread is left: this worker renders, within the same bound.
                drop(state);
                let began = clock::now();
                let text = render();
                self.0.state.lock().cache.put(page as usize, began, clock::now(), text.clone());
                return Some(text);
            }
            let (reader, rendered) = oneshot::channel();
            let wanted = state.wanted[page as usize].get_or_insert_with(|| Wanted::new(render));
            wanted.readers.push(reader);
            self.0.changed.notify_one();
            rendered
        };
        rendered.await.ok()
    }

    /// Starts the thread; returns `false` if the system has none left.
    fn start_thread(&self) -> bool {
        let queue = self.0.clone();
        thread::Builder::new().name("zap-pages".into()).spawn(move || queue.run()).is_ok()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.0.state.lock().is_over = true;
        self.0.changed.notify_one();
    }
}

impl Wanted {
    fn new(render: impl FnOnce() -> Bytes + Send + 'static) -> Self {
        Wanted { render: Box::new(render), readers: Vec::new() }
    }
}

impl Queue {
    /// Renders the pages that are wanted, one after the other, until the pages are dropped.
    fn run(&self) {
        // Where the system forbids it, the thread competes with the workers as any other.
        let _ = rustix::process::nice(NICENESS);
        let mut state = self.state.lock();
        while !state.is_over {
            let Some((page, Wanted { render, readers })) = state.next() else {
                self.changed.wait(&mut state);
                continue;
            };
            let began = clock::now();
            let text =
                MutexGuard::unlocked(&mut state, || panic::catch_unwind(panic::AssertUnwindSafe(render)));
            // After a panic the readers are dropped, which their requests see.
            let Ok(text) = text else { continue };
            state.cache.put(page, began, clock::now(), text.clone());
            readers.into_iter().for_each(|reader| drop(reader.send(text.clone())));
        }
    }
}

impl State {
    /// The next page that is wanted, in turn.
    fn next(&mut self) -> Option<(usize, Wanted)> {
        let in_turn = (1..=CachedPage::COUNT).map(|i| (self.last + i) % CachedPage::COUNT);
        let page = in_turn.into_iter().find(|page| self.wanted[*page].is_some())?;
        self.last = page;
        Some((page, self.wanted[page].take()?))
    }
}

impl PageCache {
    /// Returns the cached text, if rendering is out of time and the text is of this second, or if the page is shared.
    fn get(&self, page: CachedPage, now: Nanos) -> Option<Bytes> {
        let (rendered, text) = self.last[page as usize].as_ref()?;
        let is_out_of_time = self.spent.used(now) >= MAX_RENDER_TIME;
        let is_shared = page.is_shared() && now < rendered + SHARED;
        (is_shared || is_out_of_time && rendered / SECOND >= now / SECOND).then(|| text.clone())
    }

    /// Stores a text that was rendered from `began` to `ended`.
    fn put(&mut self, page: usize, began: Nanos, ended: Nanos, text: Bytes) {
        self.spent.spend(ended, ended.saturating_sub(began));
        self.last[page] = Some((ended, text));
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
        cache.put(page as usize, now, now + took, now.to_string().into());
        (now, now + took)
    }

    /// Runs a test on a runtime of its own.
    fn within<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
    }

    #[test]
    fn all_who_ask_while_a_page_is_rendered_share_the_next_one() {
        within(async {
            let pages = Pages::default();
            let (begun, has_begun) = oneshot::channel();
            let (go, may_go) = std::sync::mpsc::channel::<()>();
            let renders = Arc::new(std::sync::atomic::AtomicU64::new(0));
            let counted = |text: &'static str| {
                let renders = renders.clone();
                move || {
                    renders.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    Bytes::from_static(text.as_bytes())
                }
            };
            let slow = counted("old");
            let first = pages.text(CachedPage::Metrics, move || {
                begun.send(()).unwrap();
                may_go.recv().unwrap();
                slow()
            });
            let rest = async {
                has_begun.await.unwrap();
                let later = (0..3).map(|_| pages.text(CachedPage::Metrics, counted("new")));
                let later = later.collect::<Vec<_>>();
                let release = async move { go.send(()).unwrap() };
                let [a, b, c] = later.try_into().ok().unwrap();
                tokio::join!(a, b, c, release)
            };
            let (first, (a, b, c, ())) = tokio::join!(first, rest);
            let text = |text: Option<Bytes>| String::from_utf8(text.unwrap().to_vec()).unwrap();
            assert_eq!([first, a, b, c].map(text), ["old", "new", "new", "new"]);
            assert_eq!(renders.load(std::sync::atomic::Ordering::SeqCst), 2);
        });
    }

    #[test]
    fn a_panic_fails_its_page_alone() {
        within(async {
            let pages = Pages::default();
            assert_eq!(pages.text(CachedPage::Status, || panic!("expected by a test")).await, None);
            let text = pages.text(CachedPage::Status, || Bytes::from_static(b"text")).await;
            assert_eq!(text.as_deref(), Some(&b"text"[..]));
        });
    }

    #[test]
    fn the_thread_ends_with_the_pages() {
        within(async {
            let pages = Pages::default();
            pages.text(CachedPage::Status, Bytes::new).await.unwrap();
            let queue = Arc::downgrade(&pages.0);
            drop(pages);
            let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while queue.strong_count() > 0 {
                assert!(std::time::Instant::now() < end, "the thread is still there");
                thread::yield_now();
            }
        });
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
        for page in [CachedPage::StatusPage, CachedPage::StatusPageGzip] {
            let mut cache = PageCache::default();
            for (at, rendered) in [(0, 0), (400, 0), (550, 550), (1000, 550), (1100, 1100)] {
                let text = request(&mut cache, page, at * MILLI, MILLI).0;
                assert_eq!(text, rendered * MILLI, "{at}");
            }
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
