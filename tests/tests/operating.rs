//! docs/operating.md: its lines work as they are written.

use std::process::{Command, Stdio};

use upcall_tests::{Scratch, root, upcall_program};

#[test]
fn the_tour_can_be_typed_as_it_stands() {
    let text = std::fs::read_to_string(root().join("docs/operating.md")).unwrap();
    let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    assert!(lines.len() > 20, "the tour was not found");
    let scratch = Scratch::new();
    let programs = upcall_program().parent().unwrap().canonicalize().unwrap();
    // `! ` inverts what a command says, which -e does not end on: it is made to.
    let script: String = lines
        .iter()
        .map(|line| match line.strip_prefix("! ") {
            Some(refused) => format!("if {refused}; then echo 'not refused'; exit 1; fi\n"),
            None => format!("{line}\n"),
        })
        .collect();
    // What is waited for in it may never come.
    let output = Command::new("timeout")
        .args(["-k", "1", "120", "bash", "-e", "-c", &script])
        .current_dir(scratch.path())
        .env("UPCALL", programs)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    for said in [
        "ready",
        "guest -> throttle-0 -> trace-0 -> store",
        "nothing was changed",
        "iops=1000",
        "upcall_hop_requests_total",
        "asks for a chain change",
    ] {
        assert!(stdout.contains(said), "{said}: {stdout}\n{stderr}");
    }
    assert!(stderr.contains("is no slot of its chain"), "{stderr}");
    let left = scratch.names();
    assert!(
        !left.iter().any(|name| name.ends_with(".sock") || name.ends_with(".control")),
        "{left:?}"
    );
}
