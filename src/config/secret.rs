//! A key that cannot be printed by accident.

use std::fmt;
use std::sync::Arc;

use http::HeaderValue;

/// A key of visible ASCII characters. `Debug` writes it as `***`.
#[derive(Clone, PartialEq)]
pub struct Secret {
    key: Arc<str>,
    bearer: HeaderValue,
}

impl Secret {
    /// Wraps `key`: at least one byte, all from 0x21 to 0x7e.
    ///
    /// # Errors
    ///
    /// Returns a message if `key` is empty or has another byte. The message does not contain the key.
    pub fn new(key: &str) -> Result<Self, &'static str> {
        if key.is_empty() {
            return Err("is empty; must have at least one character");
        }
        let refused = "contains a space, a control character or a non-ASCII character; \
                       must be visible ASCII on one line";
        if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(refused);
        }
        let mut bearer = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_invalid| refused)?;
        bearer.set_sensitive(true);
        Ok(Self { key: key.into(), bearer })
    }

    /// The key itself.
    pub fn expose(&self) -> &str {
        &self.key
    }

    /// The key itself, shared.
    pub fn shared(&self) -> Arc<str> {
        self.key.clone()
    }

    /// The key without a scheme, for `auth_header`; marked sensitive.
    pub fn bare(&self) -> HeaderValue {
        let mut value = self.bearer.clone();
        if let Ok(bare) = HeaderValue::from_str(&self.key) {
            value = bare;
            value.set_sensitive(true);
        }
        value
    }

    /// `Bearer <key>`, for the `Authorization` header; marked sensitive.
    pub fn bearer(&self) -> HeaderValue {
        self.bearer.clone()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_visible_ascii_is_accepted() {
        for good in ["x", "sk-1", "!~", "a\"b\\c"] {
            let secret = Secret::new(good).unwrap();
            assert_eq!(secret.expose(), good);
            assert_eq!(secret.bearer(), format!("Bearer {good}"));
            assert!(secret.bearer().is_sensitive());
        }
        for bad in ["", " ", "a b", "a\n", "a\r\nb", "a\tb", "a\0", "a\x7f", "ключ"] {
            assert!(Secret::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn debug_hides_the_key() {
        let secret = Secret::new("sk-CANARY").unwrap();
        assert_eq!(format!("{secret:?} {:?}", Some(&secret)), "*** Some(***)");
    }
}
