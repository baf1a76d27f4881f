//! The worker is killed again and again under a verifying load: every request completes
//! exactly once, without an error, and every sector holds what it may hold.
//!
//! How often, in all chains together: UPCALL_WORKER_KILLS (20). The counts are printed as a
//! line for the ledger.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use upcall_tests::{
    Client, Filter, Load, LoadCounts, LoadMix, RawClient, RawOptions, Rng, Scratch, Server, feature,
};

const BYTES: u64 = 8 << 20;
const QUEUES: usize = 3;
const PATIENCE: Duration = Duration::from_secs(30);

/// What stands between the guest and the store.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Nothing, and the host's page cache: the store's own order.
    Straight,
    /// Nothing, past the page cache where the file system can: a dead worker's IO is still with
    /// the device when the next one starts.
    Direct,
    /// An observer, and a filter that changes what is on the disk.
    Changed,
    /// Requests wait in a filter, so that some always do.
    Held,
    /// Some take longer: they end in another order than they came in.
    Shuffled,
}

impl Way {
    const ALL: [Way; 5] = [Way::Straight, Way::Direct, Way::Changed, Way::Held, Way::Shuffled];

    fn filters(self, scratch: &Scratch) -> Vec<String> {
        match self {
            Way::Straight | Way::Direct => vec![],
            Way::Changed => {
                [Filter::Trace, Filter::Xor].map(|f| f.argument("root", scratch)).to_vec()
            }
            Way::Held => {
                let file = upcall_tests::rust_filter("throttle");
                vec![format!("disk=root,file={},param.iops=3000", file.display())]
            }
            Way::Shuffled => vec![Filter::Delay.argument("root", scratch)],
        }
    }
}

struct Campaign {
    scratch: Scratch,
    server: Server,
    socket: PathBuf,
    image: PathBuf,
    client: RawClient,
    load: Load,
    rng: Rng,
    /// Requests that were in flight when the worker died, in all deaths.
    caught: u64,
}

/// What one campaign came to.
struct Result {
    counts: LoadCounts,
    caught: u64,
    /// How long nobody served, by death.
    stalls_ms: Vec<u64>,
}

impl Campaign {
    fn start(way: Way, seed: u64) -> Campaign {
        let scratch = Scratch::new();
        let (image, socket) = (scratch.image("disk.img", BYTES), scratch.join("d.sock"));
        let (path, listen) = (image.display(), socket.display());
        let mut args = vec!["--restart".to_owned(), "--restart-pause-ms".into(), "1".into()];
        args.push("--disk".into());
        let direct = if matches!(way, Way::Direct) && knows_direct(&image) { "on" } else { "off" };
        args.push(format!("name=root,file={path},socket={listen},queues={QUEUES},direct={direct}"));
        for filter in way.filters(&scratch) {
            args.extend(["--filter".to_owned(), filter]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let server = Server::start(&scratch, &args);
        let mut options = RawOptions { queues: QUEUES, slots: 24, ..RawOptions::default() };
        // Every second campaign has packed rings, of which the client cannot say where they
        // stand when a worker has died.
        if seed % 2 == 1 {
            options.features |= feature::RING_PACKED;
        }
        let mut client = RawClient::connect_tracked(&socket, options).unwrap();
        assert_eq!(
            client.features() & feature::RING_PACKED,
            options.features & feature::RING_PACKED
        );
        let mut load = Load::on(seed, &mut client);
        if matches!(way, Way::Changed) {
            load = load.torn_zeroes_as(xor_key);
        }
        Campaign {
            scratch,
            server,
            socket,
            image,
            client,
            load,
            rng: Rng::new(seed ^ 1),
            caught: 0,
        }
    }

    fn run_for(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.load.submit(&mut self.client, &LoadMix::default());
            if self.load.reap(&mut self.client) == 0 {
                self.client.wait(0, Duration::from_micros(500));
            }
        }
    }

    fn worker(&self) -> Option<Pid> {
        let is_worker = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == b"--restart")
        };
        self.server.children().into_iter().find(is_worker).and_then(Pid::from_raw)
    }

    /// Kills the worker; true if there was one.
    fn kill(&self) -> bool {
        self.worker().is_some_and(|worker| kill_process(worker, Signal::KILL).is_ok())
    }

    #[track_caller]
    fn drain(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.load.in_flight() > 0 {
            self.load.reap(&mut self.client);
            self.client.wait(0, Duration::from_millis(1));
            let left = self.load.in_flight();
            assert!(
                Instant::now() < deadline,
                "{left} requests never end:\n{:?}",
                self.load.stuck()
            );
        }
    }

    /// Kills the worker `kills` times.
    fn kill_under_load(&mut self, kills: usize) {
        let mut done = 0;
        while done < kills {
            let time = Duration::from_micros(self.rng.below(60_000));
            self.run_for(time);
            done += usize::from(self.kill());
            self.caught += self.load.in_flight() as u64;
            if self.rng.below(4) == 0 {
                // And the next one, while it starts or has just begun to take up the work.
                std::thread::sleep(Duration::from_micros(self.rng.below(120_000)));
                done += usize::from(self.kill());
            }
            self.client.reconnect(&self.socket);
        }
    }

    #[track_caller]
    fn end(mut self, way: Way) -> Result {
        self.drain();
        self.load.read_back(&mut self.client);
        let counts = self.load.counts();
        assert_eq!(counts.submitted, counts.completed);
        drop(self.client);
        let stalls_ms = stalls_ms(&self.server.stderr());
        self.server.stop();
        let image = match way {
            Way::Changed => undo_xor(&self.image, &self.scratch.join("plain.img")),
            _ => self.image,
        };
        self.load.check_image(&image);
        Result { counts, caught: self.caught, stalls_ms }
    }
}

fn stalls_ms(log: &str) -> Vec<u64> {
    let said = log.lines().filter_map(|line| line.split_once("nobody served for "));
    said.map(|(_, rest)| rest.split(' ').next().unwrap().parse().unwrap()).collect()
}

fn knows_direct(image: &Path) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    let mut how = std::fs::File::options();
    how.read(true).custom_flags(libc::O_DIRECT).open(image).is_ok()
}

fn undo_xor(image: &Path, plain: &Path) -> PathBuf {
    let script = upcall_tests::root().join("filters/xor/unxor.py");
    let status = std::process::Command::new("python3").arg(script).args([image, plain]).status();
    assert!(status.unwrap().success());
    plain.to_owned()
}

/// What the filter xor changes a sector with: see upcall-xor.7.
fn xor_key(sector: u64) -> [u8; 512] {
    const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    let fnv1a = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    let seed = b"upcall".iter().fold(0xcbf2_9ce4_8422_2325, fnv1a);
    let mut key = [0; 512];
    for (index, word) in (sector * 64 + 1..).zip(key.chunks_exact_mut(8)) {
        let mut z = index.wrapping_mul(GAMMA).wrapping_add(seed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    }
    key
}

#[test]
fn the_key_of_xor_is_as_its_manual_says() {
    let start = &xor_key(54)[..8];
    assert_eq!(start, [0x4a, 0xa8, 0x71, 0x5e, 0x67, 0xef, 0xe9, 0xa0], "by unxor.py");
}

fn kills_in_all() -> usize {
    std::env::var("UPCALL_WORKER_KILLS").map_or(20, |text| text.parse().unwrap())
}

#[test]
fn a_worker_killed_under_load_loses_no_request_and_no_byte() {
    let (seed, begun) = (Rng::seed(), Instant::now());
    let kills = kills_in_all().div_ceil(Way::ALL.len());
    let (mut requests, mut sectors, mut caught) = (0, 0, 0);
    let mut stalls_ms = Vec::new();
    for (way, seed) in Way::ALL.into_iter().zip(seed..) {
        eprintln!("{way:?}");
        let mut campaign = Campaign::start(way, seed);
        campaign.kill_under_load(kills);
        let result = campaign.end(way);
        assert!(result.counts.completed > 100, "{way:?}: hardly a load: {:?}", result.counts);
        assert!(result.caught > 0, "{way:?}: no request was in flight at any death");
        requests += result.counts.completed;
        sectors += result.counts.sectors_checked;
        caught += result.caught;
        stalls_ms.extend(result.stalls_ms);
    }
    stalls_ms.sort_unstable();
    let all = kills * Way::ALL.len();
    println!(
        "ledger: {{\"kind\":\"worker-kill\",\"count\":{all},\"faults\":{all},\
         \"requests\":{requests},\"in_flight_at_death\":{caught},\"sectors_checked\":{sectors},\
         \"stall_ms_median\":{},\"stall_ms_max\":{},\"seed\":{seed},\"seconds\":{},\
         \"result\":\"ok\"}}",
        stalls_ms[stalls_ms.len() / 2],
        stalls_ms[stalls_ms.len() - 1],
        begun.elapsed().as_secs(),
    );
}

#[test]
fn a_load_that_overlaps_itself_is_right_where_nobody_dies() {
    for way in Way::ALL {
        let mut campaign = Campaign::start(way, Rng::seed());
        campaign.run_for(Duration::from_millis(500));
        campaign.end(way);
    }
}

#[test]
fn the_load_sees_writes_that_are_lost() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.image("disk.img", BYTES), scratch.join("d.sock"));
    let disk = format!("name=root,file={},socket={},direct=off", image.display(), socket.display());
    let fault = upcall_tests::rust_filter("fault");
    let fault =
        format!("disk=root,file={},param.effect=lose,param.probability=0.01", fault.display());
    let server = Server::start(&scratch, &["--disk", &disk, "--filter", &fault]);
    let seen = std::panic::catch_unwind(|| {
        let mut client = RawClient::connect(&socket, RawOptions::default()).unwrap();
        let mut load = Load::on(Rng::seed(), &mut client);
        for _ in 0..2000 {
            load.submit(&mut client, &LoadMix::default());
            load.reap(&mut client);
            client.wait(0, Duration::from_millis(1));
        }
    });
    assert!(seen.is_err(), "writes were lost, and nobody saw it");
    server.stop();
}
