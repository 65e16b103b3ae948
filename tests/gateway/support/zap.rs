//! Zap inside the test process.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tokio::sync::mpsc::Sender;
use zap::internals::{Config, Faults, LoadError, Log, LogFormat, ModelsFrom};
use zap::internals::{Order, Setup, orders};

use super::tls_client::TlsClient;
use super::{Client, Response, eventually};

/// A running gateway; stopped at once when dropped.
pub(crate) struct Zap {
    pub address: SocketAddr,
    /// The address of the admin listener, if the configuration has one.
    pub admin: Option<SocketAddr>,
    /// How [`client`](Self::client) speaks TLS, if it does.
    pub tls: Option<TlsClient>,
    orders: Sender<Order>,
    thread: Option<JoinHandle<bool>>,
    lines: Lines,
}

/// What Zap has logged, if the test reads it.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Zap {
    /// Starts Zap with a configuration text. The defaults are two workers and no request log.
    pub(crate) fn start(text: &str) -> Self {
        Self::run(Config::parse(text, "test", Path::new(""), &|_| None), text, None)
    }

    /// Starts Zap with a configuration text in this environment.
    pub(crate) fn start_in(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Self {
        Self::run(Config::parse(text, "test", Path::new(""), env), text, None)
    }

    /// Starts Zap with these settings and `[[backends]]`, and with a request log for [`lines`](Self::lines).
    pub(crate) fn with_log(settings: &str, backends: &[String]) -> Self {
        let text = format!("{settings}\n[log]\nrequests = true\n{}", backends.concat());
        let config = Config::parse(&text, "test", Path::new(""), &|_| None);
        Self::run(config, &text, Some(Lines::default()))
    }

    /// Starts Zap with a file of these settings and `[[backends]]`, so that it can be [reloaded](Self::reload).
    pub(crate) fn with_file(file: &File, settings: &str, backends: &[String]) -> Self {
        let text = file.write(settings, backends);
        let config = Config::load(&file.0).map_err(|error| match error {
            LoadError::Invalid(faults) => faults,
            LoadError::Missing(path) => panic!("no file at {}", path.display()),
        });
        Self::run(config, &text, None)
    }

    fn run(config: Result<Config, Faults>, text: &str, lines: Option<Lines>) -> Self {
        let mut config = config.unwrap_or_else(|faults| panic!("{faults}"));
        if !text.contains("workers") {
            config.server.workers = 2;
        }
        if !text.contains("models_from") {
            config.models_from = ModelsFrom::Config;
        }
        if !text.contains("[log]") {
            config.log.requests = false;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let admin = config.server.admin.map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let admin_address = admin.as_ref().map(|admin| admin.local_addr().unwrap());
        let setup = Setup::from(listener).with_admin(admin);
        let (orders, receiver) = orders();
        let log = match &lines {
            Some(lines) => Log::to(LogFormat::Json, lines.clone()),
            None => Log::start(config.log.format),
        };
        let thread = std::thread::spawn(move || zap::run(config, log, setup, receiver).unwrap());
        Zap {
            address,
            admin: admin_address,
            tls: None,
            orders,
            thread: Some(thread),
            lines: lines.unwrap_or_default(),
        }
    }

    /// Starts Zap with these settings and `[[backends]]`.
    pub(crate) fn with(settings: &str, backends: &[String]) -> Self {
        Self::start(&format!("{settings}\n{}", backends.concat()))
    }

    pub(crate) fn client(&self) -> Client {
        let client = Client::connect(self.address);
        match &self.tls {
            Some(tls) => client.over_tls(tls),
            None => client,
        }
    }

    /// A client of the admin listener.
    pub(crate) fn operator(&self) -> Client {
        Client::connect(self.admin.unwrap())
    }

    /// Sends one chat on a new connection.
    pub(crate) fn chat(&self, body: impl AsRef<[u8]>) -> Response {
        self.client().chat("", body)
    }

    /// Reloads the configuration file; returns whether the new configuration was applied.
    pub(crate) fn reload(&self) -> bool {
        let count = |result: &str| self.metric(&format!("zap_config_reloads_total{{result=\"{result}\"}}"));
        let before = (count("applied"), count("rejected"));
        self.order(Order::Reload);
        eventually("the reload has ended", || (count("applied"), count("rejected")) != before);
        count("applied") > before.0
    }

    /// Sends a shutdown order.
    pub(crate) fn order(&self, order: Order) {
        self.orders.blocking_send(order).unwrap();
    }

    /// Waits until Zap has stopped; returns whether all requests were finished.
    pub(crate) fn join(mut self) -> bool {
        self.thread.take().unwrap().join().unwrap()
    }

    /// Waits until Zap has stopped; returns all that it has logged.
    pub(crate) fn log_at_end(mut self) -> String {
        self.thread.take().unwrap().join().unwrap();
        self.log()
    }

    /// All samples of `/metrics`, by series.
    pub(crate) fn metrics(&self) -> HashMap<String, f64> {
        samples(self.client().get("/metrics").text())
    }

    /// The sample of `series`; panics if there is no such series.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let all = self.metrics();
        *all.get(series).unwrap_or_else(|| panic!("no series {series}"))
    }

    /// All that was logged: events and requests.
    pub(crate) fn log(&self) -> String {
        String::from_utf8(self.lines.0.lock().unwrap().clone()).unwrap()
    }

    /// Waits until `count` requests to `/v1` or `/chat` are logged. Returns their lines, in order.
    pub(crate) fn lines(&self, count: usize) -> Vec<serde_json::Value> {
        let mut lines = Vec::new();
        eventually("the requests are logged", || {
            let logged = self.log();
            // The last line may be incomplete.
            let whole = &logged[..logged.rfind('\n').map_or(0, |at| at + 1)];
            let served = whole
                .lines()
                .filter(|line| line.contains(",\"path\":\"/v1/") || line.contains(",\"path\":\"/chat"));
            lines = served.map(|line| serde_json::from_str(line).unwrap()).collect();
            lines.len() >= count
        });
        assert_eq!(lines.len(), count);
        lines
    }

    /// The sample of `series` as it is written; `None` if there is no such series.
    pub(crate) fn sample(&self, series: &str) -> Option<String> {
        let page = self.client().get("/metrics");
        let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned);
        page.text().lines().find_map(value)
    }

    /// Waits until no slot, queue entry, backend permit or upstream connection is in use.
    pub(crate) fn wait_until_idle(&self) {
        eventually("all gauges are back at 0", || {
            // With `max_connections`, the connection before this one may still count.
            let answer = self.client().get("/metrics");
            if answer.status != 200 {
                return false;
            }
            let all = samples(answer.text());
            let sum = |name: &str, part: &str| -> f64 {
                all.iter().filter(|(k, _)| k.starts_with(name) && k.contains(part)).map(|(_, v)| *v).sum()
            };
            sum("zap_queue_depth", "") == 0.0
                && sum("zap_in_flight", "") == 0.0
                && sum("zap_upstream_connections", "state=\"active\"") == 0.0
                && self.client().get("/status").json()["in_flight"] == 0
        });
    }
}

/// The samples of a text of metrics, by series.
fn samples(text: &str) -> HashMap<String, f64> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let pairs = samples.map(|line| line.rsplit_once(' ').unwrap());
    pairs.map(|(series, value)| (series.to_owned(), value.parse().unwrap())).collect()
}

/// A configuration file; removed when dropped.
pub(crate) struct File(PathBuf);

impl File {
    pub(crate) fn new() -> Self {
        let name = format!("zap-test-{}-{:x}.toml", std::process::id(), fastrand::u64(..));
        File(std::env::temp_dir().join(name))
    }

    /// Writes these settings and `[[backends]]`, without a request log; returns the text.
    pub(crate) fn write(&self, settings: &str, backends: &[String]) -> String {
        let text = format!("{settings}\n[log]\nrequests = false\n{}", backends.concat());
        std::fs::write(&self.0, &text).unwrap();
        text
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Drop for Zap {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.orders.blocking_send(Order::Now);
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "Zap panicked");
        }
    }
}
