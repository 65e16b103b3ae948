//! The command line: parses the arguments and runs the command.

mod healthcheck;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tokio::sync::mpsc::Sender;

use crate::cli::healthcheck::Health;
use crate::config::{Config, LoadError, listen_address};
use crate::protocol::Endpoint;
use crate::server::drain::{Order, Signals, orders};
use crate::server::live;
use crate::server::setup::{self, Setup};
use crate::server::start::configured;
use crate::telemetry::log::Log;
use crate::upstream::fleet::{Snapshot, prepare};
use crate::upstream::paths::{path, shown_url};
use crate::{RunError, demo, manual};

const HELP: &str = "\
Zap: one OpenAI-compatible endpoint in front of many LLM providers.

Usage:
  zap [--config FILE]         serve requests; the default FILE is ./config.toml
  zap --watch                 the same, and reload when FILE or a file that it names changes
  zap check [--config FILE]   validate the configuration and exit
  zap check --live            the same, and ask each backend for its health and its models with its key
  zap example [PROVIDER...]   print a commented configuration for groq, openai, anthropic, ollama and others
  zap demo [--port N]         serve on 127.0.0.1:8000 in front of two built-in mock providers
  zap demo --chaos [--port N] the same with a third provider that fails, each time in another way
  zap healthcheck             exit with 0 if the Zap of the configuration answers at /health, otherwise with 1; takes
                              --config FILE, or --url URL to ask another address
  zap print [NAME]            list the files for running and watching Zap, or print one: grafana, alerts, k8s, ...
  zap completions SHELL       print the completions of bash, zsh or fish
  zap man                     print the man page, in roff
  zap help [WORD]             list the topics of the manual, or print the entry of WORD: a topic, a configuration
                              key, an error code, a metric or an endpoint
  zap --help | --version

The variable ZAP_CONFIG names the FILE where --config does not.
Exit codes: 0 success, 1 runtime failure, a backend that failed `check --live`, or a failed healthcheck,
2 bad configuration or usage.
";

/// Commands that the error for a missing configuration file suggests.
const MISSING: &str =
    "  zap example groq >config.toml        to configure a provider; zap example lists the others
  cp config.example.toml config.toml   to start from a file with every key
  zap demo                             to try Zap without a configuration";

const FAILED: u8 = 1;
const BAD_USAGE: u8 = 2;

/// The environment variable that names the configuration file.
const CONFIG_VARIABLE: &str = "ZAP_CONFIG";

/// The command that the arguments select.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    Check {
        file: PathBuf,
        is_live: bool,
    },
    Demo {
        port: u16,
        is_chaos: bool,
    },
    /// Print the completions of this shell.
    Completions(String),
    /// Print a configuration for these providers.
    Example(Vec<String>),
    /// Ask this URL, or the Zap of this configuration.
    Healthcheck {
        file: PathBuf,
        url: Option<String>,
    },
    Help,
    Man,
    /// Print the manual's entry of a word, or the list of topics.
    Manual(Option<String>),
    /// Print this file, or the list of files.
    Print(Option<String>),
    Serve {
        file: PathBuf,
        watch: bool,
    },
    Version,
}

/// Runs the program. `args` are its arguments, without the program's name.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    match parse(args, std::env::var_os(CONFIG_VARIABLE)) {
        Ok(Command::Help) => print(HELP),
        Ok(Command::Version) => print(&format!("zap {}\n", env!("ZAP_VERSION"))),
        Ok(Command::Manual(None)) => print(&manual::overview()),
        Ok(Command::Manual(Some(word))) => {
            answer(manual::look_up(&word).map_err(|what| format!("{what}\n  zap help   lists the topics")))
        }
        Ok(Command::Check { file, is_live }) => check(&file, is_live),
        Ok(Command::Example(names)) => answer(manual::example::example(&names)),
        Ok(Command::Demo { port, is_chaos }) => demo(port, is_chaos),
        Ok(Command::Healthcheck { file, url }) => healthcheck(&file, url.as_deref()),
        Ok(Command::Man) => print(&manual::print::man()),
        Ok(Command::Completions(shell)) => answer(manual::print::completions(&shell)),
        Ok(Command::Print(name)) => answer(manual::print::file(name.as_deref())),
        Ok(Command::Serve { file, watch }) => {
            load(&file).map_or_else(|code| code, |config| listen_and_serve(config, watch))
        }
        Err(what) => {
            eprintln!("zap: {what}\n\n{HELP}");
            ExitCode::from(BAD_USAGE)
        }
    }
}

/// Writes to stdout. If the reader closes the pipe early, as `head` does, the exit code is still 0.
fn print(text: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("zap: cannot write to stdout: {e}");
            ExitCode::from(FAILED)
        }
        _ => ExitCode::SUCCESS,
    }
}

fn answer(text: Result<String, String>) -> ExitCode {
    match text {
        Ok(text) => print(&text),
        Err(what) => {
            eprintln!("zap: {what}");
            ExitCode::from(BAD_USAGE)
        }
    }
}

/// Parses the arguments. `variable` is the value of `ZAP_CONFIG`.
fn parse(mut args: impl Iterator<Item = OsString>, variable: Option<OsString>) -> Result<Command, String> {
    let (mut subcommand, mut file, mut port, mut url) = (None, None, None, None);
    let (mut is_chaos, mut is_live, mut watch) = (false, false, false);
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy().into_owned();
        match text.as_str() {
            "--help" | "-h" => return Ok(Command::Help),
            "--version" | "-V" => return Ok(Command::Version),
            "--config" | "-c" => file = Some(PathBuf::from(args.next().ok_or("--config needs a FILE")?)),
            "--chaos" => is_chaos = true,
            "--live" => is_live = true,
            "--url" => url = Some(args.next().ok_or("--url needs a URL")?.to_string_lossy().into_owned()),
            "--watch" => watch = true,
            "--port" => {
                let value = args.next().ok_or("--port needs a number")?;
                let number = value.to_string_lossy().parse::<u16>();
                port = Some(number.map_err(|_| "--port needs a number from 0 to 65535")?);
            }
            "help" | "print" | "completions" | "man" if subcommand.is_none() => {
                return word_command(&text, args);
            }
            "example" if subcommand.is_none() => return example_command(args),
            "check" | "demo" | "healthcheck" if subcommand.is_none() => subcommand = Some(text),
            other => match other.strip_prefix("--config=") {
                Some(path) => file = Some(PathBuf::from(path)),
                None => return Err(format!("unknown argument {}", other.escape_debug())),
            },
        }
    }
    let has_file = file.is_some();
    let variable = variable.filter(|file| !file.is_empty()).map(PathBuf::from);
    let file = file.or(variable).unwrap_or_else(|| "config.toml".into());
    match subcommand.as_deref() {
        other if is_live && other != Some("check") => Err("--live works only with check".into()),
        other if url.is_some() && other != Some("healthcheck") => {
            Err("--url works only with healthcheck".into())
        }
        Some(other) if watch => Err(format!("--watch does not work with {other}")),
        Some("demo") if has_file => Err("demo does not take --config".into()),
        Some("demo") => Ok(Command::Demo { port: port.unwrap_or(8000), is_chaos }),
        _ if is_chaos => Err("--chaos works only with demo".into()),
        _ if port.is_some() => {
            Err("--port works only with demo; set server.port in the configuration".into())
        }
        Some("healthcheck") => Ok(Command::Healthcheck { file, url }),
        Some(_) => Ok(Command::Check { file, is_live }),
        None => Ok(Command::Serve { file, watch }),
    }
}

/// A command that takes at most one word.
fn word_command(name: &str, mut args: impl Iterator<Item = OsString>) -> Result<Command, String> {
    let word = args.next().map(|word| word.to_string_lossy().into_owned());
    let needed = || match name {
        "completions" => format!("one SHELL of {}", manual::print::shells()),
        "man" => "no argument".into(),
        "print" => "one NAME".into(),
        _ => "one WORD".into(),
    };
    match (name, word, args.next()) {
        (_, Some(word), _) if word == "--help" || word == "-h" => Ok(Command::Help),
        ("help", word, None) => Ok(Command::Manual(word)),
        ("print", name, None) => Ok(Command::Print(name)),
        ("completions", Some(shell), None) => Ok(Command::Completions(shell)),
        ("man", None, None) => Ok(Command::Man),
        _ => Err(format!("{name} takes {}", needed())),
    }
}

fn example_command(args: impl Iterator<Item = OsString>) -> Result<Command, String> {
    let names: Vec<String> = args.map(|name| name.to_string_lossy().into_owned()).collect();
    match names.iter().find(|name| name.starts_with('-')) {
        Some(option) if option == "--help" || option == "-h" => Ok(Command::Help),
        Some(option) => Err(format!("example takes no option {}", option.escape_debug())),
        None => Ok(Command::Example(names)),
    }
}

fn healthcheck(file: &Path, url: Option<&str>) -> ExitCode {
    let url = match url {
        Some(url) => url.to_owned(),
        None => match listen_address(file) {
            Ok(listen) => listen.url("/health"),
            Err(error) => {
                eprintln!("zap: {error}\n  zap healthcheck --url URL   needs no configuration");
                return ExitCode::from(FAILED);
            }
        },
    };
    match healthcheck::ask(&url) {
        Ok(Health::Responded) => ExitCode::SUCCESS,
        Ok(Health::WantsCertificate) => print(&format!(
            "{}: TLS works; no request was sent, since the server asks for a certificate\n",
            url.escape_debug()
        )),
        Err(why) => {
            eprintln!("zap: {}: {why}", url.escape_debug());
            ExitCode::from(FAILED)
        }
    }
}

fn load(file: &Path) -> Result<Config, ExitCode> {
    Config::load(file).map_err(|error| {
        match &error {
            LoadError::Missing(path) => {
                let is_named =
                    std::env::var_os(CONFIG_VARIABLE).is_some_and(|named| Path::new(&named) == path);
                let named = if is_named { ", which ZAP_CONFIG names" } else { "" };
                eprintln!("zap: {error}{named}\n{MISSING}");
            }
            LoadError::Invalid(faults) => eprintln!("{faults}"),
        }
        ExitCode::from(BAD_USAGE)
    })
}

fn check(file: &Path, is_live: bool) -> ExitCode {
    let config = match load(file) {
        Ok(config) => config,
        Err(code) => return code,
    };
    match prepare(config, None) {
        Ok(fleet) => {
            for warning in &fleet.config.warnings {
                eprintln!("warning: {warning}");
            }
            let count = configured(&fleet).count();
            let valid = format!("{}: valid, {count} backends\n", file.display());
            match is_live {
                true => ask_backends(&valid, &fleet),
                false => print(&(valid + &urls(&fleet))),
            }
        }
        Err(what) => {
            eprintln!("{}: {what}", file.display());
            ExitCode::from(BAD_USAGE)
        }
    }
}

/// The URLs of each backend that chats, messages and health checks go to.
fn urls(fleet: &Snapshot) -> String {
    let mut lines = String::new();
    for backend in configured(fleet) {
        let conf = &backend.conf;
        let keys = conf.pool.as_ref().map_or(String::new(), |pool| format!(" ({} keys)", pool.size));
        lines.push_str(&format!("  {}{keys}\n", backend.configured_name()));
        for (name, endpoint) in [("chat    ", Endpoint::Chat), ("messages", Endpoint::Messages)] {
            if let Some(path) = path(conf, endpoint) {
                lines.push_str(&format!("    {name}  {}\n", shown_url(conf, &path)));
            }
        }
        let health = match conf.health.is_enabled {
            true => shown_url(conf, &conf.health_path),
            false => "not checked, since `health.enabled` is false".to_owned(),
        };
        lines.push_str(&format!("    health    {health}\n"));
    }
    lines
}

/// Prints what each backend answers.
fn ask_backends(valid: &str, fleet: &Snapshot) -> ExitCode {
    match live::ask_all(fleet) {
        Ok(reports) => {
            let lines: String = reports.iter().map(|report| report.text.as_str()).collect();
            let failed = reports.iter().filter(|report| report.has_failed).count();
            let code = print(&format!("{valid}{lines}{failed} of {} backends failed\n", reports.len()));
            if failed > 0 { ExitCode::from(FAILED) } else { code }
        }
        Err(e) => {
            eprintln!("zap: cannot ask the backends: {e}");
            ExitCode::from(FAILED)
        }
    }
}

fn listen_and_serve(config: Config, watch: bool) -> ExitCode {
    match setup::open(&config.server, watch) {
        Ok(setup) => serve(config, setup),
        Err(what) => give_up(Log::start(config.log.format), &what),
    }
}

/// Lets each panic be a line of the log: with its place but not its message, which could contain a key.
fn log_panics(log: Log) {
    std::panic::set_hook(Box::new(move |panic| {
        let at = panic.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        log.event("error", "bug", &format!("a bug{at} aborted one task; all other tasks continue"));
    }));
}

/// Logs why Zap cannot serve.
fn give_up(log: Log, what: &str) -> ExitCode {
    log.event("error", "stop", what);
    // It may hold a way to the log.
    drop(std::panic::take_hook());
    log.flush();
    ExitCode::from(FAILED)
}

fn serve(config: Config, setup: Setup) -> ExitCode {
    let log = Log::start(config.log.format);
    log_panics(log.clone());
    let (sender, receiver) = orders();
    if let Err(e) = on_signals(sender) {
        return give_up(log, &format!("cannot install the signal handlers: {e}"));
    }
    match crate::run(config, log, setup, receiver) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) | Err(RunError::Io(_)) => ExitCode::from(FAILED),
        Err(RunError::Config(_)) => ExitCode::from(BAD_USAGE),
    }
}

/// Starts a thread that sends the process's signals as orders.
fn on_signals(orders: Sender<Order>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let signals = {
        let _inside = runtime.enter();
        Signals::catch()?
    };
    let run = move || runtime.block_on(signals.send(orders));
    std::thread::Builder::new().name("zap-signals".into()).spawn(run).map(drop)
}

fn demo(port: u16, is_chaos: bool) -> ExitCode {
    let listener = match setup::listen((Ipv4Addr::LOCALHOST, port).into()) {
        Ok(listener) => listener,
        Err(what) => {
            eprintln!("zap: {what}");
            return ExitCode::from(FAILED);
        }
    };
    let port = listener.local_addr().map_or(port, |address| address.port());
    match demo::start(port, is_chaos) {
        Ok((config, introduction)) => {
            print(&introduction);
            serve(config, listener.into())
        }
        Err(e) => {
            eprintln!("zap: the demo cannot start: {e}");
            ExitCode::from(FAILED)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_every_form_of_the_command_line() {
        for (args, want) in [
            (&[][..], Ok(Command::Serve { file: "config.toml".into(), watch: false })),
            (&["--config", "a.toml"], Ok(Command::Serve { file: "a.toml".into(), watch: false })),
            (&["--config=a.toml", "--watch"], Ok(Command::Serve { file: "a.toml".into(), watch: true })),
            (&["check"], Ok(Command::Check { file: "config.toml".into(), is_live: false })),
            (&["check", "-c", "b"], Ok(Command::Check { file: "b".into(), is_live: false })),
            (&["check", "--live"], Ok(Command::Check { file: "config.toml".into(), is_live: true })),
            (&["--live", "-c", "b", "check"], Ok(Command::Check { file: "b".into(), is_live: true })),
            (&["example"], Ok(Command::Example(vec![]))),
            (&["example", "groq", "ollama"], Ok(Command::Example(vec!["groq".into(), "ollama".into()]))),
            (&["example", "--help"], Ok(Command::Help)),
            (&["demo"], Ok(Command::Demo { port: 8000, is_chaos: false })),
            (&["demo", "--port", "9"], Ok(Command::Demo { port: 9, is_chaos: false })),
            (&["demo", "--chaos"], Ok(Command::Demo { port: 8000, is_chaos: true })),
            (&["demo", "--port", "9", "--chaos"], Ok(Command::Demo { port: 9, is_chaos: true })),
            (&["healthcheck"], Ok(Command::Healthcheck { file: "config.toml".into(), url: None })),
            (
                &["healthcheck", "-c", "b", "--url", "http://a"],
                Ok(Command::Healthcheck { file: "b".into(), url: Some("http://a".into()) }),
            ),
            (&["--help"], Ok(Command::Help)),
            (&["help", "-h"], Ok(Command::Help)),
            (&["print", "--help"], Ok(Command::Help)),
            (&["print"], Ok(Command::Print(None))),
            (&["print", "k8s"], Ok(Command::Print(Some("k8s".into())))),
            (&["completions", "zsh"], Ok(Command::Completions("zsh".into()))),
            (&["man"], Ok(Command::Man)),
            (&["help"], Ok(Command::Manual(None))),
            (&["help", "demo"], Ok(Command::Manual(Some("demo".into())))),
            (&["check", "--version"], Ok(Command::Version)),
        ] {
            assert_eq!(parse(args.iter().map(OsString::from), None), want, "{args:?}");
        }
        for args in [
            &["serve"][..],
            &["--config"],
            &["demo", "--port", "x"],
            &["demo", "--port"],
            &["demo", "--config", "a"],
            &["--port", "1"],
            &["--chaos"],
            &["check", "--chaos"],
            &["--live"],
            &["demo", "--live"],
            &["healthcheck", "--live"],
            &["healthcheck", "--url"],
            &["check", "--url", "http://a"],
            &["--url", "http://a"],
            &["demo", "--watch"],
            &["check", "--watch"],
            &["example", "--live"],
            &["check", "demo"],
            &["help", "a", "b"],
            &["print", "a", "b"],
            &["completions"],
            &["completions", "bash", "zsh"],
            &["man", "zap"],
            &["check", "help"],
            &["\u{1b}"],
        ] {
            let error = parse(args.iter().map(OsString::from), None).unwrap_err();
            assert!(!error.contains('\u{1b}'), "{args:?}");
        }
    }

    #[test]
    fn a_panic_is_a_line_of_the_log_without_its_message() {
        let (mut reader, writer) = io::pipe().unwrap();
        let log = Log::to(crate::config::LogFormat::Json, writer);
        log_panics(log.clone());
        let ended = std::thread::spawn(|| std::panic::panic_any("sk-CANARY")).join();
        drop(std::panic::take_hook());
        log.flush();
        assert!(ended.is_err());
        let mut text = String::new();
        io::Read::read_to_string(&mut reader, &mut text).unwrap();
        // Another test may panic on purpose meanwhile.
        let mut lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let is_ours =
            |line: &serde_json::Value| line["message"].as_str().unwrap().contains("a bug at src/cli.rs:");
        let line = lines.find(is_ours).unwrap_or_else(|| unreachable!("no line: {text}"));
        assert_eq!((&line["event"], &line["level"]), (&"bug".into(), &"error".into()));
        assert!(!text.contains("CANARY"), "{text}");
    }

    #[test]
    fn the_variable_names_the_file_unless_an_argument_does() {
        for (args, variable, want) in [
            (&[][..], "b.toml", "b.toml"),
            (&["--config", "a.toml"], "b.toml", "a.toml"),
            (&[], "", "config.toml"),
        ] {
            let parsed = parse(args.iter().map(OsString::from), Some(variable.into()));
            assert_eq!(parsed, Ok(Command::Serve { file: want.into(), watch: false }), "{args:?} {variable}");
        }
        let demo = Command::Demo { port: 8000, is_chaos: false };
        assert_eq!(parse(["demo".into()].into_iter(), Some("b.toml".into())), Ok(demo));
    }
}
