//! The edit distance between two words, to suggest the known word that was meant.

/// Returns the number of edits (insert, delete, change, or swap two neighbouring characters) from `a` to `b`: the
/// optimal string alignment distance.
pub(crate) fn distance(a: &str, b: &str) -> usize {
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

/// Longest word that is compared, in bytes: a longer one is not a typing error.
const MAX_WORD: usize = 64;

/// Most known words that one word is compared with.
const MAX_COMPARED: usize = 256;

/// Returns up to `n` words of `known` that are close to `word`, the nearest first.
pub(crate) fn nearest<'k>(word: &str, known: impl Iterator<Item = &'k str>, n: usize) -> Vec<&'k str> {
    if word.len() > MAX_WORD {
        return Vec::new();
    }
    let word = word.to_lowercase();
    let limit = |other: &str| word.len().max(other.len()).div_ceil(2);
    let mut found: Vec<(usize, &str)> = known
        .filter(|other| other.len() <= MAX_WORD && word.len().abs_diff(other.len()) <= limit(other))
        .take(MAX_COMPARED)
        .map(|other| (distance(&word, &other.to_lowercase()), other))
        .filter(|(distance, other)| *distance <= limit(other))
        .collect();
    found.sort_by_key(|(distance, _)| *distance);
    found.into_iter().take(n).map(|(_, other)| other).collect()
}

/// Asks for the words of `known` that are close to `word`, at most `n`: `; did you mean a, b?`. Empty if there is none.
pub(crate) fn hint<'k>(word: &str, known: impl Iterator<Item = &'k str>, n: usize) -> String {
    match nearest(word, known, n) {
        near if near.is_empty() => String::new(),
        near => format!("; did you mean {}?", near.join(", ")),
    }
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
    fn the_nearest_words_come_first_and_distant_words_are_left_out() {
        let known = ["gpt-4o", "gpt-4o-mini", "o3", "llama-3.1-8b-instant"];
        for (word, want) in [
            ("gpt-4", &["gpt-4o", "gpt-4o-mini"][..]),
            ("GPT-4o", &["gpt-4o", "gpt-4o-mini"]),
            ("llama-3.1-8b", &["llama-3.1-8b-instant"]),
            ("claude", &[]),
            ("", &[]),
            (&"x".repeat(100_000), &[]),
        ] {
            assert_eq!(nearest(word, known.into_iter(), 3), want, "{word:.20}");
        }
        let many: Vec<String> = (0..9).map(|i| format!("gpt-{i}")).collect();
        assert_eq!(nearest("gpt", many.iter().map(String::as_str), 3).len(), 3);
    }
}
