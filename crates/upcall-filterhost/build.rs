//! Builds the filter host from `c/`: as a program for 64 and, where the compiler can, for 32
//! bits, to be embedded by `launch.rs`; and as a library for inline placement.
//!
//! A machine without `-m32` (Debian: gcc-multilib) gets an empty 32-bit program, and a
//! warning; `launch.rs` then refuses 32-bit filters with the way out.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let sdk = root.join("../../sdk/c/include");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=c");
    println!("cargo::rerun-if-changed={}", sdk.display());

    let sources = sources(&root.join("c"));
    link(&sources, &sdk, "-m64", &out.join("filterhost-64"))
        .unwrap_or_else(|error| panic!("the filter host does not build:\n{error}"));
    let host_32 = out.join("filterhost-32");
    if can_build_32(&out) {
        link(&sources, &sdk, "-m32", &host_32)
            .unwrap_or_else(|error| panic!("the 32-bit filter host does not build:\n{error}"));
    } else {
        println!("cargo::warning=no -m32: 32-bit filters will be refused; install gcc-multilib");
        fs::write(&host_32, b"").expect("OUT_DIR is writable");
    }

    let library = sources.iter().filter(|source| !source.ends_with("main.c"));
    compiler(&sdk).files(library).compile("upcall_filterhost");
}

/// The C files of the filter host. `layout.c` is a program of the tests.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut sources: Vec<PathBuf> = fs::read_dir(folder)
        .expect("c/ is a part of this crate")
        .map(|entry| entry.expect("c/ can be listed").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .filter(|path| !path.ends_with("layout.c"))
        .collect();
    sources.sort();
    sources
}

fn compiler(sdk: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build.std("c11").include(sdk).flag("-pthread").define("_GNU_SOURCE", None).opt_level(2);
    if env::var_os("CARGO_FEATURE_POINTS").is_some() {
        build.define("UPCALL_HOST_POINTS", None);
    }
    build
}

/// Compiles and links a program. The later of two widths counts.
fn link(sources: &[PathBuf], sdk: &Path, width: &str, program: &Path) -> Result<(), String> {
    let mut compile = compiler(sdk).get_compiler().to_command();
    compile.args([width, "-fPIE", "-pie", "-Wl,-z,relro,-z,now"]).args(sources);
    run(compile.arg("-o").arg(program).arg("-ldl"))
}

fn can_build_32(out: &Path) -> bool {
    let source = out.join("probe.c");
    fs::write(&source, "#include <stdio.h>\nint main(void) { return puts(\"\") < 0; }\n")
        .expect("OUT_DIR is writable");
    link(&[source], out, "-m32", &out.join("probe-32")).is_ok()
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}\n{}", String::from_utf8_lossy(&output.stderr)))
}
