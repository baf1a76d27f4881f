//! `upcall serve` and `upcall top`, from outside. What guests see of a served disk is tested
//! end to end, elsewhere.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};

use common::{Ended, Folder, command, upcall};
use rustix::process::{Pid, Signal, kill_process};

/// A running server; killed when dropped.
struct Server {
    child: Child,
    /// What it printed until it was ready.
    said: String,
}

impl Server {
    fn start(args: &[&str]) -> Server {
        let mut child = command(&[&["serve"], args].concat())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        while !said.ends_with("ready\n") {
            if output.read_line(&mut said).unwrap() == 0 {
                let mut error = String::new();
                child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
                panic!("not ready: {error}");
            }
        }
        Server { child, said }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(mut self, signal: Signal) -> Ended {
        self.signal(signal);
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let code = self.child.wait().unwrap().code();
        Ended { code, stdout: self.said.clone(), stderr }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn disk(folder: &Folder) -> String {
    format!("name=root,memory=16M,socket={}", folder.text("d.sock"))
}

#[test]
fn term_and_interrupt_end_in_order_and_leave_nothing() {
    for signal in [Signal::TERM, Signal::INT] {
        let folder = Folder::new("signals");
        let server = Server::start(&["--disk", &disk(&folder)]);
        assert!(UnixStream::connect(folder.text("d.sock")).is_ok());
        assert_eq!(folder.names(), ["d.sock", "d.sock.control", "d.sock.stats"]);
        let ended = server.end(signal);
        assert_eq!(ended.code, Some(0), "{ended:#?}");
        assert!(ended.stderr.contains("ending in order"), "{}", ended.stderr);
        assert!(folder.names().is_empty(), "{:?}", folder.names());
    }
}

#[test]
fn what_is_printed_names_disk_chain_and_hypervisors_arguments() {
    let folder = Folder::new("offer");
    let filter = folder.filter("right", "crates/upcall/tests/data/wrong.c", &["-DWRONG=NOTHING"]);
    let with_filter = format!("disk=root,file={filter}");
    let server = Server::start(&["--disk", &disk(&folder), "--filter", &with_filter]);
    for part in [
        "disk root: memory",
        "chain:  guest -> wrong -> store",
        "share=on",
        "-device vhost-user-blk-pci,chardev=upcall-root,num-queues=4",
        "<disk type='vhostuser'",
        &folder.text("d.sock"),
    ] {
        assert!(server.said.contains(part), "no {part:?} in:\n{}", server.said);
    }
    assert_eq!(server.end(Signal::TERM).code, Some(0));
}

#[test]
fn a_file_serves_what_flags_serve_and_flags_add_to_it() {
    let folder = Folder::new("toml");
    let filter = folder.filter("right", "crates/upcall/tests/data/wrong.c", &["-DWRONG=NOTHING"]);
    let config = folder.text("vm.toml");
    let text = format!(
        "[[disk]]\nname = \"root\"\nmemory = \"16M\"\nqueues = 2\nsocket = {:?}\n\
         [[disk.filter]]\nfile = {filter:?}\n",
        folder.text("root.sock")
    );
    std::fs::write(&config, text).unwrap();
    let more = format!("name=more,null=1G,readonly=on,socket={}", folder.text("more.sock"));
    let stats = folder.text("page.stats");
    let server = Server::start(&["--config", &config, "--disk", &more, "--stats", &stats]);
    for part in ["disk root: ", "queues: 2", "guest -> wrong -> store", "disk more: ", "read-only"]
    {
        assert!(server.said.contains(part), "no {part:?} in:\n{}", server.said);
    }

    let ended = upcall(&["top", "--once", &stats]);
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    for part in ["disk root", "  wrong ", "  store ", "disk more", "p99.9"] {
        assert!(ended.stdout.contains(part), "no {part:?} in:\n{}", ended.stdout);
    }
    let ended = upcall(&["top", "--once", "--json", &stats]);
    let value: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(value["disks"][0]["hops"][1]["hop"], "wrong");
    assert_eq!(server.end(Signal::TERM).code, Some(0));
}

#[test]
fn top_ends_well_when_the_worker_ends() {
    let folder = Folder::new("top");
    let server = Server::start(&["--disk", &disk(&folder)]);
    let top = command(&["top", "--interval", "0.1", &folder.text("d.sock.stats")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(400));
    assert_eq!(server.end(Signal::TERM).code, Some(0));
    let ended: Ended = top.wait_with_output().unwrap().into();
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    assert!(ended.stdout.contains("disk root (worker"), "{}", ended.stdout);
    assert!(ended.stdout.ends_with("has ended\n"), "{}", ended.stdout);
}

#[test]
fn a_second_signal_ends_at_once() {
    // A filter that is slow to close keeps the orderly end busy.
    let folder = Folder::new("second");
    let flags = ["-DWRONG=SLOW_TO_CLOSE"];
    let filter = folder.filter("slow", "crates/upcall/tests/data/wrong.c", &flags);
    let with_filter = format!("disk=root,file={filter}");
    let server = Server::start(&["--disk", &disk(&folder), "--filter", &with_filter]);
    let begun = std::time::Instant::now();
    server.signal(Signal::TERM);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(server.end(Signal::INT).code, Some(130));
    assert!(begun.elapsed() < std::time::Duration::from_secs(4), "it waited for the filter");
}

#[test]
fn bad_input_is_named_with_the_right_exit_code() {
    let folder = Folder::new("bad");
    let right = disk(&folder);
    let config = folder.text("bad.toml");
    std::fs::write(&config, "[[disk]]\nname = \"r\"\nmemory = \"1M\"\ncolour = 1\n").unwrap();
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&[], 2, &["--disk"]),
        (&["--disk", "name=a,file=x,colour=blue"], 2, &["colour"]),
        (&["--disk", "name=a,file=x,format=qed"], 2, &["qed", "raw, qcow2"]),
        (&["--disk", &right, "--filter", "file=x"], 2, &["disk=NAME"]),
        (&["--disk", &right, "--drain-ms", "soon"], 2, &["soon"]),
        (&["--disk", "name=a,file=/nowhere/a.img,socket=/nowhere/s"], 1, &["/nowhere/a.img"]),
        (&["--disk", &right, "--disk", &right], 1, &["root"]),
        (&["--disk", &right, "--filter", "disk=boot,file=/x.so"], 1, &["boot", "root"]),
        (&["--disk", &right, "--filter", "disk=root,file=/x.so"], 1, &["/x.so"]),
        (&["--disk", "name=a,memory=1M,fd=77"], 1, &["77"]),
        (&["--disk", &right, "--stats", &config], 1, &["bad.toml", "--stats"]),
        (&["--config", &config], 1, &["bad.toml", "line 4", "colour"]),
        (&["--config", "/nowhere.toml"], 1, &["/nowhere.toml"]),
    ];
    for (args, code, says) in cases {
        let ended = upcall(&[&["serve"], *args].concat());
        assert_eq!(ended.code, Some(*code), "{args:?}: {ended:#?}");
        for word in *says {
            assert!(ended.stderr.contains(word), "{args:?}: no {word:?} in {}", ended.stderr);
        }
        assert!(ended.stdout.is_empty(), "{}", ended.stdout);
        assert_eq!(folder.names(), ["bad.toml"], "{args:?} leaves something behind");
    }
    for (args, says) in [
        (&["top", "/nowhere.stats"][..], "/nowhere.stats"),
        (&["top", "--once", &config], "bad.toml"),
    ] {
        let ended = upcall(args);
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        assert!(ended.stderr.contains(says), "{}", ended.stderr);
    }
    assert_eq!(upcall(&["completions", "bash"]).code, Some(0));
}
