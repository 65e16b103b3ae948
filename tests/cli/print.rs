//! The files of `zap print` name what the program has.

use std::collections::BTreeSet;

use super::{File, run, stderr, zap};

const FILES: [&str; 8] =
    ["grafana", "alerts", "alerts-test", "systemd", "socket", "dockerfile", "compose", "k8s"];

fn printed(name: &str) -> String {
    let output = run(&["print", name]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// The metrics of the manual.
fn metrics() -> BTreeSet<String> {
    let page = String::from_utf8(run(&["help", "metrics"]).stdout).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    rows.filter(|name| name.contains('_')).map(str::to_owned).collect()
}

/// The metrics that `text` names; a histogram by its own name.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let metrics = words.filter(|word| word.starts_with("zap_") || word.starts_with("process_"));
    metrics.map(|name| name.strip_suffix("_bucket").unwrap_or(name).to_owned()).collect()
}

/// The number after `key` on the first line that has it.
fn number(text: &str, key: &str) -> u64 {
    let (_, rest) = text.split_once(key).unwrap_or_else(|| panic!("{key} is missing"));
    rest.trim_start_matches([' ', '=', ':'])
        .split(|c: char| !c.is_ascii_digit())
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn the_list_has_every_file_and_an_unknown_name_exits_with_2() {
    let list = String::from_utf8(run(&["print"]).stdout).unwrap();
    let names = list.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    assert_eq!(names.collect::<Vec<_>>(), FILES);
    for name in FILES {
        assert!(printed(name).ends_with('\n'), "{name}");
    }
    let unknown = run(&["print", "grafanna"]);
    assert_eq!((unknown.status.code(), unknown.stdout.len()), (Some(2), 0));
    assert!(stderr(&unknown).contains("did you mean grafana?"), "{}", stderr(&unknown));
}

#[test]
fn the_dashboard_has_a_panel_for_every_metric() {
    let board: serde_json::Value = serde_json::from_str(&printed("grafana")).unwrap();
    let panels = board["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let expressions: Vec<&str> = targets.map(|target| target["expr"].as_str().unwrap()).collect();
    assert_eq!(named(&expressions.join("\n")), metrics());
    let ids: BTreeSet<u64> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());

    let mut taken = BTreeSet::new();
    for panel in panels {
        let place = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{panel}");
        for cell in (place("x")..place("x") + place("w"))
            .flat_map(|x| (place("y")..place("y") + place("h")).map(move |y| (x, y)))
        {
            assert!(taken.insert(cell), "two panels share a place: {panel}");
        }
    }
}

#[test]
fn alerts_name_known_metrics_and_each_has_a_test() {
    let (rules, tests) = (printed("alerts"), printed("alerts-test"));
    let known = metrics();
    for text in [&rules, &tests] {
        assert_eq!(named(text).difference(&known).collect::<Vec<_>>(), Vec::<&String>::new());
    }
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 15);
    for alert in alerts {
        assert!(tests.contains(&format!("alertname=\"{alert}\"")), "{alert} has no test");
    }
}

#[test]
fn the_configuration_for_kubernetes_is_valid_and_its_times_fit() {
    let text = printed("k8s");
    let (_, rest) = text.split_once("config.toml: |\n").unwrap();
    let lines = rest.lines().take_while(|line| line.is_empty() || line.starts_with("    "));
    let config = lines.map(|line| line.get(4..).unwrap_or("")).collect::<Vec<_>>().join("\n");
    let file = File::new("k8s", &config);
    let output = zap()
        .args(["check", "--config", file.path()])
        .envs([("OPENAI_API_KEY", "sk-0123456789"), ("ZAP_KEY_MY_TEAM", "zk-0123456789")])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));

    let (delay, drain) = (number(&config, "drain_delay_secs"), number(&config, "drain_secs"));
    assert_eq!(delay, 10);
    assert_eq!(number(&text, "terminationGracePeriodSeconds:"), delay + drain + 5);
    // The others leave the time to the default, 30 s.
    assert!(number(&printed("compose"), "stop_grace_period") > 30);
    assert!(number(&printed("systemd"), "TimeoutStopSec") > 30);
}
