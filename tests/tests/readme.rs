//! The README's lines work as they are written.

use std::process::{Command, Stdio};

use upcall_tests::{Scratch, root, upcall_program};

/// The lines of the first indented block below a heading.
fn block(heading: &str) -> String {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    let (_, below) = text.split_once(heading).unwrap_or_else(|| panic!("no {heading} in README"));
    let lines = below.lines().skip_while(|line| !line.starts_with("    "));
    let block: Vec<&str> =
        lines.take_while(|line| line.starts_with("    ")).map(str::trim_start).collect();
    assert!(!block.is_empty(), "nothing to type below {heading}");
    block.join("\n")
}

#[test]
fn a_filter_of_your_own_is_begun_built_and_tested_by_its_lines() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.join("target")).unwrap();
    let programs = upcall_program().parent().unwrap().canonicalize().unwrap();
    std::os::unix::fs::symlink(programs, scratch.join("target/release")).unwrap();
    let lines = block("## A filter of your own");
    let output = Command::new("bash")
        .args(["-e", "-c", &lines])
        .current_dir(scratch.path())
        .stdin(Stdio::null())
        // Its own tests are not this run's, and it builds into its own folder.
        .env_remove("MAKEFLAGS")
        .env_remove("CARGO_TARGET_DIR")
        .output()
        .unwrap();
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{lines}\n{stdout}\n{stderr}");
    assert!(stdout.contains("checks passed"), "{stdout}");
    assert!(scratch.join("mine/mine.so").exists());
}
