//! How long a guest stands still when it moves, live, from one QEMU to another.
//!
//! Always true: sides take turns; one server serves a disk to both QEMUs; the guest writes
//! to its disk before, while and after it moves; and a guest that does not survive, or whose
//! writes fail, is counted, not hidden.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::filters::{Filters, Kind, programs};
use crate::measure::{Effort, Row, Section, Unit};
use crate::path::servers::{self, Disk, Serving};
use crate::path::{PEER, ours};
use crate::vm::Vm;
use upcall_tests::Scratch;

/// The case.
pub const MOVE: &str = "a guest that writes 4k, one in flight, moves";
/// The side of a disk that no other process serves.
pub const OWN: &str = "QEMU's own virtio-blk";
/// The figures that goals refer to.
pub const DOWNTIME: &str = "QEMU says it stood still for";
/// See [`DOWNTIME`].
pub const UNWRITTEN: &str = "its image was not written for";

/// Guests that were not there any more after they had moved, or that could not write.
pub const LOST: &str = "guests lost";
/// Of one side, one after the other, until the benchmark gives up.
const LOST_MAX: usize = 3;
/// For a script in a guest.
const PATIENCE: Duration = Duration::from_secs(15);

/// Moves the guest of each side, in turn, round by round.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "migration",
        &[
            "Two QEMUs on this machine, emulated guests of 512 MiB with one processor, no limit of bandwidth, 300 ms (what QEMU allows if it is told nothing) for the last step, in which the guest stands still. The guest's fio writes with direct=1 and pauses 0.5 ms between writes. All guests run, but only the one that moves writes.",
            "An emulated guest's clock stands still with it, so the guest cannot say what it felt. Its server can: what /proc says that it has written is looked at each half a millisecond, and the longest time without a write, from a second before the migration to its end, is what is shown, beside the same of a second without one. It has in it what QEMU's figure leaves out: the disk's start at the target.",
            "On a busy machine emulated guests were lost in migrations, on every side, QEMU's own disk included; why is not known. One that is lost is counted, and another one moves in its place.",
            "upcall: one worker and one socket for both QEMUs. qemu-storage-daemon: one process with two exports of one node, as an export takes one client alone. QEMU's own virtio-blk: no server; both QEMUs open the image (cache=none).",
        ],
    );
    section.reference = Some(PEER.into());
    let scratch = Scratch::new();
    let filter = Filters::new(programs().join("bench-filters"))?.build(Kind::PLAIN, 0)?;
    let upcall = |name, chain: &[PathBuf]| servers::upcall(&scratch, name, Disk::Raw, 1, chain);
    let (none, one) = (upcall("none", &[])?, upcall("one", &[filter])?);
    let peer = servers::qemu_storage_daemon_with_two_exports(&scratch, "peer", Disk::Raw, 1)?;
    let mut sides = vec![
        Side::served(&scratch, ours(0), none)?,
        Side::served(&scratch, ours(1), one)?,
        Side::served(&scratch, PEER.to_owned(), peer)?,
    ];
    if !effort.quick {
        let image = servers::image(&scratch, "own")?;
        let plain = ["--plain".to_owned(), format!("{},cache=none", image.display())];
        sides.push(Side::start(&scratch, OWN.to_owned(), None, [plain.clone(), plain])?);
    }
    for side in &sides {
        side.begin_load()?;
    }
    for round in 0..if effort.quick { 1 } else { 5 } {
        let count = sides.len();
        for turn in 0..count {
            let side = &mut sides[(turn + round) % count];
            let row = section.row(MOVE, &side.name, "client, servers and QEMUs share the cores");
            let mut lost = Vec::new();
            while let Err(error) = side.moves(row) {
                lost.push(format!("{}: a guest was lost: {error}", side.name));
                if lost.len() == LOST_MAX {
                    return Err(lost.join("; "));
                }
                side.begin_anew()?;
            }
            row.push(LOST, Unit::Count, lost.len() as f64);
            section.about.extend(lost.into_iter().map(|error| error.replace('\n', " ")));
        }
    }
    Ok(section)
}

/// A disk, and the guest that has it now.
struct Side {
    name: String,
    serving: Option<Serving>,
    /// How the guest gets its disk: in every other QEMU the second way.
    ways: [[String; 2]; 2],
    folder: PathBuf,
    vm: Vm,
    moves: usize,
}

impl Side {
    fn served(scratch: &Scratch, name: String, serving: Serving) -> Result<Side, String> {
        let way = |socket: &PathBuf| ["--disk".to_owned(), socket.display().to_string()];
        let second = serving.second_socket.as_ref().unwrap_or(&serving.socket);
        let ways = [way(&serving.socket), way(second)];
        Side::start(scratch, name, Some(serving), ways)
    }

    fn start(
        scratch: &Scratch,
        name: String,
        serving: Option<Serving>,
        ways: [[String; 2]; 2],
    ) -> Result<Side, String> {
        // The path of a socket in it is to be short.
        let letters: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
        let folder = scratch.join(&letters);
        std::fs::create_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let vm = Vm::start(&folder.join("0"), &options(&ways[0]))?;
        Ok(Side { name, serving, ways, folder, vm, moves: 0 })
    }

    /// Goes on with a guest that has not moved yet.
    fn begin_anew(&mut self) -> Result<(), String> {
        self.vm.end();
        self.moves += 2 - self.moves % 2;
        self.vm = Vm::start(&self.folder.join(self.moves.to_string()), &options(&self.ways[0]))?;
        self.begin_load()
    }

    /// Waits for the boot, and leaves fio in the guest, stopped.
    fn begin_load(&self) -> Result<(), String> {
        self.vm.wait()?;
        let fio = "fio --name=load --filename=/dev/vda --rw=randwrite --bs=4k --size=64M \
            --direct=1 --ioengine=psync --thread --thinktime=500 --time_based --runtime=1d";
        // In a session of its own: a stopped process whose shell ends would be hung up.
        let script = format!(
            "setsid bash -c '{fio} >/tmp/fio.log 2>&1; touch /tmp/ended' </dev/null >/dev/null 2>&1 &
            until pidof fio >/dev/null; do sleep 0.1; done
            sleep 1
            kill -STOP $(pidof fio)"
        );
        self.vm.run(&script, PATIENCE).map(drop)
    }

    /// One migration.
    fn moves(&mut self, row: &mut Row) -> Result<(), String> {
        let number = self.moves + 1;
        let incoming = [&options(&self.ways[number % 2])[..], &["--incoming".to_owned()]].concat();
        let next = Vm::start(&self.folder.join(number.to_string()), &incoming)?;
        let writers = match &self.serving {
            Some(serving) => vec![serving.watched[0].1],
            None => vec![self.vm.pid()?, next.pid()?],
        };
        self.vm.run("kill -CONT $(pidof fio); sleep 1", PATIENCE)?;
        let second = || std::thread::sleep(Duration::from_secs(1));
        let (normal, ()) = longest_without_write(&writers, second);
        let (longest, moved) = longest_without_write(&writers, || {
            second();
            let moved = self.vm.move_to(&next);
            std::thread::sleep(Duration::from_millis(300));
            moved
        });
        let moved = moved?;
        next.run(
            "if [ -e /tmp/ended ]; then cat /tmp/fio.log; exit 1; fi; kill -STOP $(pidof fio)",
            PATIENCE,
        )?;
        // The one before is ended.
        self.vm = next;
        self.moves = number;
        for (name, time) in [
            (DOWNTIME, moved.downtime),
            (UNWRITTEN, longest),
            ("normally not written for", normal),
            ("the whole migration took", moved.total),
        ] {
            row.push(name, Unit::Nanoseconds, time.as_nanos() as f64);
        }
        Ok(())
    }
}

fn options(way: &[String; 2]) -> Vec<String> {
    let rest = ["--with", "fio", "--memory", "512M", "--cpus", "1"].map(str::to_owned);
    [&way[..], &rest].concat()
}

/// The longest time in which none of these processes wrote, while something is done.
fn longest_without_write<T>(pids: &[u32], what: impl FnOnce() -> T) -> (Duration, T) {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let (mut longest, mut since, mut before) = (Duration::ZERO, Instant::now(), 0);
            while !is_over.load(Ordering::Relaxed) {
                let written: u64 = pids.iter().map(|pid| written_bytes(*pid)).sum();
                if written != before {
                    before = written;
                    since = Instant::now();
                }
                longest = longest.max(since.elapsed());
                std::thread::sleep(Duration::from_micros(500));
            }
            longest
        });
        let result = what();
        is_over.store(true, Ordering::Relaxed);
        (watching.join().unwrap_or_default(), result)
    })
}

/// What a process has sent to storage so far; 0 if it is gone.
fn written_bytes(pid: u32) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_without_writes_is_seen_and_ends_with_a_write() {
        let scratch = Scratch::new();
        let write = |name: &str| {
            let file = std::fs::File::create(scratch.join(name)).unwrap();
            std::io::Write::write_all(&mut &file, &[1; 8192]).unwrap();
            file.sync_all().unwrap();
        };
        let (longest, ()) = longest_without_write(&[std::process::id()], || {
            for name in ["a", "b"] {
                write(name);
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        assert!(longest >= Duration::from_millis(90), "{longest:?}");
        assert!(longest < Duration::from_millis(190), "the second write was not seen: {longest:?}");
    }
}
