//! The files that a configuration comes from, and how a change of one is noticed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh64::xxh64;

/// Most bytes of a file that are looked at.
const MAX_BYTES: u64 = 8 << 20;

/// The file of a configuration and the files that it names, each with a fingerprint of its content. A file that cannot
/// be read has one too, so that its appearance is a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files(BTreeMap<PathBuf, u64>);

impl Files {
    /// Adds the file at `path`. Must be called before the file is read: a change in between is noticed then.
    pub(super) fn add(&mut self, path: &Path) {
        self.0.insert(path.to_owned(), fingerprint(path));
    }

    /// The same files as they are now. Reads all of them.
    pub(crate) fn look(&self) -> Files {
        Files(self.0.keys().map(|path| (path.clone(), fingerprint(path))).collect())
    }

    /// The files whose content differs in `later`.
    pub(crate) fn changed<'f>(&'f self, later: &'f Files) -> impl Iterator<Item = &'f Path> {
        let differs = |(path, content): &(&PathBuf, &u64)| later.0.get(*path) != Some(*content);
        self.0.iter().filter(differs).map(|(path, _)| path.as_path())
    }
}

fn fingerprint(path: &Path) -> u64 {
    match content(path) {
        Ok(bytes) => xxh64(&bytes, 0),
        Err(error) => xxh64(error.kind().to_string().as_bytes(), 1),
    }
}

/// The content of a regular file; reading another one could block forever.
fn content(path: &Path) -> io::Result<Vec<u8>> {
    if !path.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_one_of_content_of_existence_or_of_a_link_on_the_way() {
        let folder = std::env::temp_dir().join(format!("zap-files-{}", std::process::id()));
        let [one, two] = ["one", "two"].map(|version| {
            let version = folder.join(version);
            std::fs::create_dir_all(&version).unwrap();
            std::fs::write(version.join("key"), version.to_str().unwrap()).unwrap();
            version
        });
        let data = folder.join("data");
        std::os::unix::fs::symlink(&one, &data).unwrap();
        let (key, missing) = (data.join("key"), folder.join("missing"));
        let mut files = Files::default();
        [&key, &missing, &folder].into_iter().for_each(|path| files.add(path));
        assert_eq!(files.look(), files);
        std::fs::write(&key, one.to_str().unwrap()).unwrap();
        assert_eq!(files.look(), files, "the content is the same");
        std::os::unix::fs::symlink(&two, folder.join("next")).unwrap();
        std::fs::rename(folder.join("next"), &data).unwrap();
        std::fs::write(&missing, "").unwrap();
        let later = files.look();
        assert_eq!(files.changed(&later).collect::<Vec<_>>(), [&*key, &*missing]);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(later.changed(&later.look()).count(), 3, "a folder that is gone is a change too");
    }
}
