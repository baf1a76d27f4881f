//! What `upcall top` says, as a program would read it.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::server::upcall;

/// The sums since the worker's start, as `upcall top --once --json` shows them.
#[derive(Debug)]
pub struct Top(Value);

impl Top {
    /// Looks at the page at `stats` once.
    #[track_caller]
    pub fn look(stats: &Path) -> Top {
        let ended = upcall(&["top", "--once", "--json", stats.to_str().unwrap()]);
        ended.expect_success();
        assert_eq!(ended.stdout.lines().count(), 1, "one object a line: {}", ended.stdout);
        Top(serde_json::from_str(&ended.stdout).expect("JSON"))
    }

    /// Looks again and again until `is_so`; the page is not written on every request's path.
    #[track_caller]
    pub fn wait(stats: &Path, what: &str, is_so: impl Fn(&Top) -> bool) -> Top {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let top = Top::look(stats);
            if is_so(&top) {
                return top;
            }
            assert!(Instant::now() < deadline, "{what} is not to be seen: {:#}", top.0);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The object as it is.
    pub fn json(&self) -> &Value {
        &self.0
    }

    /// A number of a hop of a disk, by its key.
    #[track_caller]
    pub fn number(&self, disk: &str, hop: &str, key: &str) -> u64 {
        let value = &self.hop(disk, hop)[key];
        value.as_f64().unwrap_or_else(|| panic!("{disk}, {hop}: {key} is {value}")) as u64
    }

    /// A counter of a filter's own; None before it was first collected.
    #[track_caller]
    pub fn counter(&self, disk: &str, filter: &str, name: &str) -> Option<u64> {
        let counters = self.hop(disk, filter)["counters"].as_array().expect("counters");
        counters.iter().find(|pair| pair[0] == name)?[1].as_u64()
    }

    #[track_caller]
    fn hop(&self, disk: &str, hop: &str) -> &Value {
        let find = |list: &Value, key: &str, name: &str| -> Option<usize> {
            list.as_array()?.iter().position(|entry| entry[key] == name)
        };
        let disks = &self.0["disks"];
        let place = find(disks, "name", disk).unwrap_or_else(|| panic!("no disk {disk}: {disks}"));
        let hops = &disks[place]["hops"];
        &hops[find(hops, "hop", hop).unwrap_or_else(|| panic!("no hop {hop}: {hops}"))]
    }
}
