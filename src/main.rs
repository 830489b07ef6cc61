//! Arguments, logging, exit code.

use std::process::ExitCode;

use clap::Parser;
use mirrorfs::cli::Cli;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter =
        EnvFilter::try_from_env("MIRRORFS_LOG").unwrap_or_else(|_| EnvFilter::new(cli.log_level()));
    // Standard output belongs to the commands, and to the agent's protocol.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match cli.run() {
        Ok(exit) => exit.into(),
        Err(failure) => {
            mirrorfs::cli::complain(&failure);
            failure.exit.into()
        }
    }
}
