//! What an unknown key was meant to be.

/// Whether an unknown key looks like a setting, not like a misplaced secret.
pub(super) fn is_harmless(key: &str) -> bool {
    key.len() <= 40 && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
}

/// The known key that `written` most likely means.
pub(super) fn nearest<'k>(written: &str, known: &[&'k str]) -> Option<&'k str> {
    if !(2..=40).contains(&written.len()) {
        return None;
    }
    let written = written.to_lowercase().replace('-', "_");
    let begins = |key: &&&str| written.len() >= 4 && key.starts_with(&written);
    known
        .iter()
        .map(|key| (distance(&written, key), key))
        .filter(|(distance, key)| *distance <= key.len().max(written.len()).div_ceil(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, key)| key)
        .or_else(|| known.iter().find(begins))
        .copied()
}

/// Edits (insert, drop, change, swap two neighbours) from `a` to `b`: the
/// optimal string alignment distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    let mut last_a = None;
    for (i, char_a) in a.chars().enumerate() {
        let mut row = Vec::with_capacity(above.len());
        let mut left = i + 1;
        row.push(left);
        let mut last_b = None;
        for (j, (&char_b, pair)) in b.iter().zip(above.windows(2)).enumerate() {
            let [diagonal, up] = pair else { continue };
            let mut best = (diagonal + usize::from(char_a != char_b)).min(up + 1).min(left + 1);
            if last_a == Some(char_b)
                && last_b == Some(char_a)
                && let Some(swap) = j.checked_sub(1).and_then(|j| before.get(j))
            {
                best = best.min(swap + 1);
            }
            row.push(best);
            left = best;
            last_b = Some(char_b);
        }
        before = std::mem::replace(&mut above, row);
        last_a = Some(char_a);
    }
    above.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits() {
        for (a, b, expected) in [
            ("", "", 0),
            ("", "ab", 2),
            ("ab", "", 2),
            ("port", "port", 0),
            ("prot", "port", 1),
            ("ports", "port", 1),
            ("max_sise", "max_size", 1),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }

    #[test]
    fn near_misses_are_found() {
        let known = ["max_size", "max_in_flight", "timeout_secs", "url"];
        for (written, expected) in [
            ("max_sise", Some("max_size")),
            ("maxsize", Some("max_size")),
            ("Max-Size", Some("max_size")),
            ("timeout", Some("timeout_secs")),
            ("uri", Some("url")),
            ("x", None),
            ("colour", None),
            ("sk-CANARY", None),
        ] {
            assert_eq!(nearest(written, &known), expected, "{written}");
        }
    }
}
