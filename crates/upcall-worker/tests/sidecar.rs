//! A filter is killed at each point of writing its sidecar: what it finds next is the state
//! before or the new one, whole, and never older than what it was told is durable.

mod common;

use std::os::unix::fs::FileExt;
use std::time::Instant;

use common::*;
use upcall_worker::*;

/// Points of a sync, as the filter host's host.h has them.
const POINTS: [(&str, u32); 4] = [
    ("nothing of the slot is written", 15),
    ("half of it is", 16),
    ("all of it is, not durably", 17),
    ("durably", 18),
];
/// Where the words of diary.c's page are.
const OPENED: u64 = 4;
const WRONG: u64 = 8;
const AT: u64 = 12;
const DIARY: &str = "crates/upcall-worker/tests/data/diary.c";

struct Page(std::fs::File);

impl Page {
    fn word(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        self.0.read_exact_at(&mut word, at).unwrap();
        u32::from_ne_bytes(word)
    }

    /// The filter dies there, one life after the other.
    fn doom(&self, points: &[(u32, u32)]) {
        let mut words = [0u32; 4];
        for (place, (point, slot)) in points.iter().enumerate() {
            (words[2 * place], words[2 * place + 1]) = (*point, *slot);
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.0.write_all_at(&bytes, AT + 4).unwrap();
        // The position last: from then on it counts.
        self.0.write_all_at(&0u32.to_ne_bytes(), AT).unwrap();
    }

    fn wait(&self, at: u64, least: u32, what: &str) {
        wait_until(what, || self.word(at) >= least);
    }
}

#[test]
fn a_sidecar_is_the_old_state_or_the_new_one_wherever_in_its_sync_the_filter_is_killed() {
    let begun = Instant::now();
    let folder = Folder::new("diary");
    let page = folder.0.join("page");
    std::fs::write(&page, [0; 64]).unwrap();
    let page_flag = format!("-DPAGE=\"{}\"", page.display());
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&page).unwrap();
    let page = Page(file);
    page.0.write_all_at(&9u32.to_ne_bytes(), AT).unwrap();
    let diary = folder.filter(DIARY, &["-D_GNU_SOURCE", &page_flag]);
    let image = folder.0.join("disk.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let store = StoreConfig::Raw { path: image, direct: false, engine: Engine::Threads };
    let disk = DiskConfig { store, ..memory_disk("a", 0, vec![slot(&diary)]) };
    let log = Log::default();
    let recovery = RecoveryPolicy {
        failures_max: usize::MAX - 1,
        backoff_ms_min: 0,
        ..RecoveryPolicy::default()
    };
    let config = WorkerConfig {
        disks: vec![disk],
        stats: None,
        drain_ms: 100,
        recovery,
        log: log.sink(),
        write_down: None,
    };
    let worker = Worker::start(config).unwrap_or_else(|error| panic!("{error}"));
    let mut deaths = 0;
    for (name, point) in POINTS {
        for slot in 0..2 {
            // Then once more, while the next life mends what it finds, or syncs itself.
            let seconds = POINTS.iter().flat_map(|(_, second)| [(*second, 0), (*second, 1)]);
            for second in std::iter::once(None).chain(seconds.map(Some)) {
                let points: Vec<(u32, u32)> =
                    std::iter::once((point, slot)).chain(second).collect();
                let (opened, what) = (page.word(OPENED), format!("{name}, {slot}, {second:?}"));
                page.doom(&points);
                page.wait(AT, points.len() as u32, &what);
                page.wait(OPENED, opened + 1, &what);
                assert_eq!(page.word(WRONG), 0, "{what}: {:#?}", log.0.lock().unwrap());
                deaths += points.len();
            }
        }
    }
    println!(
        "ledger: {{\"kind\":\"filter kill -9 at each point of its sidecar's sync\",\"seeds\":1,\
         \"faults\":{deaths},\"seconds\":{:.1},\"result\":\"ok\"}}",
        begun.elapsed().as_secs_f64()
    );
    assert!(worker.shutdown().failures.is_empty());
}
