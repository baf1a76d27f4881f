//! Chains change under a verifying load, through the control socket, while filter hosts and the
//! worker are killed: no wrong byte, no error for the guest, and the chain is the old or the new one.
//!
//! How many changes: UPCALL_CHAIN_CHANGES (16). The counts are printed as a line for the ledger.
//! UPCALL_SEED replays what is tried; when a kill strikes is again for the clock to say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
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

    /// How many changes workers were asked for so far.
    fn asked(&self) -> usize {
        self.server.stderr().matches("asks for a chain change").count()
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

/// What may become of a chain. A campaign of some length must have seen all of it.
const KINDS: [&str; 8] = [
    "attach",
    "detach",
    "replace",
    "reorder",
    "parameters",
    "terms",
    "attach a bad one",
    "replace by a bad one",
];

/// An edit of a disk whose chain is `chain`, at random; which kind, and whether it must come to
/// nothing.
fn edit(rig: &Rig, rng: &mut Rng, chain: &[String]) -> (&'static str, Value, bool) {
    let bad = |how: &str| json!([{"name": "bad", "value": how}]);
    let params = |iops: u64| json!([{"name": "iops", "value": iops.to_string()}]);
    let others: Vec<&String> = chain.iter().filter(|name| !name.starts_with("changer")).collect();
    let throttle = others.iter().find(|name| name.starts_with("throttle"));
    let version = rng.below(2) as usize;
    let has_room = chain.len() < 6;
    let (kind, way) = (rng.below(12), rng.below(64) as usize);
    match kind {
        0 if has_room => ("attach", json!({"edit": "attach", "file": rig.watcher[version]}), false),
        1 if has_room => {
            ("attach", json!({"edit": "attach", "file": c_filter("trace", 64)}), false)
        }
        2 | 3 if has_room && throttle.is_none() => {
            let (file, params) = (rust_filter("throttle"), params(1_000_000));
            ("attach", json!({"edit": "attach", "file": file, "params": params}), false)
        }
        3 | 4 if throttle.is_some() => {
            let (slot, params) = (throttle, params(1_000_000 + way as u64));
            ("parameters", json!({"edit": "replace", "slot": slot, "params": params}), false)
        }
        5 | 6 if !others.is_empty() => {
            ("detach", json!({"edit": "detach", "slot": others[way % others.len()]}), false)
        }
        7 if !others.is_empty() => {
            let (slot, order) = (others[way % others.len()], way as i32 % 20 - 10);
            ("reorder", json!({"edit": "set", "slot": slot, "order": order}), false)
        }
        8 => {
            let (slot, deadline_ms) = (&chain[way % chain.len()], 5000 + way);
            ("terms", json!({"edit": "set", "slot": slot, "deadline_ms": deadline_ms}), false)
        }
        9 => {
            let ways = ["die", "die-later", "fail", "nonsense", "hang", "refuse-open", "die-open"];
            let (file, params) = (&rig.watcher[version], bad(ways[way % ways.len()]));
            let edit =
                json!({"edit": "attach", "file": file, "params": params, "deadline_ms": 200});
            ("attach a bad one", edit, true)
        }
        10 => {
            let ways = ["die", "die-later", "die-done", "fail", "refuse-open", "die-open"];
            let params = bad(ways[way % ways.len()]);
            let edit = json!({"edit": "replace", "slot": "changer", "params": params});
            ("replace by a bad one", edit, true)
        }
        _ => {
            let edit = json!({"edit": "replace", "slot": "changer", "file": rig.changer[version]});
            ("replace", edit, false)
        }
    }
}

#[derive(Default)]
struct Tally {
    made: u64,
    refused: u64,
    taken_back: u64,
    lost: u64,
    /// Killed while a change was under way; and those that it was over before.
    workers: u64,
    hosts: u64,
    late: u64,
    kinds: BTreeMap<&'static str, u64>,
    /// Of both disks at once.
    of_both: u64,
    pauses_us: Vec<u64>,
}

fn detaches(disks: &[Value]) -> bool {
    disks.iter().any(|disk| disk["edits"][0]["edit"] == "detach")
}

/// One change, with a kill in the midst of most.
fn step(rig: &Rig, seed: u64, number: u64, tally: &mut Tally) {
    // Of its own, so that how the changes before it ended does not move its dice.
    let mut rng = Rng::new(seed ^ (number + 1).wrapping_mul(0x9e37_79b9));
    let rng = &mut rng;
    let before = rig.shown();
    let (mut disks, mut is_vain) = (Vec::new(), false);
    let both = rng.below(3) == 0;
    let first = rng.below(2) as usize;
    for disk in 0..2 {
        if both || disk == first {
            let (kind, edit, vain) = edit(rig, rng, &before[disk]);
            // Beside a filter that leaves, and misses what is to be recorded, no other has a trial.
            if !disks.is_empty() && (is_vain && kind == "detach" || vain && detaches(&disks)) {
                continue;
            }
            *tally.kinds.entry(kind).or_default() += 1;
            is_vain |= vain;
            disks.push(json!({"disk": DISKS[disk], "edits": [edit]}));
        }
    }
    tally.of_both += u64::from(disks.len() == 2);
    // So many requests, however slow the disk is: one that is bad fails before.
    let change =
        json!({"disks": disks, "trial_ms": 60_000, "trial_requests": 200, "drain_ms": 5000});
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
    let begun = rig.asked();
    let (is_kill, is_host, which) = (rng.below(5) > 0, rng.below(2) == 0, rng.next());
    // Most of a change is over soon; a trial lasts.
    let pause_us = [1_000, 4_000, 15_000, 60_000][rng.below(4) as usize];
    let pause = Duration::from_micros(rng.below(pause_us));
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(|| rig.chain(&[], &change));
        if is_kill {
            while rig.asked() == begun && !asked.is_finished() {
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(pause);
            let hosts = if is_host { rig.hosts() } else { Vec::new() };
            let victim = match hosts.len() as u64 {
                0 => rig.worker(),
                count => Some(hosts[(which % count) as usize]),
            };
            let in_time = !asked.is_finished();
            let is_killed = victim.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok());
            let count = match (in_time, hosts.is_empty()) {
                (false, _) => &mut tally.late,
                (true, true) => &mut tally.workers,
                (true, false) => &mut tally.hosts,
            };
            *count += u64::from(is_killed);
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
            // One that fails is never written down, whenever the worker dies.
            let may_be_after = !is_vain && now == after;
            assert!(now == before || may_be_after, "{before:?} to {after:?}, but {now:?}");
        }
    }
}

fn undo(image: &Path, plain: &Path) -> PathBuf {
    let bytes = std::fs::read(image).unwrap();
    let bytes: Vec<u8> = bytes.iter().map(|byte| byte.wrapping_sub(KEY)).collect();
    std::fs::write(plain, bytes).unwrap();
    plain.to_owned()
}

/// Loads both disks for as long as `work` takes, reconnecting as QEMU does.
fn under_load<T: Send>(
    rig: &Rig,
    guests: &mut [(RawClient, Load); 2],
    work: impl FnOnce() -> T + Send,
) -> T {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            let _over = Over(&is_over);
            work()
        });
        while !is_over.load(Ordering::SeqCst) {
            let mut ended = 0;
            for ((client, load), disk) in guests.iter_mut().zip(DISKS) {
                client.reconnect_if_cut(&rig.scratch.join(&format!("{disk}.sock")));
                load.submit(client, &LoadMix { discards: 0, ..LoadMix::default() });
                ended += load.reap(client);
            }
            if ended == 0 {
                guests[0].0.wait(0, Duration::from_micros(300));
            }
        }
        working.join().unwrap_or_else(|_| panic!("{}", rig.server.stderr()))
    })
}

#[test]
fn chains_change_under_load_and_under_kills_and_nobody_sees_more_than_a_pause() {
    let changes = std::env::var("UPCALL_CHAIN_CHANGES").map_or(16, |text| text.parse().unwrap());
    let (seed, begun) = (Rng::seed(), Instant::now());
    let rig = Rig::new();
    let mut guests = DISKS.map(|disk| rig.client(disk, seed));
    let tally = under_load(&rig, &mut guests, || {
        let mut tally = Tally::default();
        for number in 0..changes {
            step(&rig, seed, number, &mut tally);
        }
        tally
    });
    let (mut requests, mut sectors) = (0, 0);
    for ((client, load), disk) in guests.iter_mut().zip(DISKS) {
        let deadline = Instant::now() + PATIENCE;
        while load.in_flight() > 0 {
            client.reconnect_if_cut(&rig.scratch.join(&format!("{disk}.sock")));
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
    let Tally { made, refused, taken_back, lost, workers, hosts, late, kinds, of_both, .. } = tally;
    let mut pauses_us = tally.pauses_us;
    pauses_us.sort_unstable();
    assert!(made > 0, "{kinds:?}");
    if changes >= 100 {
        let unseen: Vec<_> = KINDS.iter().filter(|kind| !kinds.contains_key(*kind)).collect();
        assert!(unseen.is_empty(), "never tried, UPCALL_SEED={seed}: {unseen:?}");
        assert!(taken_back > 0 && of_both > 0, "{taken_back} taken back, {of_both} of both disks");
        let in_the_middle = workers + hosts;
        assert!(in_the_middle * 3 >= changes, "{in_the_middle} kills in time, {late} too late");
        assert!(workers * 8 >= changes && hosts * 8 >= changes, "{workers} workers, {hosts} hosts");
    }
    let line = json!({
        "kind": "chain-change", "count": changes, "kinds": kinds, "of_both_disks": of_both,
        "faults": workers + hosts + taken_back, "workers_killed_in_the_middle": workers,
        "hosts_killed_in_the_middle": hosts, "killed_after_it": late, "made": made,
        "taken_back": taken_back, "refused": refused, "lost": lost,
        "pause_us_median": pauses_us[pauses_us.len() / 2], "requests": requests,
        "sectors_checked": sectors, "seed": seed, "seconds": begun.elapsed().as_secs(),
        "result": "ok",
    });
    println!("ledger: {line}");
}

#[test]
fn a_filter_that_dies_while_its_disk_shall_stand_still_is_started_again() {
    let rig = Rig::new();
    // Of the disk's two queues one has no guest, and is still at once.
    let options = RawOptions { queues: 1, slots: 16, ..RawOptions::default() };
    let mut client = RawClient::connect(&rig.scratch.join("a.sock"), options).unwrap();
    let mut load = Load::on(1, &mut client);
    let before = rig.hosts();
    let change = |edit: Value| {
        let disk = json!({"disk": "a", "edits": [edit]});
        rig.chain(&[], &json!({"disks": [disk], "trial_ms": 0, "drain_ms": 5000}))
    };
    let slow = json!([{"name": "bad", "value": "slow"}]);
    let slow =
        json!({"edit": "attach", "file": rig.watcher[0], "on_failure": "hold", "params": slow});
    assert!(matches!(change(slow), Answer::Done(_)));
    let slow = rig.hosts().into_iter().find(|host| !before.contains(host)).unwrap();
    load.submit(&mut client, &LoadMix::default());
    let begun = rig.asked();
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(|| change(json!({"edit": "attach", "file": rig.watcher[1]})));
        while rig.asked() == begun {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(50));
        kill_process(slow, Signal::KILL).unwrap();
        asked.join().unwrap()
    });
    let log = rig.server.stderr();
    let Answer::Done(changed) = answer else { panic!("{log}") };
    assert!(changed["pause_us"].as_u64().unwrap() < 3_000_000, "{log}");
    assert!(log.contains("filter watcher serves again"), "it was not in the midst of it: {log}");
    while load.in_flight() > 0 {
        load.reap(&mut client);
        client.wait(0, Duration::from_millis(1));
    }
    drop(client);
    rig.server.stop();
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

#[test]
fn messages_for_programs_say_in_fields_who_asked_for_what() {
    let scratch = Scratch::new();
    let (control, socket) = (scratch.text("control"), scratch.text("a.sock"));
    let disk = format!("name=a,null=1M,socket={socket}");
    let server = Server::start(
        &scratch,
        &["--restart", "--log-format", "json", "--control", &control, "--disk", &disk],
    );
    let trace = c_filter("trace", 64);
    let attached =
        upcall(&["chain", "attach", "a", trace.to_str().unwrap(), "--control", &control]);
    attached.expect_success();
    let log = server.stderr();
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect();
    let of_us = json!(rustix::process::geteuid().as_raw());
    let told: Vec<&Value> = lines.iter().filter(|line| line["user"] == of_us).collect();
    assert_eq!(told.len(), 2, "asked, and made: {log}");
    assert!(told.iter().all(|line| line["process"].is_u64()), "{log}");
    let change = format!("disk a: attach {}", trace.display());
    assert!(told.iter().all(|line| line["change"] == change && line["level"] == "info"), "{log}");
    assert!(told[1]["pause_us"].is_u64(), "{log}");
    // For people the text is the same.
    let events = upcall(&["events", "--control", &control]);
    assert!(events.stdout.contains(told[0]["text"].as_str().unwrap()), "{events:?}");
    server.stop();
}
