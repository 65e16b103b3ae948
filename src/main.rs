//! The `zap` program: arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    zap::cli::run(std::env::args_os().skip(1))
}
