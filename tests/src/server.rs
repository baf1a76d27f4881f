//! `upcall serve` as a child process.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::build::upcall_program;
use crate::client::{Client, Io, Outcome};
use crate::driver::Driver;
use crate::scratch::Scratch;

const START: Duration = Duration::from_secs(30);
const END: Duration = Duration::from_secs(30);

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; None if a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Ended {
    fn new(status: ExitStatus, stdout: String, stderr: String) -> Ended {
        Ended { code: status.code(), signal: status.signal(), stdout, stderr }
    }

    /// Expects an orderly end.
    #[track_caller]
    pub fn expect_success(&self) {
        assert_eq!(self.code, Some(0), "{self:#?}");
    }
}

/// A running `upcall serve`. Killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Locked so that several threads may look at a server; only one reads.
    lines: Mutex<Receiver<String>>,
    stdout: String,
    stderr: PathBuf,
    ended: bool,
}

impl Server {
    /// Starts `upcall serve ARGS` and waits until it is ready.
    pub fn start(scratch: &Scratch, args: &[&str]) -> Server {
        let mut command = Command::new(upcall_program());
        command.arg("serve").args(args);
        Server::spawn(scratch, command)
    }

    /// Serves `disks` behind `filters`, each as it stands behind its flag.
    pub fn serve(scratch: &Scratch, disks: &[&str], filters: &[&str]) -> Server {
        let disks = disks.iter().flat_map(|disk| ["--disk", disk]);
        let filters = filters.iter().flat_map(|filter| ["--filter", filter]);
        Server::start(scratch, &disks.chain(filters).collect::<Vec<_>>())
    }

    /// As [`start`](Self::start), with a command of the caller's own.
    pub fn spawn(scratch: &Scratch, mut command: Command) -> Server {
        // A server started again goes on in the same file: its end is what matters.
        let stderr = scratch.join("serve.log");
        let log = File::options().create(true).append(true).open(&stderr).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let lines = Mutex::new(lines);
        let mut server = Server { child, lines, stdout: String::new(), stderr, ended: false };
        server.wait_ready();
        server
    }

    fn wait_ready(&mut self) {
        let deadline = Instant::now() + START;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.get_mut().unwrap().recv_timeout(left) {
                Ok(line) => {
                    self.stdout += &line;
                    self.stdout.push('\n');
                    if line.trim() == "ready" {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("not ready after {START:?}:\n{self:?}"),
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().unwrap();
                    panic!("ended before it was ready ({status}):\n{}", self.stderr());
                }
            }
        }
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The processes that it has started: its filter hosts.
    pub fn children(&self) -> Vec<i32> {
        let mut children = Vec::new();
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid().as_raw_pid())).unwrap();
        for task in tasks {
            // A thread may end meanwhile.
            let path = task.unwrap().path().join("children");
            let list = std::fs::read_to_string(path).unwrap_or_default();
            children.extend(list.split_whitespace().map(|pid| pid.parse::<i32>().unwrap()));
        }
        children
    }

    /// What it printed until it was ready.
    pub fn stdout(&self) -> &str {
        &self.stdout
    }

    /// What it said in its log so far.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Of a disk at `socket`, served with --restart, whose flush has failed: kills the worker twice,
    /// and expects of each that follows that it remembers, and that only reads succeed.
    #[track_caller]
    pub fn expect_writes_stay_refused(&self, socket: &Path) {
        for deaths in 1..3 {
            kill_process(Pid::from_raw(self.children()[0]).unwrap(), Signal::KILL).unwrap();
            let deadline = Instant::now() + START;
            while self.stderr().matches("nobody served").count() < deaths {
                assert!(Instant::now() < deadline, "{}", self.stderr());
                thread::sleep(Duration::from_millis(5));
            }
            // What lies below would say by now that all is well.
            let mut driver = Driver::usual(socket, 1);
            let write = Io::Write { offset: 0, length: 512 };
            assert_eq!(driver.run(0, Io::Flush), Outcome::IoError, "after {deaths} deaths");
            assert_eq!(driver.run(0, write), Outcome::IoError, "after {deaths} deaths");
            assert_eq!(driver.run(0, Io::Read { offset: 0, length: 512 }), Outcome::Ok);
        }
        assert!(self.stderr().contains("still refuses writes"), "{}", self.stderr());
    }

    /// Asks it to end, and waits until it has.
    pub fn terminate(self) -> Ended {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Asks it to end, and expects that it does so in order.
    #[track_caller]
    pub fn stop(self) {
        self.terminate().expect_success();
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let status = wait_child(&mut self.child, END)
            .unwrap_or_else(|| panic!("does not end within {END:?}:\n{}", self.stderr()));
        self.ended = true;
        while let Ok(line) = self.lines.get_mut().unwrap().recv() {
            self.stdout += &line;
            self.stdout.push('\n');
        }
        Ended::new(status, std::mem::take(&mut self.stdout), self.stderr())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
            if thread::panicking() {
                eprintln!("the server said:\n{}", self.stderr());
            }
        }
    }
}

/// Runs `upcall ARGS` to its end; it is to end by itself.
pub fn upcall(args: &[&str]) -> Ended {
    let mut command = Command::new(upcall_program());
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    if wait_child(&mut child, END).is_none() {
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        panic!(
            "{command:?} does not end:\n{}\n{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let output = child.wait_with_output().unwrap();
    Ended::new(
        output.status,
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

fn wait_child(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() > deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(10));
    }
}
