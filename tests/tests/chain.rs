//! Chains change under a verifying load, through the control socket, while filter hosts and the
//! worker are killed: no wrong byte, no error for the guest, and the chain is the old or the new one.
//!
//! How many changes: UPCALL_CHAIN_CHANGES (16). The counts are printed as a line for the ledger.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use upcall_tests::{
    Client, Load, LoadMix, RawClient, RawOptions, Rng, Scratch, Server, c_filter, root,
    rust_filter, upcall, upcall_program,
};

const BYTES: u64 = 4 << 20;
const DISKS: [&str; 2] = ["a", "b"];
const PATIENCE: Duration = Duration::from_secs(30);
/// What the changer below adds to each byte.
const KEY: u8 = 7;

/// A filter of the worker's own tests, in two versions, that can be bad in many ways.
fn build(scratch: &Scratch, name: &str, flags: &[&str]) -> PathBuf {
    let target = scratch.join(name);
    let built = Command::new("cc")
        .args(["-std=c11", "-O1", "-fPIC", "-shared", "-pthread"])
        .args(flags)
        .arg(format!("-I{}", root().join("sdk/c/include").display()))
        .arg("-o")
        .arg(&target)
        .arg(root().join("crates/upcall-worker/tests/data/changing.c"))
        .status();
    assert!(built.unwrap().success());
    target
}

/// What a command over the control socket said.
enum Answer {
    Done(Value),
    /// The worker says no: which kind of problem, and what.
    Problem(String, String),
    /// Nobody answered, or no longer.
    Lost,
}

/// A worker with two disks.
struct Rig {
    scratch: Scratch,
    server: Server,
    changer: [PathBuf; 2],
    watcher: [PathBuf; 2],
}

impl Rig {
    fn new() -> Rig {
        let scratch = Scratch::new();
        let build = |name, flags: &[&str]| build(&scratch, name, flags);
        let changer = [
            build("changer1.so", &["-DCHANGES"]),
            build("changer2.so", &["-DCHANGES", "-DVERSION=\"2\""]),
        ];
        let watcher = [build("watcher1.so", &[]), build("watcher2.so", &["-DVERSION=\"2\""])];
        let mut args = vec!["--restart".to_owned(), "--restart-pause-ms".into(), "1".into()];
        args.extend(["--control".into(), scratch.text("control")]);
        for name in DISKS {
            let image = scratch.image(&format!("{name}.img"), BYTES);
            let (image, socket) = (image.display(), scratch.text(&format!("{name}.sock")));
            args.push("--disk".into());
            args.push(format!("name={name},file={image},socket={socket},queues=2,direct=off"));
            args.push("--filter".into());
            args.push(format!("disk={name},file={},param.key={KEY}", changer[0].display()));
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let server = Server::start(&scratch, &args);
        Rig { scratch, server, changer, watcher }
    }

    fn client(&self, disk: &str, seed: u64) -> (RawClient, Load) {
        let options = RawOptions { queues: 2, slots: 16, ..RawOptions::default() };
        let socket = self.scratch.join(&format!("{disk}.sock"));
        let mut client = RawClient::connect_tracked(&socket, options).unwrap();
        let load = Load::on(seed, &mut client);
        (client, load)
    }

    fn worker(&self) -> Option<Pid> {
        let is_worker = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == b"--restart")
        };
        self.server.children().into_iter().find(is_worker).and_then(Pid::from_raw)
    }

    /// The filter hosts.
    fn hosts(&self) -> Vec<Pid> {
        let Some(worker) = self.worker() else { return Vec::new() };
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{}/task", worker.as_raw_pid())) else {
            return Vec::new();
        };
        let children = tasks.flatten().flat_map(|task| {
            let list = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()
        });
        children.filter_map(Pid::from_raw).collect()
    }

    fn chain(&self, args: &[&str], change: &Value) -> Answer {
        let control = self.scratch.text("control");
        let file = self.scratch.join("change.json");
        std::fs::write(&file, change.to_string()).unwrap();
        let all = ["chain", "apply", file.to_str().unwrap(), "--json", "--control", &control];
        let output = Command::new(upcall_program()).args(all).args(args).output().unwrap();
        let Ok(said) = serde_json::from_slice::<Value>(&output.stdout) else { return Answer::Lost };
        match output.status.success() {
            true => Answer::Done(said),
            false => Answer::Problem(
                said["type"].as_str().unwrap().into(),
                said["detail"].as_str().unwrap().into(),
            ),
        }
    }

    /// The names of each disk's slots, once a worker answers.
    fn shown(&self) -> [Vec<String>; 2] {
        let control = self.scratch.text("control");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = upcall(&["show", "--json", "--control", &control]);
            if said.code == Some(0) {
                let disks: Vec<Value> =
                    said.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
                return [0, 1].map(|disk| names(&disks[disk]["chain"], "name"));
            }
            assert!(Instant::now() < deadline, "nobody answers: {}", said.stderr);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn names(list: &Value, key: &str) -> Vec<String> {
    let name = |item: &Value| item.get(key).unwrap_or(item).as_str().unwrap().to_owned();
    list.as_array().unwrap().iter().map(name).collect()
}

/// Edits of one disk whose chain is `chain`, at random; and whether they must come to nothing.
fn edits(rig: &Rig, rng: &mut Rng, chain: &[String]) -> (Vec<Value>, bool) {
    let bad = |how: &str| json!([{"name": "bad", "value": how}]);
    let others: Vec<&String> = chain.iter().filter(|name| !name.starts_with("changer")).collect();
    let pick = |rng: &mut Rng| others[rng.below(others.len() as u64) as usize].clone();
    let version = rng.below(2) as usize;
    match rng.below(10) {
        0 | 1 if chain.len() < 6 => {
            (vec![json!({"edit": "attach", "file": rig.watcher[version]})], false)
        }
        2 if chain.len() < 6 => {
            (vec![json!({"edit": "attach", "file": c_filter("trace", 64)})], false)
        }
        3 if chain.len() < 6 => {
            let params = json!([{"name": "iops", "value": "1000000"}]);
            let file = rust_filter("throttle");
            (vec![json!({"edit": "attach", "file": file, "params": params})], false)
        }
        4 if !others.is_empty() => (vec![json!({"edit": "detach", "slot": pick(rng)})], false),
        5 if !others.is_empty() => {
            let order = rng.below(20) as i32 - 10;
            (vec![json!({"edit": "set", "slot": pick(rng), "order": order})], false)
        }
        6 => {
            let ways = ["die", "die-later", "fail", "nonsense", "hang", "refuse-open", "die-open"];
            let how = ways[rng.below(ways.len() as u64) as usize];
            let (file, params) = (&rig.watcher[version], bad(how));
            let edit =
                json!({"edit": "attach", "file": file, "params": params, "deadline_ms": 200});
            (vec![edit], true)
        }
        7 => {
            let ways = ["die", "die-later", "die-done", "fail", "refuse-open", "refuse-state"];
            let how = ways[rng.below(ways.len() as u64) as usize];
            (vec![json!({"edit": "replace", "slot": "changer", "params": bad(how)})], true)
        }
        _ => (
            vec![json!({"edit": "replace", "slot": "changer", "file": rig.changer[version]})],
            false,
        ),
    }
}

#[derive(Default)]
struct Tally {
    made: u64,
    refused: u64,
    taken_back: u64,
    lost: u64,
    workers: u64,
    hosts: u64,
    pauses_us: Vec<u64>,
}

/// What the thread that changes and the one that loads tell each other.
#[derive(Default)]
struct Between {
    deaths: AtomicU64,
    seen: AtomicU64,
    is_over: AtomicBool,
}

/// One change, with a kill in the midst of every third.
fn step(rig: &Rig, rng: &mut Rng, number: u64, between: &Between, tally: &mut Tally) {
    let before = rig.shown();
    let (mut disks, mut is_vain) = (Vec::new(), false);
    let both = rng.below(3) == 0;
    let first = rng.below(2) as usize;
    for disk in 0..2 {
        if both || disk == first {
            let (edits, vain) = edits(rig, rng, &before[disk]);
            is_vain |= vain;
            disks.push(json!({"disk": DISKS[disk], "edits": edits}));
        }
    }
    let change = json!({"disks": disks, "trial_ms": 1000, "trial_requests": 200, "drain_ms": 5000});
    // What it would come to.
    let mut after = before.clone();
    match rig.chain(&["--dry-run"], &change) {
        Answer::Done(would) => {
            for disk in would["disks"].as_array().unwrap() {
                let place = DISKS.iter().position(|name| disk["disk"] == *name).unwrap();
                assert_eq!(names(&disk["before"], ""), before[place]);
                after[place] = names(&disk["after"], "");
            }
        }
        Answer::Problem(kind, what) => panic!("{kind}: {what}: {change}"),
        Answer::Lost => panic!("nobody answered: {}", rig.server.stderr()),
    }
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(|| rig.chain(&[], &change));
        if number.is_multiple_of(3) {
            std::thread::sleep(Duration::from_micros(rng.below(40_000)));
            let hosts = rig.hosts();
            if rng.below(2) == 0 && !hosts.is_empty() {
                let host = hosts[rng.below(hosts.len() as u64) as usize];
                tally.hosts += u64::from(kill_process(host, Signal::KILL).is_ok());
            } else if let Some(worker) = rig.worker() {
                let killed = kill_process(worker, Signal::KILL).is_ok();
                tally.workers += u64::from(killed);
                between.deaths.fetch_add(u64::from(killed), Ordering::SeqCst);
            }
        }
        asked.join().unwrap()
    });
    let now = rig.shown();
    match answer {
        Answer::Done(changed) => {
            tally.made += 1;
            tally.pauses_us.push(changed["pause_us"].as_u64().unwrap());
            assert!(!is_vain, "a bad filter is in the chain: {change}");
            assert_eq!(now, after, "{change}");
        }
        Answer::Problem(kind, what) => {
            match kind.as_str() {
                "trial-failed" => tally.taken_back += 1,
                "rolled-back" | "refused" | "ending" => tally.refused += 1,
                _ => panic!("{kind}: {what}: {change}\n{}", rig.server.stderr()),
            }
            assert_eq!(now, before, "{kind}: {what}: {change}");
        }
        Answer::Lost => {
            tally.lost += 1;
            assert!(now == before || now == after, "{before:?} to {after:?}, but {now:?}");
        }
    }
}

fn undo(image: &Path, plain: &Path) -> PathBuf {
    let bytes = std::fs::read(image).unwrap();
    let bytes: Vec<u8> = bytes.iter().map(|byte| byte.wrapping_sub(KEY)).collect();
    std::fs::write(plain, bytes).unwrap();
    plain.to_owned()
}

#[test]
fn chains_change_under_load_and_under_kills_and_nobody_sees_more_than_a_pause() {
    let changes = std::env::var("UPCALL_CHAIN_CHANGES").map_or(16, |text| text.parse().unwrap());
    let (seed, begun) = (Rng::seed(), Instant::now());
    let rig = Rig::new();
    let mut guests = DISKS.map(|disk| rig.client(disk, seed));
    let between = Between::default();
    let tally = std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            struct Over<'a>(&'a AtomicBool);
            impl Drop for Over<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::SeqCst);
                }
            }
            let _over = Over(&between.is_over);
            let (mut tally, mut rng) = (Tally::default(), Rng::new(seed ^ 2));
            for number in 0..changes {
                step(&rig, &mut rng, number, &between, &mut tally);
            }
            tally
        });
        while !between.is_over.load(Ordering::SeqCst) {
            let deaths = between.deaths.load(Ordering::SeqCst);
            if between.seen.swap(deaths, Ordering::SeqCst) < deaths {
                for ((client, _), disk) in guests.iter_mut().zip(DISKS) {
                    client.reconnect(&rig.scratch.join(&format!("{disk}.sock")));
                }
            }
            let mut ended = 0;
            for (client, load) in &mut guests {
                load.submit(client, &LoadMix { discards: 0, ..LoadMix::default() });
                ended += load.reap(client);
            }
            if ended == 0 {
                guests[0].0.wait(0, Duration::from_micros(300));
            }
        }
        changing.join().unwrap_or_else(|_| panic!("{}", rig.server.stderr()))
    });
    let (mut requests, mut sectors) = (0, 0);
    for ((client, load), disk) in guests.iter_mut().zip(DISKS) {
        let deadline = Instant::now() + PATIENCE;
        if between.seen.load(Ordering::SeqCst) < between.deaths.load(Ordering::SeqCst) {
            client.reconnect(&rig.scratch.join(&format!("{disk}.sock")));
        }
        while load.in_flight() > 0 {
            load.reap(client);
            client.wait(0, Duration::from_millis(1));
            assert!(Instant::now() < deadline, "they never end: {:?}", load.stuck());
        }
        load.read_back(client);
        let counts = load.counts();
        assert_eq!(counts.submitted, counts.completed);
        assert!(counts.completed > 100, "hardly a load: {counts:?}");
        requests += counts.completed;
        sectors += counts.sectors_checked;
    }
    let [(one, mut first), (two, mut second)] = guests;
    drop((one, two));
    let Rig { scratch, server, .. } = rig;
    server.stop();
    first.check_image(&undo(&scratch.join("a.img"), &scratch.join("a.plain")));
    second.check_image(&undo(&scratch.join("b.img"), &scratch.join("b.plain")));
    let Tally { made, refused, taken_back, lost, workers, hosts, mut pauses_us } = tally;
    pauses_us.sort_unstable();
    assert!(made > 0 && taken_back > 0, "{made} made, {taken_back} taken back");
    println!(
        "ledger: {{\"kind\":\"chain-change\",\"count\":{changes},\"faults\":{},\"made\":{made},\
         \"taken_back\":{taken_back},\"refused\":{refused},\"lost\":{lost},\"workers_killed\":\
         {workers},\"hosts_killed\":{hosts},\"pause_us_median\":{},\"requests\":{requests},\
         \"sectors_checked\":{sectors},\"seed\":{seed},\"seconds\":{},\"result\":\"ok\"}}",
        workers + hosts + taken_back,
        pauses_us[pauses_us.len() / 2],
        begun.elapsed().as_secs(),
    );
}

#[test]
fn a_chain_outlives_the_worker_that_was_given_it() {
    let rig = Rig::new();
    let attach = json!({"disks": [
        {"disk": "a", "edits": [{"edit": "attach", "file": rig.watcher[0], "name": "eye"}]},
        {"disk": "b", "edits": [{"edit": "replace", "slot": "changer", "file": rig.changer[1]}]},
    ], "trial_ms": 0});
    assert!(matches!(rig.chain(&[], &attach), Answer::Done(_)));
    let before = rig.worker().unwrap();
    for _ in 0..2 {
        kill_process(rig.worker().unwrap(), Signal::KILL).unwrap();
        assert_eq!(
            rig.shown(),
            [vec!["eye".to_owned(), "changer-0".into()], vec!["changer-0".into()]]
        );
    }
    assert_ne!(rig.worker().unwrap(), before);
    rig.server.stop();
}

#[test]
fn who_may_not_change_is_told_so_and_what_was_asked_is_in_the_log() {
    let rig = Rig::new();
    let control = rig.scratch.text("control");
    let mode = std::fs::metadata(&control).unwrap().permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600, "the owner's alone");
    let nonsense = json!({"disks": [{"disk": "c", "edits": []}]});
    let Answer::Problem(kind, what) = rig.chain(&[], &nonsense) else { panic!("disk c?") };
    assert_eq!(kind, "not-found");
    assert!(what.contains("the disks are: a, b"), "{what}");
    if rustix::process::geteuid().is_root() {
        // Anybody may look, if the socket's permissions say so, but not change.
        let all = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(&control, all).unwrap();
        let folder = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(rig.scratch.path(), folder).unwrap();
        let asked = |path: &str, body: &str| {
            let script = "import os, socket, sys\n\
                os.setgid(65534); os.setuid(65534)\n\
                s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n\
                body = sys.argv[3]\n\
                how = 'POST' if body else 'GET'\n\
                s.sendall((how + ' ' + sys.argv[2] + ' HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n'\n\
                    'content-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n' % len(body)\n\
                    + body).encode())\n\
                print(s.makefile().read())";
            let output = Command::new("python3")
                .args(["-c", script, &control, path, body])
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        assert!(asked("/v1/disks", "").contains("200 OK"));
        let said = asked("/v1/changes", &nonsense.to_string());
        assert!(
            said.contains("403 Forbidden") && said.contains("may look, but not change"),
            "{said}"
        );
        assert!(rig.server.stderr().contains("user 65534, process"), "{}", rig.server.stderr());
    }
    let log = rig.server.stderr();
    assert!(log.contains("asks for a chain change: disk c"), "{log}");
    let events = upcall(&["events", "--control", &control]);
    assert!(events.stdout.contains("asks for a chain change: disk c"), "{events:?}");
    let metrics = upcall(&["metrics", "--control", &control]);
    assert!(
        metrics.stdout.contains("upcall_hop_requests_total{disk=\"a\",hop=\"changer\""),
        "{metrics:?}"
    );
    rig.server.stop();
}
