//! A folder with files for the tests.

use std::path::PathBuf;

use crate::config::Config;

/// A folder with these files; dropping it deletes the folder.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn with(files: &[(&str, &str)]) -> Self {
        let name = format!("zap-config-{}-{:x}", std::process::id(), fastrand::u64(..));
        let folder = Folder(std::env::temp_dir().join(name));
        std::fs::create_dir_all(&folder.0).unwrap();
        files.iter().for_each(|(name, text)| folder.write(name, text));
        folder
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.join(name), text).unwrap();
    }

    /// Reads one backend with further lines, which begin at line 4.
    pub(crate) fn read(&self, url: &str, more: &str) -> Result<Config, String> {
        self.parse(&format!("[[backends]]\nurl = \"{url}\"\nweight = 1\n{more}\n"))
    }

    pub(crate) fn parse(&self, text: &str) -> Result<Config, String> {
        Config::parse(text, "test", &self.0, &|_| None).map_err(|faults| faults.to_string())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
