//! A backend with several keys: read as one, and run as one backend for each key.

use crate::config::common::Context;
use crate::config::keys::ReadKey;
use crate::config::keys::{read_key, written_key};
use crate::config::toml_reader::Section;
use crate::config::{Backend, Config, Secret};
use crate::policy::balance::BackendId;
use crate::policy::route::{Named, NamedTarget};

/// Most keys of a backend.
const MAX_POOL: usize = 64;

/// The keys of a backend.
pub(super) struct ReadKeys {
    /// The first key, or the only one.
    pub(super) first: ReadKey,
    /// All keys, if there are several.
    pub(super) pool: Vec<Secret>,
}

/// Reads `api_key` or `api_keys`.
pub(super) fn read_keys(t: &mut Section<'_, '_>, ctx: &Context<'_>) -> ReadKeys {
    let single = read_key(t, "api_key", ctx);
    let line = t.line_of("api_keys").unwrap_or(t.line());
    let Some(texts) = t.texts("api_keys") else { return ReadKeys { first: single, pool: Vec::new() } };
    if single.is_set {
        t.fault(line, "api_keys", "is set and `api_key` too; must be only one of the two");
    }
    if !(1..=MAX_POOL).contains(&texts.len()) {
        let what = format!("has {} keys; must have 1 to {MAX_POOL}", texts.len());
        t.fault(line, "api_keys", &what);
    }
    let (mut pool, mut is_inline) = (Vec::<Secret>::new(), false);
    for text in &texts {
        let read = written_key(t, text);
        is_inline |= read.is_inline;
        let Some(key) = read.key else { continue };
        if pool.contains(&key) {
            t.fault_of(text, "is there twice; each key must be there once");
        }
        pool.push(key);
    }
    let first = ReadKey { key: pool.first().cloned(), is_set: true, is_inline };
    ReadKeys { first, pool: if pool.len() > 1 { pool } else { Vec::new() } }
}

/// The place of a backend that has one key of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolPlace {
    /// The name in the configuration. That of this key is `name#1`, `name#2` and so on.
    pub backend: String,
    /// The index of the backend with the first key.
    pub first: usize,
    /// The number of keys.
    pub size: u32,
}

impl Config {
    /// The configuration with a backend for each key. Routes have a target for each.
    pub(crate) fn with_a_backend_per_key(mut self) -> Self {
        let size_of = |backend: &Backend| backend.key_pool.len().max(1);
        let mut first = vec![0];
        for backend in &self.backends {
            first.push(first.last().unwrap_or(&0) + size_of(backend));
        }
        let expand = |(id, backend): (BackendId, Backend)| -> Vec<Backend> {
            if backend.key_pool.is_empty() {
                return vec![backend];
            }
            let size = backend.key_pool.len() as u32;
            let place =
                |backend: &Backend| PoolPlace { backend: backend.name.clone(), first: first[id], size };
            let of_key = |(i, key): (usize, &Secret)| Backend {
                name: format!("{}#{}", backend.name, i + 1),
                api_key: Some(key.clone()),
                key_pool: Vec::new(),
                pool: Some(place(&backend)),
                ..backend.clone()
            };
            backend.key_pool.iter().enumerate().map(of_key).collect()
        };
        self.backends = self.backends.into_iter().enumerate().flat_map(expand).collect();
        let targets = |target: NamedTarget| {
            let ids = first[target.backend]..first[target.backend + 1];
            ids.map(move |backend| NamedTarget { backend, ..target.clone() })
        };
        let routes = self.routes.into_iter();
        self.routes = routes
            .map(|route| Named { targets: route.targets.into_iter().flat_map(targets).collect(), ..route })
            .collect();
        self
    }
}

/// The largest factor of [`scale`].
const MAX_SCALE: u32 = 5040;

/// By how much all weights grow, so that each key of a pool gets a whole share of its backend's weight; with many pools
/// of odd sizes the shares are rounded, by 1 in 1000 at most.
pub(crate) fn scale(backends: &[Backend]) -> u32 {
    let sizes = backends.iter().filter_map(|backend| backend.pool.as_ref()).map(|pool| pool.size);
    sizes.fold(1, |scale: u32, size| {
        let gcd = |mut a: u32, mut b: u32| {
            while b > 0 {
                (a, b) = (b, a % b);
            }
            a.max(1)
        };
        (scale / gcd(scale, size)).saturating_mul(size).min(MAX_SCALE)
    })
}

impl Backend {
    /// The name in the configuration, which all keys of a pool share.
    pub(crate) fn configured_name(&self) -> &str {
        self.pool.as_ref().map_or(&self.name, |pool| &pool.backend)
    }

    /// The share of a `weight` that the backend has if its keys have it together, grown by `scale`.
    pub(crate) fn share(&self, weight: u32, scale: u32) -> u32 {
        let size = self.pool.as_ref().map_or(1, |pool| pool.size);
        let share = (weight.saturating_mul(scale) + size / 2) / size;
        if weight > 0 { share.max(1) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Config {
        Config::of(text).unwrap().with_a_backend_per_key()
    }

    #[test]
    fn each_key_of_a_pool_is_a_backend_and_a_target_of_its_own() {
        let config = read(
            "[[backends]]\nname = \"a\"\nurl = \"http://a\"\nweight = 4\napi_keys = [\"k1\", \"k2\", \"k3\"]\n\
             [[backends]]\nname = \"b\"\nurl = \"http://b\"\nweight = 1\napi_keys = [\"k4\"]\n\
             [[backends]]\nname = \"c\"\nurl = \"http://c\"\nweight = 0\napi_keys = [\"k5\", \"k6\"]\n\
             [models.m]\ntargets = [{ backend = \"b\", model = \"x\" }, { backend = \"a\", weight = 2 }]\n",
        );
        let all: Vec<_> = config
            .backends
            .iter()
            .map(|b| (&*b.name, b.api_key.as_ref().unwrap().expose(), b.pool.as_ref().map(|pool| pool.first)))
            .collect();
        let want = [
            ("a#1", "k1", Some(0)),
            ("a#2", "k2", Some(0)),
            ("a#3", "k3", Some(0)),
            ("b", "k4", None),
            ("c#1", "k5", Some(4)),
            ("c#2", "k6", Some(4)),
        ];
        assert_eq!(all, want);
        let targets: Vec<_> = config.routes[0].targets.iter().map(|t| (t.backend, t.weight)).collect();
        assert_eq!(targets, [(3, None), (0, Some(2)), (1, Some(2)), (2, Some(2))]);
        let scale = scale(&config.backends);
        let shares: Vec<_> = config.backends.iter().map(|b| b.share(b.weight, scale)).collect();
        assert_eq!((scale, shares), (6, vec![8, 8, 8, 6, 0, 0]));
    }

    #[test]
    fn a_pool_has_one_to_64_different_keys_and_no_single_key_beside_it() {
        let fault = |more: &str| Config::of_backend(more).unwrap_err();
        let many = (0..65).map(|i| format!("\"k{i}\"")).collect::<Vec<_>>().join(", ");
        for (more, want) in [
            ("api_keys = []".to_owned(), "`backends[0].api_keys` has 0 keys; must have 1 to 64"),
            (format!("api_keys = [{many}]"), "`backends[0].api_keys` has 65 keys; must have 1 to 64"),
            (
                "api_keys = [\"sk-CANARY\", \"b\", \"sk-CANARY\"]".into(),
                "`backends[0].api_keys[2]` is there twice; each key must be there once",
            ),
            (
                "api_key = \"a\"\napi_keys = [\"b\"]".into(),
                "`backends[0].api_keys` is set and `api_key` too; must be only one of the two",
            ),
            (
                "api_keys = [\"$KEY\", \"b\"]".into(),
                "`backends[0].api_keys[0]` begins with `$`; must be the key itself, or `${NAME}` for an environment variable",
            ),
            (
                "api_keys = [\"a\"]\nforward_authorization = true".into(),
                "`backends[0].forward_authorization` is true and `api_key` is set; must be only one of the two",
            ),
        ] {
            let text = fault(&more);
            assert!(text.contains(want) && !text.contains("CANARY"), "{more}: {text}");
        }
    }

    #[test]
    fn shares_of_many_pools_are_near_their_weights() {
        let pools: String = [7, 11, 13, 17]
            .map(|size| {
                let keys: Vec<_> = (0..size).map(|i| format!("\"k{i}\"")).collect();
                format!(
                    "[[backends]]\nurl = \"http://b{size}\"\nweight = 1000\napi_keys = [{}]\n",
                    keys.join(",")
                )
            })
            .concat();
        let config = read(&pools);
        let scale = scale(&config.backends);
        for backend in &config.backends {
            let share = f64::from(backend.share(backend.weight, scale))
                * f64::from(backend.pool.as_ref().unwrap().size);
            assert!((share / f64::from(backend.weight * scale) - 1.0).abs() < 0.001);
        }
    }
}
