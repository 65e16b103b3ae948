//! New certificates, key files and configurations by the swap of a Kubernetes volume, under load over TLS.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::sleep;

use crate::deploys::{Load, RATE, STREAMS};
use crate::load::{Client, Tls};
use crate::provider::Process;
use crate::scenes::check;
use crate::tls_client::Authority;
use crate::zap::{Zap, config};

/// A change must be in effect within this time.
const LIMIT: Duration = Duration::from_secs(2);

const NAME: &str = "zap.test";

/// A volume that changes as those of Kubernetes: a new folder, and a rename of the link to it.
struct Volume {
    path: PathBuf,
    versions: u64,
}

impl Volume {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("zap-soak-{:x}", fastrand::u64(..)));
        std::fs::create_dir(&path).unwrap();
        Volume { path, versions: 0 }
    }

    fn swap(&mut self, files: &[(&str, String)]) {
        self.versions += 1;
        let version = format!("..{}", self.versions);
        std::fs::create_dir(self.path.join(&version)).unwrap();
        for (name, text) in files {
            std::fs::write(self.path.join(&version).join(name), text).unwrap();
            let link = self.path.join(name);
            if link.symlink_metadata().is_err() {
                symlink(Path::new("..data").join(name), link).unwrap();
            }
        }
        symlink(&version, self.path.join("..data_tmp")).unwrap();
        std::fs::rename(self.path.join("..data_tmp"), self.path.join("..data")).unwrap();
        // As the kubelet does.
        let old = self.path.join(format!("..{}", self.versions - 1));
        let _ = std::fs::remove_dir_all(old);
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// What is in effect: the certificate by its number, the end of the backend's key, `queue.max_in_flight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Effect {
    pair: usize,
    key: &'static str,
    most: u64,
}

/// What is wrong with a version of the volume.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Toml,
    Pair,
    MissingKey,
}

/// Two certificates, and what the volume consists of.
struct Files {
    authority: Authority,
    /// Certificate and key as PEM.
    pairs: [(String, String); 2],
    port: u16,
}

impl Files {
    fn new(port: u16) -> Self {
        let authority = Authority::new("soak");
        let pairs = [2040, 2041].map(|year| {
            authority.write(NAME, year);
            let read = |name: String| std::fs::read_to_string(authority.file(&name)).unwrap();
            (read(NAME.into()), read(format!("{NAME}.key")))
        });
        Files { authority, pairs, port }
    }

    fn of(&self, effect: Effect, fault: Option<Fault>) -> Vec<(&'static str, String)> {
        let Effect { pair, key, most } = effect;
        let settings = format!(
            "[[server.tls]]\ncert = \"tls.crt\"\nkey = \"tls.key\"\n[queue]\nmax_in_flight = {most}\n[reload]\nwatch = true\n"
        );
        let mut text =
            config(&settings, &[("a", self.port, "")]).replace("\"sk-soak\"", "{ file = \"key\" }");
        if matches!(fault, Some(Fault::Toml)) {
            text += "[[backends]\n";
        }
        let of_key = if matches!(fault, Some(Fault::Pair)) { 1 - pair } else { pair };
        let mut files = vec![
            ("zap.toml", text),
            ("tls.crt", self.pairs[pair].0.clone()),
            ("tls.key", self.pairs[of_key].1.clone()),
            ("key", format!("sk-soak-{key}\n")),
        ];
        if matches!(fault, Some(Fault::MissingKey)) {
            files.pop();
        }
        files
    }

    fn number(&self, certificate: &[u8]) -> Option<usize> {
        self.pairs.iter().position(|(pem, _)| {
            CertificateDer::from_pem_slice(pem.as_bytes()).is_ok_and(|known| *known == *certificate)
        })
    }

    fn tls(&self) -> Tls {
        (self.authority.client(NAME, None).config, ServerName::try_from(NAME).unwrap())
    }
}

/// A Zap, its volume, and what is in effect.
struct Scene {
    files: Files,
    volume: Volume,
    zap: Rc<Zap>,
    now: Effect,
    longest: Duration,
}

impl Scene {
    /// What a new client meets, and `/status`.
    async fn look(&self) -> Result<(Option<Effect>, Value), String> {
        let (tls, name) = self.files.tls();
        let mut tls = (*tls).clone();
        // A session that is resumed shows the certificate of its first connection.
        tls.resumption = Resumption::disabled();
        let mut client = Client::with_tls(self.zap.address, (tls.into(), name));
        let answer = client.chat("key").await?;
        let certificate = client.certificate().ok_or("no certificate")?;
        let status = client.get("/status").await?;
        let status: Value = serde_json::from_str(&status).map_err(|e| e.to_string())?;
        let answer: Value = serde_json::from_slice(&answer.body).map_err(|e| e.to_string())?;
        let key = answer["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned();
        let key = ["one", "two"].into_iter().find(|known| *known == key);
        let most = status["max_in_flight"].as_u64();
        let effect = self.files.number(&certificate).zip(key).zip(most);
        Ok((effect.map(|((pair, key), most)| Effect { pair, key, most }), status))
    }

    /// Waits until what is in effect, and `/status`, are as they must be. Returns how long that took since `since`.
    async fn until(
        &self,
        since: Instant,
        holds: impl Fn(Option<Effect>, &Value) -> bool,
    ) -> Option<Duration> {
        while since.elapsed() < 5 * LIMIT {
            match self.look().await {
                Ok((effect, status)) if holds(effect, &status) => return Some(since.elapsed()),
                Ok(_) => {}
                Err(e) => println!("    a look failed: {e}"),
            }
            sleep(Duration::from_millis(20)).await;
        }
        None
    }

    /// Shows what Zap has said if something is not as it must be.
    fn judge(&self, what: &str, is_fine: bool) -> bool {
        if !is_fine {
            let said = ["watch", "reload"].iter().flat_map(|event| self.zap.lines(event));
            said.for_each(|line| println!("    zap: {line}"));
        }
        check(what, is_fine)
    }

    /// Swaps the volume so that `next` must come into effect.
    async fn take(&mut self, what: &str, next: Effect) -> bool {
        self.volume.swap(&self.files.of(next, None));
        let is_good = |status: &Value| status["last_reload"]["applied"] == true;
        let took = self.until(Instant::now(), |now, status| now == Some(next) && is_good(status)).await;
        self.now = next;
        self.longest = self.longest.max(took.unwrap_or(Duration::MAX));
        let is_successful = self.zap.metric("zap_config_last_reload_successful", "").await == 1.0;
        let text = format!("{what}: in effect after {took:.1?} of {LIMIT:?}");
        self.judge(&text, took.is_some_and(|took| took <= LIMIT) && is_successful)
    }

    /// Swaps the volume for a bad one, which must change nothing and be seen everywhere; then for a good one again.
    async fn refuse(&mut self, what: &str, next: Effect, fault: Fault) -> bool {
        let before = self.zap.lines("the old configuration stays in effect").len();
        self.volume.swap(&self.files.of(next, Some(fault)));
        let is_rejected = |status: &Value| status["last_reload"]["applied"] == false;
        let seen = self.until(Instant::now(), |_, status| is_rejected(status)).await;
        let (effect, status) = self.look().await.unwrap_or_default();
        let why = status["last_reload"]["fault"].as_str().unwrap_or_default().to_owned();
        let page = "GET / HTTP/1.1\r\nhost: zap\r\naccept: text/html\r\n\r\n";
        let page = self.zap.client().raw(page).await.map(|page| page.body).unwrap_or_default();
        let fine = [
            ("nothing changes", effect == Some(self.now)),
            ("the status says why", !why.is_empty()),
            ("the page says it", String::from_utf8_lossy(&page).contains("was rejected</strong>")),
            ("the metric", self.zap.metric("zap_config_last_reload_successful", "").await == 0.0),
            ("the log", self.zap.lines("the old configuration stays in effect").len() > before),
        ];
        let missed: Vec<_> = fine.iter().filter(|(_, is_fine)| !is_fine).map(|(what, _)| *what).collect();
        println!("    {}", why.lines().next().unwrap_or_default());
        let text = format!(
            "{what}: seen in status, page, metric and log after {seen:.1?}, nothing changed; missed: {missed:?}"
        );
        let fine = self.judge(&text, missed.is_empty() && seen.is_some_and(|seen| seen <= LIMIT));
        fine & self.take("    a good one after it", next).await
    }
}

/// Swaps certificate, key file and configuration, one by one, together, and with faults, `times` times.
pub(crate) async fn run(times: u64) -> bool {
    let provider = Process::start(0, 0);
    let (files, mut volume) = (Files::new(provider.port), Volume::new());
    let now = Effect { pair: 0, key: "one", most: 2000 };
    volume.swap(&files.of(now, None));
    let zap = Rc::new(Zap::start_with(volume.path.join("zap.toml"), Some(files.tls())));
    let mut scene = Scene { files, volume, zap: zap.clone(), now, longest: Duration::ZERO };
    let load = Load::new(move || zap.client());
    let mut fine = true;
    LocalSet::new()
        .run_until(async {
            let running = spawn_local(load.clone().run(20));
            load.more(RATE, STREAMS as u64).await;
            for _ in 0..times {
                let other = |key| if key == "one" { "two" } else { "one" };
                let now = scene.now;
                fine &= scene.take("a certificate", Effect { pair: 1 - now.pair, ..now }).await;
                let now = scene.now;
                fine &= scene.take("a key file", Effect { key: other(now.key), ..now }).await;
                let now = scene.now;
                fine &= scene.take("a configuration", Effect { most: now.most + 1, ..now }).await;
                for (what, fault) in [
                    ("bad TOML", Fault::Toml),
                    ("a certificate with a foreign key", Fault::Pair),
                    ("a missing key file", Fault::MissingKey),
                ] {
                    let now = scene.now;
                    let next = Effect { pair: 1 - now.pair, key: other(now.key), most: now.most + 1 };
                    fine &= scene.refuse(what, next, fault).await;
                }
            }
            load.is_over.set(true);
            running.await.unwrap();
            fine &=
                load.verdict(&format!("{} swaps of a volume, the slowest {:.1?},", 9 * times, scene.longest));
            fine &= check("all gauges are 0 afterwards", scene.zap.held().await.is_empty());
        })
        .await;
    fine
}
