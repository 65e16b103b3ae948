//! The `zap` program: arguments in, exit code out.

use std::process::ExitCode;

/// jemalloc with its background thread: memory of a burst goes back to the system, and a request costs less than with
/// the allocator of glibc. See `benches/README.md`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    zap::cli::run(std::env::args_os().skip(1))
}
