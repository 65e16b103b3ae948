//! Texts with one mistake at every place.

use std::collections::HashSet;

use crate::config::tests::valid::FULL;
use crate::config::tests::{BACKEND, parse};

/// Calls `check` with every truncation of `text`, with every byte flipped in several ways, removed
/// or doubled, and with every line removed, doubled or swapped with the next.
fn mangle(text: &str, mut check: impl FnMut(&str)) {
    let bytes = text.as_bytes();
    let mut emit = |mangled: &[u8]| {
        if let Ok(mangled) = str::from_utf8(mangled) {
            check(mangled);
        }
    };
    for (i, byte) in bytes.iter().enumerate() {
        emit(&bytes[..i]);
        emit(&bytes[i..]);
        emit(&[&bytes[..i], &bytes[i + 1..]].concat());
        emit(&[&bytes[..=i], &bytes[i..]].concat());
        let flips = [0x01, 0x04, 0x10, 0x40].map(|bit| byte ^ bit);
        for other in flips.into_iter().chain(*b"\"'\n\r\0.=[]{}#$,\\ -") {
            emit(&[&bytes[..i], &[other], &bytes[i + 1..]].concat());
        }
    }
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    for i in 0..lines.len() {
        let (before, after) = (&lines[..i], &lines[i + 1..]);
        emit([before, after].concat().concat().as_bytes());
        emit([before, &lines[i..=i], &lines[i..]].concat().concat().as_bytes());
        let mut swapped = lines.clone();
        swapped.swap(i, (i + 1) % lines.len());
        emit(swapped.concat().as_bytes());
    }
}

#[test]
fn mangled_texts_cause_no_panic_and_no_fault_shows_the_key() {
    let texts = [
        FULL.to_owned(),
        format!("{BACKEND}api_key = {{ file = \"sk-CANARY\" }}\n"),
        "backends = [{ url = 'http://sk-CANARY@h', weight = 1, \
         api_key = \"\"\"\nsk-CANARY\"\"\" }]\n"
            .to_owned(),
    ];
    let (mut valid, mut invalid) = (0, 0);
    for text in &texts {
        mangle(text, |mangled| match parse(mangled) {
            Ok(config) => {
                valid += 1;
                assert!(!config.backends.is_empty());
                let names: HashSet<_> = config.backends.iter().map(|b| &b.name).collect();
                assert_eq!(names.len(), config.backends.len());
            }
            Err(faults) => {
                invalid += 1;
                assert!(!faults.lines().is_empty());
                assert!(!faults.to_string().contains("CANARY"), "{faults}\n{mangled}");
                let has_line = |line: &String| {
                    let number = line.strip_prefix("config.toml:").and_then(|l| l.split_once(": "));
                    number.is_some_and(|(n, _)| n.parse().is_ok_and(|n: usize| n > 0))
                };
                assert!(faults.lines().iter().all(has_line), "{faults}");
            }
        });
    }
    assert!(valid > 1000 && invalid > 1000, "{valid} {invalid}");
}
