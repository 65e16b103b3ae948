//! Percent-encoding (RFC 3986, section 2.1).

/// Decodes a text; `None` if a `%` is not followed by two hexadecimal digits.
pub(crate) fn percent_decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            byte => byte,
        });
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_percent_sign_needs_two_digits() {
        for (text, want) in [
            ("", Some(&b""[..])),
            ("a+b", Some(b"a+b")),
            ("%2C%2c%00%ff", Some(b",,\0\xff")),
            ("caf\u{e9}", Some("caf\u{e9}".as_bytes())),
            ("%", None),
            ("%4", None),
            ("%4g", None),
            ("%+1", None),
        ] {
            assert_eq!(percent_decoded(text).as_deref(), want, "{text}");
        }
    }
}
