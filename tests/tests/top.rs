//! What an operator sees and says: `upcall top` while requests run, and a configuration file
//! that says what flags say.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use upcall_tests::{
    Client, Disk, Driver, Filter, Io, Outcome, Part, RawClient, RawOptions, Scratch, Server, Top,
    c_filter, kind, rust_filter, upcall, upcall_program,
};

const BYTES: u64 = 32 << 20;
const HOPS: [&str; 3] = ["request", "trace", "store"];

fn counted(disk: &Disk, driver: &mut Driver) -> Top {
    for _ in 0..100 {
        driver.read(0, 8192, 4096);
    }
    for _ in 0..40 {
        driver.write(1, 65536, &[1; 8192]);
    }
    for _ in 0..5 {
        assert_eq!(driver.run(0, Io::Flush), Outcome::Ok);
    }
    let stats = disk.scratch.join("disk.sock.stats");
    Top::wait(&stats, "every request", |top| {
        HOPS.iter().all(|hop| {
            // A request is counted a moment before it is no longer in flight.
            top.number("root", hop, "requests") == 145 && top.number("root", hop, "in_flight") == 0
        })
    })
}

#[test]
fn top_counts_what_the_guest_did_at_every_hop() {
    let mut disk = Disk::serve(BYTES, 2, "", &[Filter::Trace]);
    let mut driver = Driver::usual(&disk.socket, 2);
    let top = counted(&disk, &mut driver);
    for hop in HOPS {
        assert_eq!(top.number("root", hop, "read_bytes"), 100 * 4096, "{hop}");
        assert_eq!(top.number("root", hop, "write_bytes"), 40 * 8192, "{hop}");
        for key in ["errors", "violations"] {
            assert_eq!(top.number("root", hop, key), 0, "{hop}: {key}");
        }
        let quantiles = ["p50_ns", "p99_ns", "p999_ns"].map(|key| top.number("root", hop, key));
        assert!(quantiles[0] > 0 && quantiles.is_sorted(), "{hop}: {quantiles:?}");
    }
    assert_eq!(top.json()["worker"], disk.server().pid().as_raw_pid());
    assert_eq!(top.json()["seconds"], Value::Null);
    // Collected now and then: the first look may be of the middle of the work.
    Top::wait(&disk.scratch.join("disk.sock.stats"), "the filter's own", |top| {
        top.counter("root", "trace", "read") == Some(100)
            && top.counter("root", "trace", "bytes_written") == Some(40 * 8192)
    });

    let stats = disk.scratch.text("disk.sock.stats");
    let ended = upcall(&["top", "--once", &stats]);
    ended.expect_success();
    assert!(ended.stdout.starts_with("disk root"), "{}", ended.stdout);
    for hop in HOPS {
        let line = ended.stdout.lines().find(|line| line.trim_start().starts_with(hop));
        let line = line.unwrap_or_else(|| panic!("no {hop} in:\n{}", ended.stdout));
        assert_eq!(line.split_whitespace().nth(1), Some("145"), "{line}");
    }
    drop(driver);
    disk.stop();
    assert_eq!(upcall(&["top", "--once", &stats]).code, Some(1), "the page went with the worker");
}

#[test]
fn top_shows_requests_in_flight_until_they_end() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", BYTES);
    let socket = scratch.join("d.sock");
    let stats = scratch.join("counters.stats");
    let disk = format!("name=root,file={},socket={}", image.display(), socket.display());
    let fault = rust_filter("fault");
    let filter =
        format!("disk=root,file={},param.effect=delay,param.delay=1500ms", fault.display());
    let args = ["--disk", &disk, "--filter", &filter, "--stats", stats.to_str().unwrap()];
    let server = Server::start(&scratch, &args);
    let mut driver = Driver::usual(&socket, 1);
    for slot in 0..5 {
        driver.submit(0, slot, Io::Read { offset: 0, length: 512 }, &[512]);
    }
    Top::wait(&stats, "five in flight", |top| {
        top.number("root", "request", "in_flight") == 5
            && top.number("root", "fault", "in_flight") == 5
            && top.number("root", "store", "in_flight") == 0
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut ended = 0;
    while ended < 5 {
        assert!(Instant::now() < deadline, "{ended} of 5 ended");
        driver.wait(0, Duration::from_millis(100));
        ended += driver.ended(0).len();
    }
    Top::wait(&stats, "none in flight", |top| {
        ["request", "fault", "store"].iter().all(|hop| {
            top.number("root", hop, "in_flight") == 0 && top.number("root", hop, "requests") == 5
        })
    });
    drop(driver);
    server.stop();
}

#[test]
fn top_shows_rates_line_by_line_until_the_worker_ends() {
    let mut disk = Disk::serve(BYTES, 1, "", &[Filter::Trace]);
    let stats = disk.scratch.join("disk.sock.stats");
    let mut top = Command::new(upcall_program())
        .args(["top", "--json", "--interval", "0.2"])
        .arg(&stats)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(top.stdout.take().unwrap());
    let reader = std::thread::spawn(move || {
        let lines = output.lines().map(Result::unwrap);
        lines.map(|line| serde_json::from_str(&line).unwrap()).collect::<Vec<Value>>()
    });
    let mut driver = Driver::usual(&disk.socket, 1);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(1) {
        driver.read(0, 0, 4096);
    }
    drop(driver);
    disk.stop();
    let lines = reader.join().unwrap();
    assert!(top.wait().unwrap().success());
    assert!(lines.len() >= 3, "{lines:?}");
    let rate = |line: &Value, key: &str| line["disks"][0]["hops"][0][key].as_f64().unwrap();
    let busy = lines.iter().filter(|line| rate(line, "requests") > 0.0).collect::<Vec<_>>();
    assert!(busy.len() >= 3, "{lines:?}");
    for line in busy {
        assert!(line["seconds"].as_f64().is_some_and(|seconds| seconds >= 0.2), "{line}");
        let bytes_each = rate(line, "read_bytes") / rate(line, "requests");
        assert!((bytes_each - 4096.0).abs() < 1.0, "{line}");
    }
}

/// What the socket says is what the page says, in every number, also where there is no page to see.
#[test]
fn top_shows_the_same_over_the_control_socket() {
    let mut disk = Disk::serve(BYTES, 2, "", &[Filter::Trace]);
    let mut driver = Driver::usual(&disk.socket, 2);
    counted(&disk, &mut driver);
    let [stats, control] =
        ["stats", "control"].map(|end| disk.scratch.text(&format!("disk.sock.{end}")));
    // The filter's own counters are collected now and then.
    Top::wait(stats.as_ref(), "the filter's own", |top| {
        top.counter("root", "trace", "bytes_written") == Some(40 * 8192)
    });
    let page = upcall(&["top", "--once", "--json", &stats]);
    let socket = upcall(&["top", "--once", "--json", "--control", &control]);
    socket.expect_success();
    assert_eq!(page.stdout, socket.stdout);
    let mut top = Command::new(upcall_program())
        .args(["top", "--interval", "0.2", "--control", &control])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(top.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut driven = 0;
    let busy = lines.by_ref().find(|line| {
        for _ in 0..50 {
            driver.read(0, 0, 4096);
        }
        driven += 50;
        let words: Vec<&str> = line.split_whitespace().collect();
        words[0] == "trace" && words[1] != "0/s"
    });
    assert!(busy.is_some(), "no rate in spite of {driven} requests");
    drop(driver);
    disk.stop();
    let last = lines.last().unwrap();
    assert!(last.starts_with("the worker (process") && last.contains("has ended: "), "{last}");
    assert!(top.wait().unwrap().success());
    let gone = upcall(&["top", "--once", "--control", &control]);
    assert_eq!(gone.code, Some(1), "{gone:?}");
    assert!(
        gone.stderr.contains(&control) && gone.stderr.contains("no worker answers"),
        "{gone:?}"
    );
}

#[test]
fn top_finds_all_workers_by_their_pages_or_else_by_their_sockets() {
    let scratch = Scratch::new();
    let (near, far) = (scratch.join("near"), scratch.join("far"));
    for folder in [&near, &far] {
        std::fs::create_dir(folder).unwrap();
    }
    let top = |args: &[&str]| {
        let mut command = Command::new(upcall_program());
        // A home of its own for each place where it looks, but for /run.
        command.current_dir(&near).env("XDG_RUNTIME_DIR", &near).env("TMPDIR", &near);
        command.args(["top", "--once", "--json"]).args(args).output().unwrap()
    };
    let disk = |name: &str| format!("name={name},memory=1M,socket={}", scratch.text(name));
    let place = |folder: &std::path::Path, name: &str| folder.join(name).display().to_string();
    // One that is found both ways, in two places or in one, and one whose page is elsewhere.
    let servers = [
        ["both", &place(&near, "both.stats"), &place(&near, "both.control")],
        ["apart", &place(&near, "page.stats"), &place(&near, "socket.control")],
        ["socket", &place(&far, "socket.stats"), &place(&near, "other.control")],
        ["page", &place(&near, "other.stats"), &place(&far, "page.control")],
    ]
    .map(|[name, stats, control]| {
        let args = ["--disk", &disk(name), "--stats", stats, "--control", control];
        Server::start(&scratch, &args)
    });
    let shown = |args: &[&str]| -> Vec<(i64, String)> {
        let output = top(args);
        assert!(output.status.success(), "{output:?}");
        let lines = String::from_utf8(output.stdout).unwrap();
        let mut all: Vec<_> = lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .map(|view| {
                let name = view["disks"][0]["name"].as_str().unwrap().to_owned();
                (view["worker"].as_i64().unwrap(), name)
            })
            .filter(|(pid, _)| servers.iter().any(|it| i64::from(it.pid().as_raw_pid()) == *pid))
            .collect();
        all.sort_by_key(|(_, name)| name.clone());
        all
    };
    let expected = |places: &[usize]| -> Vec<(i64, String)> {
        let names = ["both", "apart", "socket", "page"];
        let mut all: Vec<_> = places
            .iter()
            .map(|at| (i64::from(servers[*at].pid().as_raw_pid()), names[*at].to_owned()))
            .collect();
        all.sort_by_key(|(_, name)| name.clone());
        all
    };
    assert_eq!(shown(&[]), expected(&[0, 1, 2, 3]));
    let (page, socket) = (place(&near, "both.stats"), place(&far, "page.control"));
    assert_eq!(shown(&[&page, "--control", &socket]), expected(&[0, 3]));
    for server in servers {
        server.stop();
    }
}

#[test]
fn what_killed_servers_left_in_the_runtime_folder_goes_when_another_one_starts() {
    let scratch = Scratch::new();
    let folder = scratch.join("runtime");
    std::fs::create_dir(&folder).unwrap();
    // Without a path for a socket of its own, a server's page is named after its process.
    let serve = |name: &str| {
        let mut command = Command::new(upcall_program());
        let disk = format!("name=root,memory=1M,nbd=unix:{}", scratch.text(name));
        command.args(["serve", "--disk", &disk]).env("XDG_RUNTIME_DIR", &folder);
        Server::spawn(&scratch, command)
    };
    let left = || {
        let mut names: Vec<_> =
            folder.read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let names_of = |server: &Server| {
        ["control", "stats"].map(|end| format!("upcall-{}.{end}", server.pid().as_raw_pid()).into())
    };
    let (killed, living) = (serve("1.sock"), serve("2.sock"));
    let dead = names_of(&killed);
    killed.signal(Signal::KILL);
    killed.wait();
    assert!(dead.iter().all(|name| left().contains(name)), "nothing to clear: {:?}", left());
    let third = serve("3.sock");
    let mut expected = [names_of(&living), names_of(&third)].concat();
    expected.sort();
    assert_eq!(left(), expected);
    for server in [living, third] {
        server.stop();
    }
    assert!(left().is_empty(), "{:?}", left());
}

#[test]
fn a_configuration_file_says_what_flags_say() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.image("disk.img", BYTES), scratch.join("root.sock"));
    let (mirror, file) = (scratch.image("mirror.img", BYTES), scratch.join("vm.toml"));
    let (xor, fault, split) = (c_filter("xor", 64), rust_filter("fault"), rust_filter("split"));
    let [image, socket, mirror, xor, fault, split] =
        [&image, &socket, &mirror, &xor, &fault, &split].map(|path| path.to_str().unwrap());
    let text = format!(
        "[[disk]]\nname = \"root\"\nfile = \"{image}\"\nsocket = \"{socket}\"\nqueues = 2\n\
         direct = false\nserial = \"from-a-file\"\n\
         [[disk.filter]]\nfile = \"{xor}\"\nplacement = \"inline\"\nparams = {{ key = \"k,1\" }}\n\
         [[disk.filter]]\nfile = \"{split}\"\ngrant = \"mirror\"\n\
         [[disk.filter]]\nfile = \"{fault}\"\norder = 2\n\
         params = {{ ops = \"write\", offset = \"1M\", length = 4096 }}\n\
         [[disk]]\nname = \"mirror\"\nfile = \"{mirror}\"\ndirect = false\n"
    );
    std::fs::write(&file, text).unwrap();
    let root =
        format!("name=root,file={image},socket={socket},queues=2,direct=off,serial=from-a-file");
    let second = format!("name=mirror,file={mirror},direct=off");
    let filters = [
        format!("disk=root,file={xor},placement=inline,param.key=k,,1"),
        format!("disk=root,file={split},grant=mirror"),
        format!("disk=root,file={fault},order=2,param.ops=write,param.offset=1M,param.length=4096"),
    ];
    let flags = ["--disk", &root, "--disk", &second];
    let flags: Vec<&str> = flags
        .into_iter()
        .chain(filters.iter().flat_map(|filter| ["--filter", filter.as_str()]))
        .collect();
    let mut seen = Vec::new();
    for args in [&flags[..], &["--config", file.to_str().unwrap()]] {
        let server = Server::start(&scratch, args);
        let printed = server.stdout().to_owned();
        let mut client = RawClient::connect(socket.as_ref(), RawOptions::default()).unwrap();
        let (_, serial) = client.request(0, kind::GET_ID, 0, &[Part::In(20)]);
        assert_eq!(&serial[..11], b"from-a-file", "{args:?}");
        drop(client);
        let mut driver = Driver::usual(socket.as_ref(), 2);
        // Of zeroes, which are on both disks already: fault is below split.
        assert_eq!(driver.run(1, Io::Write { offset: 1 << 20, length: 512 }), Outcome::IoError);
        driver.write(1, 2 << 20, &[7; 4096]);
        drop(driver);
        server.stop();
        let (first, second) = (std::fs::read(image).unwrap(), std::fs::read(mirror).unwrap());
        assert!(first[2 << 20..][..4096] != [7; 4096], "xor is not there: {args:?}");
        assert!(first == second, "split is not there, or not below xor: {args:?}");
        seen.push((printed, first));
        for path in [image, mirror] {
            std::fs::File::create(path).unwrap().set_len(BYTES).unwrap();
        }
    }
    let [(flags, first), (config, second)] = &seen[..] else { unreachable!() };
    assert_eq!(flags, config, "what is printed");
    assert!(first == second, "what is written, and with which key");
}
