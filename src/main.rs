//! The `vitrim` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    vitrim::cli::main()
}
