//! Checks that every budget has prices, and that every budget and token limit has the usage that it counts.

use crate::config::fault_sink::Sink;
use crate::config::sent_models::{Mapping, Names, mappings, sent};
use crate::config::text::shown_name;
use crate::config::{Backend, ClientKey, Config, UsageMode};
use crate::policy::balance::BackendId;

/// The lines of a backend's keys, for messages; a key that is not set has the line of its table.
#[derive(Clone, Copy)]
pub(super) struct BackendLines {
    pub(super) usage: usize,
    pub(super) budget: usize,
}

/// The lines of the checked keys, by index of the backend or the client.
pub(super) struct Lines {
    pub(super) backends: Vec<BackendLines>,
    /// The line of each client's `budget`.
    pub(super) client_budgets: Vec<usize>,
}

/// Records a fault for each budget that a model without a price could be charged to, and for each backend with
/// `usage = "off"` whose answers a limit or a budget counts.
pub(super) fn check(sink: &Sink<'_>, config: &Config, lines: &Lines) {
    for (id, (backend, at)) in config.backends.iter().zip(&lines.backends).enumerate() {
        let mappings = mappings(id, backend, &config.routes);
        if backend.budget.is_some() {
            let owner = format!("`backends[{id}].budget` of `{}`", shown_name(&backend.name));
            check_prices(sink, at.budget, &owner, (id, backend), sent(&mappings, None));
        }
        for (index, (client, line)) in config.clients.iter().zip(&lines.client_budgets).enumerate() {
            if client.budget.is_some() {
                let owner = format!("`client_keys[{index}].budget` of `{}`", shown_name(&client.name));
                check_prices(sink, *line, &owner, (id, backend), sent(&mappings, client.models.as_deref()));
            }
        }
        let needs = needs(id, config, &mappings);
        if backend.usage == UsageMode::Off && !needs.is_empty() {
            let what = format!(
                "`backends[{id}].usage` of `{}` is \"off\", but its answers are counted by {}; \
                 must be \"auto\", \"inject\" or \"passive\"",
                shown_name(&backend.name),
                needs.join(", ")
            );
            sink.fault(at.usage, what);
        }
    }
}

impl Config {
    /// Whether a client or a backend is limited by tokens or money.
    pub(crate) fn limits_tokens(&self) -> bool {
        self.rate_limit.tokens_per_minute.is_some()
            || self.backends.iter().any(|b| b.tokens_per_minute.is_some() || b.budget.is_some())
            || self.clients.iter().any(|c| c.tokens_per_minute.is_some() || c.budget.is_some())
    }

    /// How the tokens of a backend's answers are counted: [`UsageMode::Auto`] asks for them if a limit, a budget or a
    /// price depends on them.
    pub(crate) fn usage_of(&self, id: BackendId) -> UsageMode {
        let backend = &self.backends[id];
        let is_needed = || {
            !backend.prices.is_empty() || !needs(id, self, &mappings(id, backend, &self.routes)).is_empty()
        };
        match backend.usage {
            UsageMode::Auto if is_needed() => UsageMode::Inject,
            UsageMode::Auto => UsageMode::Passive,
            mode => mode,
        }
    }
}

/// Records a fault if `backend` has no price for one of the models `sent`.
fn check_prices(
    sink: &Sink<'_>,
    line: usize,
    owner: &str,
    (id, backend): (BackendId, &Backend),
    sent: Vec<Names>,
) {
    let has_price =
        |names: &Names| backend.prices.iter().any(|(text, _)| Names::written(text).contain(names));
    let mut missing: Vec<Names> = Vec::new();
    for names in sent.into_iter().filter(|names| !has_price(names)) {
        // A price for the wider pattern is enough.
        if !missing.iter().any(|other| other.contain(&names)) {
            missing.retain(|other| !names.contain(other));
            missing.push(names);
        }
    }
    if !missing.is_empty() {
        let missing: Vec<String> =
            missing.iter().map(|names| format!("{:?}", shown_name(&names.text()))).collect();
        let what = format!(
            "{owner} may be charged for models of the backend `{0}` that have no price: {1}; \
             each must have a price in `backends[{id}].prices`; the name `\"*\"` there is for all others",
            shown_name(&backend.name),
            missing.join(", ")
        );
        sink.fault(line, what);
    }
}

/// The keys that need the usage of the backend's answers, as messages name them.
fn needs(id: BackendId, config: &Config, mappings: &[Mapping]) -> Vec<String> {
    let backend = &config.backends[id];
    let mut needs = Vec::new();
    if backend.budget.is_some() {
        needs.push(format!("`backends[{id}].budget`"));
    }
    if backend.tokens_per_minute.is_some() {
        needs.push(format!("`backends[{id}].tokens_per_minute`"));
    }
    let reaches = |(_, client): &(usize, &ClientKey)| !sent(mappings, client.models.as_deref()).is_empty();
    let reaching: Vec<(usize, &ClientKey)> = config.clients.iter().enumerate().filter(reaches).collect();
    let has_default_limit =
        config.clients.is_empty() || reaching.iter().any(|(_, c)| c.tokens_per_minute.is_none());
    if config.rate_limit.tokens_per_minute.is_some() && has_default_limit {
        needs.push("`rate_limit.tokens_per_minute`".to_owned());
    }
    for (index, client) in reaching {
        let keys =
            [("tokens_per_minute", client.tokens_per_minute.is_some()), ("budget", client.budget.is_some())];
        for (key, _) in keys.into_iter().filter(|(_, is_set)| *is_set) {
            needs.push(format!("`client_keys[{index}].{key}` of `{}`", shown_name(&client.name)));
        }
    }
    needs
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: &str = "budget = { usd = 1, per = \"day\" }";

    /// A configuration from one line of each part; an empty line leaves the part out.
    fn faults(backends: &[&str], clients: &[&str], more: &str) -> Vec<String> {
        let mut text = format!("{more}\n");
        for (name, keys) in ["a", "b"].iter().zip(backends) {
            text += &format!("[[backends]]\nname = \"{name}\"\nurl = \"http://x\"\n{keys}\n");
            if !keys.contains("weight") {
                text += "weight = 1\n";
            }
        }
        for (name, keys) in ["team", "other"].iter().zip(clients) {
            text += &format!("[[client_keys]]\nname = \"{name}\"\nkey = \"{name}\"\n{keys}\n");
        }
        let faults = Config::of(&text).err().unwrap_or_default();
        faults.lines().map(str::to_owned).collect()
    }

    /// `prices` with these names.
    fn prices(names: &[&str]) -> String {
        let price = |name: &&str| format!("{name:?} = {{ input = 1, output = 1 }}");
        format!("prices = {{ {} }}", names.iter().map(price).collect::<Vec<_>>().join(", "))
    }

    #[test]
    fn a_budget_of_a_backend_needs_a_price_for_every_model_that_it_may_be_sent() {
        let any = "[models.\"*\"]\ntargets = [{ backend = \"a\" }]";
        let to_a = |model: &str| format!("[models.smart]\ntargets = [{{ backend = \"a\"{model} }}]");
        let (smart, big) = (to_a(""), to_a(", model = \"big\", weight = 0"));
        let to_b = "[models.smart]\ntargets = [{ backend = \"b\", model = \"big\" }]";
        for (keys, priced, more, missing) in [
            // Without `models` every name may be sent.
            ("", &[][..], "", "\"*\""),
            ("", &["gpt-4o", "gpt-*"], "", "\"*\""),
            ("", &["*"], "", ""),
            ("weight = 0", &[], "", "\"*\""),
            ("default_model = \"m\"", &["m"], "", "\"*\""),
            // Names of the list, or the backend's own names.
            ("models = [\"m\"]", &["m"], "", ""),
            ("models = [\"m\"]", &["m*"], "", ""),
            ("models = [\"m\"]", &["*"], "", ""),
            ("models = [\"m\", \"n\", \"o\"]", &["n"], "", "\"m\", \"o\""),
            ("models = { m = \"own\" }", &["own"], "", ""),
            ("models = { m = \"own\" }", &["m"], "", "\"own\""),
            // A prefix needs a prefix.
            ("models = [\"gpt-*\"]", &["gpt-*"], "", ""),
            ("models = [\"gpt-*\"]", &["g*"], "", ""),
            ("models = [\"gpt-*\"]", &["gpt-4*", "gpt-"], "", "\"gpt-*\""),
            ("models = [\"gpt-*\", \"gpt-4o\"]", &[], "", "\"gpt-*\""),
            ("models = [\"gpt-4o\", \"gpt-*\"]", &["gpt-4o"], "", "\"gpt-*\""),
            ("models = { \"local/*\" = \"*\" }", &["local/*"], "", "\"*\""),
            ("models = { \"local/*\" = \"x/*\" }", &["x/*"], "", ""),
            ("models = { \"local/*\" = \"x/*\" }", &["local/*"], "", "\"x/*\""),
            ("models = { \"local/*\" = \"one\" }", &["one"], "", ""),
            // The default model is sent as it is.
            ("models = [\"m\"]\ndefault_model = \"d\"", &["m"], "", "\"d\""),
            ("models = [\"m\"]\ndefault_model = \"d\"", &["m", "d"], "", ""),
            ("models = { m = \"own\" }\ndefault_model = \"m\"", &["own"], "", "\"m\""),
            // Routes to this backend.
            ("models = [\"m\"]", &["m"], &smart, "\"smart\""),
            ("models = [\"m\"]", &["m", "smart"], &smart, ""),
            ("models = [\"m\"]", &["m"], &big, "\"big\""),
            ("models = [\"m\"]", &["m", "big"], &big, ""),
            ("models = [\"m\"]", &["m"], to_b, ""),
            ("models = [\"m\"]", &["m"], any, "\"*\""),
        ] {
            let text = format!("{keys}\n{}\n{BUDGET}", prices(priced));
            let line = 7 + more.lines().count().max(1) + keys.lines().count().max(1) - 2;
            let expected = (!missing.is_empty()).then(|| {
                format!(
                    "test:{line}: `backends[0].budget` of `a` may be charged for models of the backend `a` that have no \
                     price: {missing}; each must have a price in `backends[0].prices`; the name `\"*\"` there is for all others"
                )
            });
            let found = faults(&[&text, "models = [\"x\"]"], &[], more);
            assert_eq!(found, Vec::from_iter(expected), "{keys} {priced:?} {more}");
        }
    }

    #[test]
    fn a_budget_of_a_client_needs_a_price_for_every_model_that_it_may_name() {
        let smart = "[models.smart]\ntargets = [{ backend = \"a\", model = \"big\" }, { backend = \"b\" }]";
        for (client, backends, more, missing) in [
            ("", [("", &[][..]), ("", &["*"][..])], "", &[("a", "\"*\"")][..]),
            ("", [("", &["*"]), ("", &["*"])], "", &[]),
            ("", [("", &[]), ("weight = 0", &[])], "", &[("a", "\"*\""), ("b", "\"*\"")]),
            // Backends that serve none of the client's models do not count, nor do other models.
            ("m", [("models = [\"m\"]", &["m"]), ("models = [\"n\"]", &[])], "", &[]),
            (
                "m",
                [("models = [\"m\", \"x\"]", &["m"]), ("models = [\"n\", \"m*\"]", &[])],
                "",
                &[("b", "\"m\"")],
            ),
            ("m", [("", &["m"]), ("default_model = \"d\"", &["m"])], "", &[]),
            ("m", [("", &["n"]), ("", &["m*"])], "", &[("a", "\"m\"")]),
            ("m*", [("models = [\"m\"]", &["m"]), ("models = [\"m-1*\"]", &["m-1*"])], "", &[]),
            ("m*", [("models = [\"m\"]", &["m"]), ("", &["m-1*"])], "", &[("b", "\"m*\"")]),
            ("*", [("models = [\"m\"]", &["m"]), ("", &["m*"])], "", &[("b", "\"*\"")]),
            // What the backend is sent counts.
            (
                "m",
                [("models = { m = \"own\" }", &["own"]), ("models = { m = \"own\" }", &["m"])],
                "",
                &[("b", "\"own\"")],
            ),
            ("l/m", [("models = { \"l/*\" = \"x/*\" }", &["x/m"]), ("models = [\"n\"]", &[])], "", &[]),
            (
                "l/m*",
                [("models = { \"l/*\" = \"x/*\" }", &["x/m"]), ("models = [\"n\"]", &[])],
                "",
                &[("a", "\"x/m*\"")],
            ),
            (
                "l*",
                [("models = { \"l/*\" = \"*\" }", &["l/*"]), ("models = [\"n\"]", &[])],
                "",
                &[("a", "\"*\"")],
            ),
            // A request without a model is not for a client with `models`, but the default model may be named.
            ("m", [("models = [\"m\"]\ndefault_model = \"d\"", &["m"]), ("models = [\"n\"]", &[])], "", &[]),
            (
                "d",
                [("models = [\"m\"]\ndefault_model = \"d\"", &["m"]), ("models = [\"n\"]", &[])],
                "",
                &[("a", "\"d\"")],
            ),
            (
                "m",
                [("models = { m = \"own\" }\ndefault_model = \"m\"", &["own"]), ("models = [\"n\"]", &[])],
                "",
                &[],
            ),
            // Routes.
            (
                "smart",
                [("models = [\"m\"]", &["big"]), ("models = [\"n\"]", &[])],
                smart,
                &[("b", "\"smart\"")],
            ),
            (
                "smart",
                [("models = [\"m\"]", &[]), ("models = [\"n\"]", &["smart"])],
                smart,
                &[("a", "\"big\"")],
            ),
            ("s*", [("models = [\"m\"]", &["big"]), ("models = [\"n\"]", &["s*"])], smart, &[]),
            ("m", [("models = [\"m\"]", &["m"]), ("models = [\"n\"]", &[])], smart, &[]),
        ] {
            let models = if client.is_empty() { String::new() } else { format!("models = [{client:?}]") };
            let [a, b] = backends.map(|(keys, priced)| format!("{keys}\n{}", prices(priced)));
            let clients = format!("{BUDGET}\n{models}");
            let lines = |text: &str| text.split('\n').count();
            let weights = [&a, &b].iter().filter(|keys| !keys.contains("weight")).count();
            let line = lines(more) + lines(&a) + lines(&b) + 2 * 3 + weights + 4;
            let expected: Vec<String> = missing
                .iter()
                .map(|(backend, names)| {
                    format!(
                        "test:{line}: `client_keys[0].budget` of `team` may be charged for models of the backend \
                         `{backend}` that have no price: {names}; each must have a price in \
                         `backends[{}].prices`; the name `\"*\"` there is for all others",
                        if *backend == "a" { 0 } else { 1 }
                    )
                })
                .collect();
            assert_eq!(faults(&[&a, &b], &[&clients, ""], more), expected, "{client} {backends:?} {more}");
        }
    }

    #[test]
    fn a_backend_without_usage_serves_only_what_is_not_counted() {
        let (limit, all) = ("tokens_per_minute = 9", prices(&["*"]));
        let rate = format!("[rate_limit]\n{limit}");
        let only = |models: &str, more: &str| format!("models = [\"{models}\"]\n{more}");
        let budget = format!("{all}\n{BUDGET}");
        let (m_limit, n_limit, m_budget) = (only("m", limit), only("n", limit), only("m", BUDGET));
        let (m_priced, m_free) = (only("m", &all), only("m", ""));
        for (backend, clients, more, needs) in [
            ("", &[][..], "", ""),
            (&*all, &[""][..], "", ""),
            (limit, &[], "", "`backends[0].tokens_per_minute`"),
            (&budget, &[], "", "`backends[0].budget`"),
            ("weight = 0", &[], &*rate, "`rate_limit.tokens_per_minute`"),
            ("", &[""], &rate, "`rate_limit.tokens_per_minute`"),
            ("", &["", limit], "", "`client_keys[1].tokens_per_minute` of `other`"),
            (
                "",
                &["", limit],
                &rate,
                "`rate_limit.tokens_per_minute`, `client_keys[1].tokens_per_minute` of `other`",
            ),
            ("", &[limit], &rate, "`client_keys[0].tokens_per_minute` of `team`"),
            (
                &m_priced,
                &[&*m_limit, &*m_budget],
                "",
                "`client_keys[0].tokens_per_minute` of `team`, `client_keys[1].budget` of `other`",
            ),
            (&m_priced, &[&n_limit], "", ""),
            (&m_free, &[&n_limit, ""], "", ""),
        ] {
            let text = format!("usage = \"off\"\n{backend}");
            let line = 4 + more.split('\n').count();
            let expected = (!needs.is_empty()).then(|| {
                format!(
                    "test:{line}: `backends[0].usage` of `a` is \"off\", but its answers are counted by {needs}; \
                     must be \"auto\", \"inject\" or \"passive\""
                )
            });
            assert_eq!(
                faults(&[&text], clients, more),
                Vec::from_iter(expected),
                "{backend} {clients:?} {more}"
            );
            let passive = text.replace("off", "passive");
            assert_eq!(faults(&[&passive], clients, more), [""; 0], "{backend} {clients:?} {more}");
        }
    }

    #[test]
    fn other_faults_hide_the_checks_since_keys_may_be_missing() {
        let found = faults(&[&format!("{BUDGET}\nprices = 1")], &[], "");
        assert_eq!(found, ["test:6: `backends[0].prices` is an integer; must be a table of tables"]);
    }
}
