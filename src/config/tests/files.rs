//! What depends on files: keys, certificates, the ledger and the configuration itself.

use std::fs;
use std::path::PathBuf;

use crate::config::file::MAX_FILE_BYTES;
use crate::config::tests::{BACKEND, env};
use crate::config::{Config, LoadError};

/// A fresh directory; dropping it deletes the directory.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("zap-config-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn file_paths_are_relative_and_one_trailing_newline_is_dropped() {
    let directory = Directory::new("files");
    for (content, expected) in [
        ("sk-1", Ok("sk-1")),
        ("sk-1\n", Ok("sk-1")),
        ("sk-1\r\n", Ok("sk-1")),
        ("sk-CANARY\n\n", Err("contains a space")),
        ("sk-CANARY\r", Err("contains a space")),
        ("\n", Err("is empty")),
        ("", Err("is empty")),
    ] {
        let ca_file = directory.write("key", content);
        let text = format!("{BACKEND}api_key = {{ file = \"key\" }}\nca_file = \"key\"\n");
        match (Config::parse(&text, "f", &directory.0, &env), expected) {
            (Ok(config), Ok(key)) => {
                assert_eq!(config.backends[0].api_key.as_ref().unwrap().expose(), key);
                assert_eq!(config.backends[0].ca_file, Some(ca_file));
            }
            (Err(faults), Err(part)) => {
                assert!(faults.lines()[0].starts_with("f:4: `backends[0].api_key`"), "{faults}");
                assert!(faults.to_string().contains(part), "{faults}");
                assert!(!faults.to_string().contains("CANARY"), "{faults}");
            }
            (got, _) => panic!("{content:?}: {got:?}"),
        }
    }
    let text = format!("{BACKEND}ca_file = \".\"\napi_key = {{ file = \"/dev/zero\" }}\n");
    let faults = Config::parse(&text, "f", &directory.0, &env).unwrap_err();
    assert_eq!(faults.lines().len(), 2, "{faults}");
    assert!(faults.to_string().contains("not a regular file"), "{faults}");
}

#[test]
fn load_distinguishes_a_missing_file_from_an_invalid_one() {
    let directory = Directory::new("load");
    let missing = directory.0.join("none.toml");
    let error = Config::load(&missing).unwrap_err();
    assert_eq!(error, LoadError::Missing(missing));
    let large = vec![b'\n'; MAX_FILE_BYTES as usize + 1];
    for (name, content, what) in [
        ("latin1", &b"[server]\nport = 1\n# Stra\xdfe\n"[..], "3: the file is not UTF-8 at this line; "),
        ("utf16", b"\xff\xfe[\0s\0", "1: the file is UTF-16, as PowerShell writes it; "),
        ("large", &large, "1: the file is too large; "),
    ] {
        let path = directory.write(name, content);
        let error = Config::load(&path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}:{what}", path.display())), "{error}");
    }
    let error = Config::load(&directory.0).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}:1: ", directory.0.display())), "{error}");
}

#[cfg(unix)]
#[test]
fn a_world_readable_key_causes_a_warning() {
    use std::os::unix::fs::PermissionsExt;
    let directory = Directory::new("mode");
    directory.write("key", "k");
    for (key, mode, warnings) in [
        ("api_key = \"sk-CANARY\"", 0o644, 1),
        ("api_key = \"sk-CANARY\"", 0o640, 0),
        ("api_key = { file = \"key\" }", 0o644, 0),
        ("api_key = \"${PATH}\"", 0o644, 0),
        ("api_key = \"sk-${PATH}\"", 0o644, 1),
        ("[[client_keys]]\nname = \"t\"\nkey = \"sk-CANARY\"", 0o644, 1),
        ("[[client_keys]]\nname = \"t\"\nkey = \"sk-CANARY\"", 0o640, 0),
        ("[[client_keys]]\nname = \"t\"\nkey = { file = \"key\" }", 0o644, 0),
        ("[[client_keys]]\nname = \"t\"\nkey = \"${PATH}\"", 0o644, 0),
        ("", 0o644, 0),
    ] {
        let path = directory.write("config.toml", format!("server.host = \"127.0.0.1\"\n{BACKEND}{key}\n"));
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let config = Config::load(&path).unwrap();
        assert_eq!(config.warnings.len(), warnings, "{key} {mode:o}");
        assert!(!config.warnings.concat().contains("CANARY"));
    }
}

#[test]
fn the_path_of_the_ledger_is_relative_and_must_be_able_to_become_a_file() {
    let directory = Directory::new("ledger");
    directory.write("old.db", "");
    let read = |path: &str| {
        let text = format!("[ledger]\npath = \"{path}\"\n{BACKEND}");
        Config::parse(&text, "f", &directory.0, &env).map_err(|faults| faults.to_string())
    };
    for path in ["new.db", "old.db", "sub/zap.db"] {
        assert_eq!(read(path).unwrap().ledger, Some(directory.0.join(path)), "{path}");
    }
    for (path, what) in [
        ("", "is empty"),
        (".", "is a directory"),
        ("sk-CANARY/", "is a directory"),
        ("/dev/null", "is not a regular file"),
        ("old.db/zap.db", "cannot be used (not a directory)"),
    ] {
        let allowed = "must be the path of a file, relative to the directory of the configuration";
        let expected = format!("f:2: `ledger.path` {what}; {allowed}");
        assert_eq!(read(path).unwrap_err(), expected, "{path}");
    }
}
