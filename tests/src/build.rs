//! Where the programs and filters under test are; builds them if they are not there yet.
//!
//! `UPCALL_BIN_DIR` names a folder that has them all (scripts/test sets it). Without it
//! they are built with the profile of the tests themselves, so that a plain
//! `cargo test -p upcall-tests` tests what is in the tree.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The `upcall` program.
pub fn upcall_program() -> PathBuf {
    folder().join("upcall")
}

/// The shared object of a filter written in Rust.
pub fn rust_filter(name: &str) -> PathBuf {
    folder().join(format!("libupcall_{name}.so"))
}

/// The shared object of a filter written in C, for the width in bits (64 or 32).
pub fn c_filter(name: &str, width: u32) -> PathBuf {
    folder().join(format!("{name}-{width}.so"))
}

/// The top of the source tree.
pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| match env::var_os("UPCALL_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => build(),
    })
}

fn build() -> PathBuf {
    // target/PROFILE/deps/NAME-HASH
    let own = env::current_exe().unwrap();
    let folder = own.parent().and_then(Path::parent).unwrap().to_owned();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.current_dir(root()).args(["build", "--quiet", "--bins", "--lib"]);
    cargo.arg("--target-dir").arg(folder.parent().unwrap());
    for package in
        ["upcall", "upcall-filter-fault", "upcall-filter-split", "upcall-filter-throttle"]
    {
        cargo.args(["-p", package]);
    }
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    run(&mut cargo);
    run(Command::new(root().join("filters/build-c")).arg(&folder));
    folder
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}
