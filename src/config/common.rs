//! Keys and ranges that several sections share.

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use crate::config::files::Files;
use crate::config::range::{Number, Range};
use crate::config::text::Text;
use crate::config::toml_reader::Section;

pub(super) const IN_FLIGHT: Range<usize> = Range::new(1, 1_000_000);
pub(super) const REQUESTS_PER_MINUTE: Range<u32> = Range::new(1, u32::MAX);
pub(super) const TOKENS_PER_MINUTE: Range<u64> = Range::new(1, 1_000_000_000_000);
/// A time in whole seconds.
pub(super) const SECONDS: Range<u64> = Range::new(1, 86_400);
pub(super) const WEIGHT: Range<u32> = Range::new(0, 1000);
pub(super) const PRIORITY: Number<u32> = Range::new(0, 1000).or(0);
/// Longest backend name, in bytes.
pub(super) const MAX_NAME: usize = 64;

/// The surroundings of a configuration: the files that the text refers to.
pub(super) struct Context<'a> {
    /// The directory of relative paths.
    pub(super) base: &'a Path,
    /// The files that were named so far.
    pub(super) files: RefCell<Files>,
}

impl Context<'_> {
    /// The path of a file that is about to be read.
    pub(super) fn file(&self, name: &Text) -> PathBuf {
        let path = self.base.join(&name.value);
        self.files.borrow_mut().add(&path);
        path
    }
}

pub(super) fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

/// Reads `name`. Returns `None` if it is not set, or if it is not valid: then a fault is recorded.
pub(super) fn name(t: &mut Section<'_, '_>) -> Option<Text> {
    let name = t.text("name")?;
    let valid = (1..=MAX_NAME).contains(&name.value.len()) && name.value.chars().all(is_name_char);
    if !valid {
        t.invalid(&name, &format!("must be 1 to {MAX_NAME} characters of `A-Za-z0-9._-`"));
    }
    valid.then_some(name)
}

/// Reads the `host` of a listener. Returns `None` if it is not set, or if it is not valid: then a fault is recorded.
pub(super) fn host(t: &mut Section<'_, '_>) -> Option<IpAddr> {
    let text = t.text("host")?;
    if text.value == "localhost" {
        return Some(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    let host = text.value.parse().ok();
    if host.is_none() {
        let has_port = text.value.parse::<SocketAddr>().is_ok();
        let more = if has_port { "; the port belongs in `port`" } else { "" };
        t.invalid(&text, &format!("must be an IPv4 address, an IPv6 address or \"localhost\"{more}"));
    }
    host
}
