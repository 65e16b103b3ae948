//! `--watch` and `reload.watch`: changes of files that reload the configuration.

use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{CHAT, OK, Running, ask, config, provider, zap};

/// A folder that is deleted on drop.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("zap-watch-{:x}", fastrand::u64(..)));
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("config.toml")
    }

    fn start(&self, arguments: &[&str]) -> Running {
        let mut command = zap();
        command.args(["--config", self.file().to_str().unwrap()]).args(arguments);
        Running::start(&mut command)
    }

    /// Writes a new version of a volume as Kubernetes does: a new folder, and a rename of the link to it.
    fn swap(&self, version: &str, files: &[(&str, &str)]) {
        let folder = self.0.join(version);
        std::fs::create_dir(&folder).unwrap();
        for (name, text) in files {
            std::fs::write(folder.join(name), text).unwrap();
            if !self.0.join(name).exists() {
                symlink(Path::new("..data").join(name), self.0.join(name)).unwrap();
            }
        }
        symlink(version, self.0.join("..data_tmp")).unwrap();
        std::fs::rename(self.0.join("..data_tmp"), self.0.join("..data")).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn metric(zap: &Running, name: &str) -> u64 {
    let text = ask(zap.address, "GET /metrics HTTP/1.1", "");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
}

fn applied(zap: &Running) -> u64 {
    metric(zap, "zap_config_reloads_total{result=\"applied\"}")
}

fn rejected(zap: &Running) -> u64 {
    metric(zap, "zap_config_reloads_total{result=\"rejected\"}")
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn two_providers() -> (SocketAddr, SocketAddr) {
    (provider(OK, Duration::ZERO), provider(OK.replace("ok", "OK").leak(), Duration::ZERO))
}

fn chat(zap: &Running) -> String {
    ask(zap.address, "POST /chat HTTP/1.1", CHAT)
}

#[test]
fn a_volume_of_kubernetes_is_taken_when_its_link_is_swapped() {
    let (a, b) = two_providers();
    let folder = Folder::new();
    let text = |at| config(at, "[reload]\nwatch = true").replace("\"sk-CANARY\"", "{ file = \"key\" }");
    folder.swap("..1", &[("config.toml", &text(a)), ("key", "sk-one")]);
    let zap = folder.start(&[]);
    assert!(chat(&zap).ends_with("ok"));
    let since = metric(&zap, "zap_config_last_reload_success_timestamp_seconds");
    assert!(since > 1_700_000_000, "the start counts");

    folder.swap("..2", &[("config.toml", &text(b)), ("key", "sk-one")]);
    let line = zap.line(" watch: ");
    assert!(line.contains("config.toml changed"), "{line}");
    eventually("the new backend is used", || chat(&zap).ends_with("OK"));
    assert_eq!((applied(&zap), rejected(&zap)), (1, 0));

    folder.swap("..3", &[("config.toml", &text(b)), ("key", "sk-two")]);
    let line = zap.line("key changed");
    assert!(!line.contains("sk-two"), "{line}");
    eventually("the new key is used", || applied(&zap) == 2);
    folder.swap("..4", &[("config.toml", &text(b)), ("key", "sk two")]);
    eventually("a bad key changes nothing", || rejected(&zap) == 1);
    assert!(chat(&zap).ends_with("OK"));
    assert_eq!(metric(&zap, "zap_config_last_reload_successful"), 0);
    folder.swap("..5", &[("config.toml", &text(b)), ("key", "sk-two")]);
    eventually("a good key is used", || applied(&zap) == 3);
    assert_eq!(metric(&zap, "zap_config_last_reload_successful"), 1);
    assert!(metric(&zap, "zap_config_last_reload_success_timestamp_seconds") >= since);
}

#[test]
fn a_half_written_file_and_a_bad_file_change_nothing_and_the_whole_file_is_taken() {
    let (a, b) = two_providers();
    let folder = Folder::new();
    std::fs::write(folder.file(), config(a, "")).unwrap();
    let zap = folder.start(&["--watch"]);
    let next = config(b, "");
    // Not valid until its last line.
    let half = &next[..next.find("weight").unwrap()];
    std::fs::write(folder.file(), half).unwrap();
    eventually("the half is refused", || rejected(&zap) == 1);
    zap.line("the old configuration stays in effect: ");
    assert!(chat(&zap).ends_with("ok"));
    assert_eq!(metric(&zap, "zap_config_last_reload_successful"), 0);
    std::fs::write(folder.file(), &next).unwrap();
    eventually("the whole is taken", || chat(&zap).ends_with("OK"));

    // While it is written slowly, it is not read.
    let before = (applied(&zap), rejected(&zap));
    let slow = config(a, "");
    let (mut written, mut longest) = (Instant::now(), Duration::ZERO);
    for end in (1..=slow.len()).filter(|end| end % 4 == 0 || *end == slow.len()) {
        std::fs::write(folder.file(), &slow[..end]).unwrap();
        longest = longest.max(std::mem::replace(&mut written, Instant::now()).elapsed());
        std::thread::sleep(Duration::from_millis(20));
    }
    eventually("the slow one is taken", || chat(&zap).ends_with("ok"));
    // A busy machine may have made a pause of its own.
    if longest < Duration::from_millis(300) {
        assert_eq!((applied(&zap), rejected(&zap)), (before.0 + 1, before.1));
    }

    std::fs::remove_file(folder.file()).unwrap();
    zap.line("there is no file at");
    // What a refused configuration names is watched too.
    let text = config(b, "").replace("\"sk-CANARY\"", "{ file = \"late\" }");
    std::fs::write(folder.file(), text).unwrap();
    zap.line("no such file");
    std::fs::write(folder.0.join("late"), "sk-late").unwrap();
    eventually("the key is there", || chat(&zap).ends_with("OK"));
}

#[test]
fn without_the_key_a_change_waits_for_a_signal() {
    let (a, b) = two_providers();
    let folder = Folder::new();
    std::fs::write(folder.file(), config(a, "")).unwrap();
    let zap = folder.start(&[]);
    std::fs::write(folder.file(), config(b, "[reload]\nwatch = true")).unwrap();
    // The watch would see it after a second and a half.
    std::thread::sleep(Duration::from_millis(1800));
    assert_eq!((applied(&zap), rejected(&zap)), (0, 0));
    zap.signal("HUP");
    eventually("the signal reloads", || applied(&zap) == 1);
    std::fs::write(folder.file(), config(a, "[reload]\nwatch = true")).unwrap();
    eventually("the new configuration has the watch", || applied(&zap) == 2);
}
