//! `zap completions` and `zap man`: complete, and understood by the shells that this machine has.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use super::{run, stderr};

const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];

fn printed(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// The commands and the options of the usage.
fn usage() -> (BTreeSet<String>, BTreeSet<String>) {
    let usage = printed(&["--help"]);
    let words = usage.lines().filter_map(|line| line.strip_prefix("  zap ")?.split(' ').next());
    let commands = words.filter(|word| !word.starts_with(['-', '['])).map(str::to_owned).collect();
    let options = usage.split(|c: char| !c.is_ascii_lowercase() && c != '-');
    (commands, options.filter(|word| word.starts_with("--")).map(str::to_owned).collect())
}

/// What a program prints; `None` if this machine does not have it.
fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().ok()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && err.is_empty(), "{program}: {out}{err}");
    Some(out.into_owned())
}

/// The words of a text, options with their dashes.
fn words(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).collect()
}

#[test]
fn completions_and_the_man_page_have_every_command_and_option() {
    let (commands, options) = usage();
    assert!(commands.len() == 8 && options.len() > 5, "{commands:?} {options:?}");
    let man = printed(&["man"]).replace("\\-", "-");
    for shell in SHELLS {
        let script = printed(&["completions", shell]);
        let has_mark =
            script.split('@').skip(1).any(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()));
        assert!(!has_mark, "a mark is left: {script}");
        let (of_shell, of_man) = (words(&script), words(&man));
        for name in commands.iter().chain(&options) {
            // fish names an option without its dashes: `-l config`.
            let long = name.trim_start_matches("--");
            assert!(of_shell.contains(&**name) || of_shell.contains(long), "{shell} lacks {name}");
            assert!(of_man.contains(&**name), "the man page lacks {name}");
        }
        for word in ["k8s", "operations", "groq", "fish"] {
            assert!(of_shell.contains(word) && of_man.contains(word), "{shell}: {word}");
        }
    }
    assert_eq!(man.matches('@').count(), 0);
    let unknown = run(&["completions", "tcsh"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(stderr(&unknown).contains("bash, zsh, fish"), "{}", stderr(&unknown));
}

/// The words that each line completes to begin with.
const CASES: [(&str, &[&str], &[&str]); 8] = [
    ("zap ", &["check", "demo", "healthcheck", "print"], &["k8s", "--live"]),
    ("zap he", &["healthcheck", "help"], &["check"]),
    ("zap print al", &["alerts", "alerts-test"], &["k8s"]),
    ("zap check --", &["--config", "--live"], &["--chaos"]),
    ("zap --config a.toml check --l", &["--live"], &["--url"]),
    ("zap example gro", &["groq"], &["openai"]),
    ("zap help me", &["metrics"], &["limits"]),
    ("zap completions ", &["bash", "zsh", "fish"], &["check"]),
];

fn compare(shell: &str, line: &str, found: &str, wanted: &[&str], unwanted: &[&str]) {
    let found: BTreeSet<&str> = found.split_whitespace().collect();
    for word in wanted {
        assert!(found.contains(word), "{shell}: {line}: {word} is missing: {found:?}");
    }
    for word in unwanted {
        assert!(!found.contains(word), "{shell}: {line}: {word} is wrong: {found:?}");
    }
}

#[test]
fn bash_completes() {
    let script = printed(&["completions", "bash"]);
    for (line, wanted, unwanted) in CASES {
        let code = format!(
            "{script}\nCOMP_WORDS=({line}{})\nCOMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n_zap\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"",
            if line.ends_with(' ') { "''" } else { "" }
        );
        let Some(found) = output("bash", &["--norc", "-c", &code]) else { return };
        compare("bash", line, &found, wanted, unwanted);
    }
}

#[test]
fn fish_completes() {
    let script = printed(&["completions", "fish"]);
    for (line, wanted, unwanted) in CASES {
        let code = format!("{script}\ncomplete -C '{line}'");
        let Some(found) = output("fish", &["--no-config", "-c", &code]) else { return };
        let found: String =
            found.lines().map(|line| format!("{} ", line.split('\t').next().unwrap())).collect();
        compare("fish", line, &found, wanted, unwanted);
    }
}

#[test]
fn zsh_completes() {
    // A zsh that types into a zsh on a terminal of its own, and lists what Tab offers.
    const TYPE: &str = r#"
        zmodload zsh/zpty
        zpty z zsh -f -i
        zpty -w z 'PS1=; unsetopt zle_bracketed_paste; autoload -Uz compinit; compinit -D -u'
        zpty -w z "zstyle ':completion:*' verbose no; LISTMAX=1000"
        zpty -w z "source $1; bindkey '^I' list-choices; print REA''DY"
        zpty -r z part '*READY*'
        zpty -w -n z "$2"$'\t'
        for i in {1..100}; do
            sleep 0.1
            while zpty -r -t z part; do all+=$part; done
            [[ $all == *$3* && $all == *$4* ]] && break
        done
        print -r -- "$all"
    "#;
    let file = std::env::temp_dir().join(format!("zap-cli-{}-completions.zsh", std::process::id()));
    std::fs::write(&file, printed(&["completions", "zsh"])).unwrap();
    for (line, wanted, unwanted) in CASES {
        let (first, last) = (wanted[0], wanted[wanted.len() - 1]);
        let args = ["-f", "-c", TYPE, "zsh", file.to_str().unwrap(), line, first, last];
        let Some(found) = output("zsh", &args) else { break };
        // Without the colours and moves of the terminal.
        let mut parts = found.split("\u{1b}[");
        let mut plain = parts.next().unwrap().to_owned();
        for part in parts {
            plain.push(' ');
            plain.push_str(part.split_once(|c: char| c.is_ascii_alphabetic()).map_or("", |(_, rest)| rest));
        }
        let found = plain;
        compare("zsh", line, &found, wanted, unwanted);
    }
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn the_man_page_has_no_warnings() {
    let file = std::env::temp_dir().join(format!("zap-cli-{}.1", std::process::id()));
    std::fs::write(&file, printed(&["man"])).unwrap();
    let page = output("groff", &["-man", "-Tutf8", "-ww", "-z", file.to_str().unwrap()]);
    std::fs::remove_file(&file).unwrap();
    assert!(page.is_none_or(|page| page.is_empty()));
}
