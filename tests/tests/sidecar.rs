//! Filter hosts and workers are killed while a filter writes its sidecar: what it finds next is
//! the state before or the new one, whole, and never older than what it was told is durable.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use upcall_tests::{Rng, Scratch, Server, upcall};

const DEATHS: usize = 24;
const PATIENCE: Duration = Duration::from_secs(20);
/// Where the words of diary.c's page are.
const DURABLE: usize = 0;
const OPENED: usize = 4;
const WRONG: usize = 8;

fn compile(scratch: &Scratch, page: &Path) -> PathBuf {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let target = scratch.join("diary.so");
    let status = Command::new("cc")
        .args(["-std=gnu11", "-O1", "-fPIC", "-shared", "-pthread", "-D_GNU_SOURCE"])
        .arg(format!("-DPAGE=\"{}\"", page.display()))
        .arg("-I")
        .arg(root.join("sdk/c/include"))
        .arg("-o")
        .arg(&target)
        .arg(root.join("crates/upcall-worker/tests/data/diary.c"))
        .status()
        .unwrap();
    assert!(status.success());
    target
}

fn word(page: &Path, at: usize) -> u32 {
    let bytes = std::fs::read(page).unwrap();
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A process that has such a word in its command line, and is not a zombie.
fn process_with(server: &Server, word: &str) -> Option<i32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        *pid != server.pid().as_raw_pid()
            && line.split(|byte| *byte == 0).any(|other| other == word.as_bytes())
    })
}

#[test]
fn a_sidecar_survives_the_deaths_of_filters_and_workers_in_the_middle_of_its_syncs() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", 1 << 20);
    let page = scratch.join("page");
    let mut bytes = [0; 64];
    bytes[12] = 9; // no points
    std::fs::write(&page, bytes).unwrap();
    let filter = compile(&scratch, &page);
    let info = upcall(&["filter", "info", &filter.display().to_string()]);
    assert!(info.stdout.contains("keeps    a state of its own (sidecar)"), "{}", info.stdout);
    let disk = format!(
        "name=root,file={},socket={},direct=off",
        image.display(),
        scratch.join("d.sock").display()
    );
    let args = ["--restart", "--restart-pause-ms", "1", "--disk", &disk, "--filter"];
    let slot = format!("disk=root,file={}", filter.display());
    let server = Server::start(&scratch, &[&args[..], &[&slot]].concat());
    let mut rng = Rng::new(7);
    for death in 0..DEATHS {
        // Not always in the same moment of a sync; at least one has ended.
        let (opened, durable) = (word(&page, OPENED), word(&page, DURABLE));
        wait_for("a sync", || (word(&page, DURABLE) > durable).then_some(()));
        std::thread::sleep(Duration::from_micros(rng.below(15_000)));
        // A worker's death makes its successor forget how often the filter had failed.
        let victim = match death % 3 {
            0 => wait_for("a worker", || {
                server.children().into_iter().find(|pid| {
                    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    line.split(|byte| *byte == 0).any(|word| word == b"--restart")
                })
            }),
            _ => wait_for("a filter host", || process_with(&server, &filter.display().to_string())),
        };
        kill_process(Pid::from_raw(victim).unwrap(), Signal::KILL).unwrap();
        wait_for("its next life", || (word(&page, OPENED) > opened).then_some(()));
        assert_eq!(word(&page, WRONG), 0, "after death {death}: {}", server.stderr());
    }
    server.stop();
    // Offline, too.
    let ended = upcall(&["sidecar", &image.display().to_string()]);
    assert!(ended.stdout.contains("diary-0"), "{} {}", ended.stdout, ended.stderr);
    let file = scratch.join("disk.img.upcall").join("diary-0.sidecar");
    let bytes = std::fs::read(file).unwrap();
    let number = word(&page, DURABLE).to_ne_bytes();
    let slots = [64, 131_072 + 64];
    for at in slots {
        let state = &bytes[at..at + 6000];
        assert!(state.chunks(4).all(|word| word == number), "a slot at {at}");
    }
    assert_eq!(word(&page, WRONG), 0);
}
