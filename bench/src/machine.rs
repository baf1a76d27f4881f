//! What everything ran on: without it no figure means anything.

use std::fs;
use std::process::Command;

use serde::Serialize;

use crate::process;

/// The machine and the programs.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Cores that the benchmark may use, of those there are.
    pub cores: (usize, usize),
    /// The kernel's release.
    pub kernel: String,
    /// Whether it is a virtual machine.
    pub virtual_machine: bool,
    /// Where the kernel's time comes from; a slow one spoils everything.
    pub clock: String,
    /// Runnable processes of the last minute, at the start: the benchmark wants 0.
    pub load: String,
    /// The file system that images lie on.
    pub images_on: String,
    /// Commit, and whether the tree was changed; versions of the peers.
    pub versions: Vec<(String, String)>,
}

impl Machine {
    /// Looks around.
    pub fn look(images: &std::path::Path) -> Machine {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown").to_owned()
        };
        let count = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let images = images.display().to_string();
        Machine {
            cpu: field("model name"),
            cores: (process::cores().len(), count),
            kernel: read("/proc/sys/kernel/osrelease"),
            virtual_machine: field("flags").split(' ').any(|flag| flag == "hypervisor"),
            clock: read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            load: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
            images_on: said("stat", &["-f", "-c", "%T", &images]),
            versions: vec![
                ("upcall".into(), said("git", &["describe", "--always", "--dirty"])),
                ("rustc".into(), said("rustc", &["--version"])),
                ("cc".into(), said("cc", &["--version"])),
                ("qemu-storage-daemon".into(), said("qemu-storage-daemon", &["--version"])),
                ("nbdkit".into(), said("nbdkit", &["--version"])),
            ],
        }
    }
}

/// The first line that a program prints.
fn said(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let line = text.unwrap_or_default().lines().next().unwrap_or_default().trim().to_owned();
    if line.is_empty() { "not there".into() } else { line }
}
