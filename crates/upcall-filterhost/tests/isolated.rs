//! A filter in a process of its own: the whole dialogue with the real filter host.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{ARENA_SIZE, Worker, compile, data, filter, has_m32, start};
use upcall_abi::filter::{op, verdict};
use upcall_abi::ring::{NO_DATA, Submission, completion_kind, submission_kind};
use upcall_filterhost::{FilterError, FilterFile, LogLevel, Placement, Width, params};

const PATIENCE: Duration = Duration::from_secs(5);

fn write_at(token: u64, data: u64) -> Submission {
    Submission {
        kind: submission_kind::START,
        op: op::WRITE,
        token,
        length: 4096,
        data,
        ..Submission::default()
    }
}

/// Everything once: describe, load, open, serve, a request down and up, event, close, quit.
fn whole_life(macros: &[&str], width: Width) {
    let file = filter(macros);
    assert_eq!(file.width(), width);
    let mut worker = Worker::serving(&file, Placement::Isolated);
    let description = &worker.description;
    assert_eq!((description.name.as_str(), description.width), ("test-filter", width));
    assert!(description.has_io_done && description.has_event && !description.has_cancel);
    assert_eq!((description.ops, description.sees, description.changes), (14, 4, 0));
    let names: Vec<&str> = description.params.iter().map(|param| param.name.as_str()).collect();
    assert_eq!(names, ["key", "rate", "fast", "notes"]);

    worker.submit(&write_at(7, 0));
    let verdict = worker.completion(PATIENCE).expect("no verdict");
    assert_eq!((verdict.kind, verdict.code), (completion_kind::VERDICT, verdict::WATCH));
    assert_eq!((verdict.token, verdict.cookie), (7, 4096));
    let up =
        Submission { kind: submission_kind::DONE, cookie: verdict.cookie, ..write_at(8, NO_DATA) };
    worker.submit(&up);
    let verdict = worker.completion(PATIENCE).expect("no verdict");
    assert_eq!((verdict.token, verdict.code, verdict.status), (8, verdict::PASS, 0));

    assert_eq!(worker.counters.snapshot(), [("requests".to_owned(), 1)]);
    worker.host.event(0, 2).unwrap();
    let refused = worker.host.event(0, 1).unwrap_err();
    assert!(matches!(refused, FilterError::Refused { step: "EVENT", errno: 16, .. }), "{refused}");
    worker.host.close(0).unwrap();
    assert_eq!(worker.host.exit_description(), None);
    worker.host.quit().unwrap();
    let texts = worker.lines.texts();
    assert_eq!(texts.first().unwrap(), "loaded\u{fffd}[2J");
    assert_eq!(texts[texts.len() - 2..], ["closed", "unloaded"]);
}

#[test]
fn a_filter_lives_its_whole_life() {
    whole_life(&[], Width::Bits64);
}

#[test]
fn a_32_bit_filter_lives_its_whole_life_with_a_64_bit_worker() {
    assert!(has_m32(), "install gcc-multilib");
    whole_life(&["-m32"], Width::Bits32);
}

#[test]
fn parameters_reach_the_filter_as_it_declared_them() {
    let mut worker = Worker::loaded(&filter(&[]), Placement::Isolated).unwrap();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-notes", std::process::id()));
    fs::File::create(&path).unwrap().write_all(b"dear filter").unwrap();
    let given = [
        ("rate".to_owned(), "4K".to_owned()),
        ("fast".to_owned(), "yes".to_owned()),
        ("notes".to_owned(), path.to_str().unwrap().to_owned()),
    ];
    let params = params::resolve(&worker.description, &given).unwrap();
    fs::remove_file(&path).unwrap();
    worker.open(0, &params).unwrap();
    let notes = format!("notes is 0, \"{}\"", path.display());
    let texts = worker.lines.texts();
    assert_eq!(
        texts[1..],
        [
            "key is 5, \"5\"",
            "rate is 4096, \"4096\"",
            "fast is 1, \"1\"",
            notes.as_str(),
            "dear filter"
        ]
    );
    let line = worker.lines.all().pop().unwrap();
    assert_eq!((line.instance, line.level), (Some(0), LogLevel::Warn));
    assert_eq!(&*line.filter, "test-filter");

    // A second instance, in which the file is absent.
    let params = params::resolve(&worker.description, &[]).unwrap();
    worker.open(1, &params).unwrap();
    assert!(worker.lines.texts().contains(&"notes is 0, \"(absent)\"".to_owned()));
}

#[test]
fn a_filter_of_a_newer_abi_is_refused_with_both_versions() {
    let file = filter(&["-DABI=UPCALL_ABI_VERSION+1"]);
    let (mut host, _) = start(&file, Placement::Isolated);
    let said = host.describe().unwrap_err().to_string();
    assert!(said.contains("1.4") && said.contains("1.3"), "{said}");
    let file = filter(&["-DABI=0x20000"]);
    let (mut host, _) = start(&file, Placement::Isolated);
    assert!(host.describe().unwrap_err().to_string().contains("2.0"));
}

#[test]
fn a_shared_object_without_the_table_is_refused_by_name_of_the_symbol() {
    let file = filter(&["-DNO_SYMBOL"]);
    let (mut host, _) = start(&file, Placement::Isolated);
    let said = host.describe().unwrap_err().to_string();
    assert!(said.contains("upcall_filter"), "{said}");
    assert!(said.contains(&file.path().display().to_string()), "{said}");
}

#[test]
fn a_filter_whose_own_libraries_are_missing_is_refused_with_their_name() {
    let path = compile(&data("unresolved.c"), &["-shared", "-fPIC"]);
    let (mut host, _) = start(&FilterFile::open(path).unwrap(), Placement::Isolated);
    let said = host.describe().unwrap_err().to_string();
    assert!(said.contains("function_that_nobody_has"), "{said}");
}

#[test]
fn a_host_killed_in_the_middle_of_the_dialogue_is_an_error_at_once() {
    let begun = Instant::now();
    let error = Worker::loaded(&filter(&["-DDIE_IN_LOAD"]), Placement::Isolated).err().unwrap();
    assert_eq!(
        error.to_string(),
        "filter test-filter: its host ended during LOAD: it was killed by signal 9 (SIGKILL)"
    );
    assert!(begun.elapsed() < PATIENCE);
}

#[test]
fn a_filter_that_hangs_in_open_is_an_error_within_the_timeout_and_its_host_is_killed() {
    let file = filter(&["-DHANG_IN_OPEN"]);
    let mut worker = Worker::loaded(&file, Placement::Isolated).unwrap();
    worker.host.set_timeout(Duration::from_millis(200));
    let params = params::resolve(&worker.description, &[]).unwrap();
    let begun = Instant::now();
    let error = worker.open(0, &params).unwrap_err();
    assert!(matches!(error, FilterError::Silent { step: "OPEN", .. }), "{error}");
    let process = worker.host.process_id().unwrap();
    drop(worker);
    assert!(begun.elapsed() < PATIENCE);
    assert!(!fs::exists(format!("/proc/{process}")).unwrap());
}

#[test]
fn a_filter_may_refuse_to_open_and_the_host_lives_on() {
    let mut worker = Worker::loaded(&filter(&["-DREFUSE_OPEN"]), Placement::Isolated).unwrap();
    let params = params::resolve(&worker.description, &[]).unwrap();
    let error = worker.open(0, &params).unwrap_err();
    assert!(matches!(error, FilterError::Refused { step: "OPEN", errno: 13, .. }), "{error}");
    assert!(worker.lines.texts().contains(&"not today".to_owned()));
    worker.host.quit().unwrap();
}

#[test]
fn a_killed_host_shows_on_the_pidfd_and_says_how_it_ended() {
    let mut worker = Worker::serving(&filter(&[]), Placement::Isolated);
    worker.host.service().unwrap();
    worker.host.kill();
    let mut polled = [rustix::event::PollFd::from_borrowed_fd(
        worker.host.pidfd().unwrap(),
        rustix::event::PollFlags::IN,
    )];
    let five_s = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut polled, Some(&five_s)), Ok(1));
    let how = worker.host.exit_description();
    assert_eq!(how.as_deref(), Some("it was killed by signal 9 (SIGKILL)"));
    assert!(worker.host.service().is_err());
}

fn open_fds(process: u32) -> BTreeSet<i32> {
    let entries = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
}

fn target(process: u32, fd: i32) -> String {
    fs::read_link(format!("/proc/{process}/fd/{fd}")).unwrap().display().to_string()
}

#[test]
fn a_host_has_the_descriptors_it_was_given_and_nothing_else_of_ours() {
    // What a careless library might leave open for children: low, high, not closed on exec.
    let file = fs::File::open("/etc/passwd").unwrap();
    let careless = [3, 50, 900].map(|from| {
        let fd = rustix::io::fcntl_dupfd_cloexec(&file, from).unwrap();
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
        fd
    });
    let filter = filter(&[]);
    let (mut host, _) = start(&filter, Placement::Isolated);
    let process = host.process_id().unwrap();
    host.describe().unwrap();
    // The filter host makes eventfds of its own; of ours there were none to inherit.
    let given: BTreeSet<i32> = open_fds(process)
        .into_iter()
        .filter(|fd| *fd <= 4 || target(process, *fd) != "anon_inode:[eventfd]")
        .collect();
    assert_eq!(given, BTreeSet::from([0, 1, 2, 3, 4]), "{careless:?}");
    assert_eq!(target(process, 0), "/dev/null");
    assert_eq!(target(process, 1), target(process, 2));
    assert!(target(process, 3).starts_with("socket:"));
    assert_eq!(target(process, 4), filter.path().display().to_string());
    let program = format!("/proc/{process}/exe");
    assert!(fs::read_link(&program).unwrap().display().to_string().contains("memfd:"));
    let seals = rustix::fs::fcntl_get_seals(fs::File::open(&program).unwrap()).unwrap();
    assert!(seals.contains(rustix::fs::SealFlags::WRITE), "the program can be changed");
    assert_eq!(fs::read(format!("/proc/{process}/environ")).unwrap(), b"");
    let group = rustix::process::getpgid(rustix::process::Pid::from_raw(process as i32)).unwrap();
    assert_eq!(group.as_raw_nonzero().get() as u32, process, "a process group of its own");
}

#[test]
fn a_host_outlives_the_thread_that_asked_for_it() {
    let file = filter(&[]);
    let (mut host, _) =
        std::thread::spawn(move || start(&file, Placement::Isolated)).join().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    host.describe().unwrap();
}

#[test]
fn an_observers_write_faults_in_the_filter_and_nowhere_else() {
    let mut observer = Worker::serving(&filter(&["-DSCRIBBLE"]), Placement::Isolated);
    let mut other = Worker::serving(&filter(&[]), Placement::Isolated);
    let before: Vec<u8> = (0..ARENA_SIZE).map(|index| index as u8).collect();
    observer.arena.write(0, &before).unwrap();
    observer.submit(&write_at(1, 8192));
    assert_eq!(observer.completion(Duration::from_millis(300)), None);
    let deadline = Instant::now() + PATIENCE;
    let said = loop {
        if let Err(error) = observer.host.service() {
            break error.to_string();
        }
        assert!(Instant::now() < deadline, "the filter host is alive");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(said.contains("killed by signal 11 (SIGSEGV)"), "{said}");
    let mut after = vec![0; ARENA_SIZE];
    observer.arena.read(0, &mut after).unwrap();
    assert!(before == after, "the data changed");

    other.submit(&write_at(2, 0));
    assert_eq!(other.completion(PATIENCE).map(|verdict| verdict.token), Some(2));
    other.host.close(0).unwrap();
    other.host.quit().unwrap();
}

#[test]
fn the_same_write_by_a_filter_that_declared_it_changes_the_data() {
    // The observer's test proves something only if the write is real.
    let file = filter(&["-DSCRIBBLE", "-DCHANGES=UPCALL_OP_BIT(UPCALL_WRITE)"]);
    let mut changer = Worker::serving(&file, Placement::Isolated);
    changer.arena.write(8192, &[0x0f]).unwrap();
    changer.submit(&write_at(1, 8192));
    assert_eq!(changer.completion(PATIENCE).map(|verdict| verdict.token), Some(1));
    assert_eq!(changer.arena.read_array(8192), Some([0xf0]));
}

#[test]
fn a_host_dies_with_its_worker_even_while_its_filter_hangs() {
    const TEST: &str = "a_host_dies_with_its_worker_even_while_its_filter_hangs";
    const ROLE: &str = "UPCALL_TEST_PLAYS_WORKER";
    if std::env::var_os(ROLE).is_some() {
        let file = filter(&["-DHANG_IN_OPEN"]);
        let mut worker = Worker::loaded(&file, Placement::Isolated).unwrap();
        eprintln!("host {}", worker.host.process_id().unwrap());
        let params = params::resolve(&worker.description, &[]).unwrap();
        worker.host.set_timeout(Duration::from_secs(60));
        let _ = worker.open(0, &params);
        return;
    }
    let mut worker = Command::new(std::env::current_exe().unwrap())
        .args([TEST, "--exact", "--nocapture"])
        .env(ROLE, "1")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let host = BufReader::new(worker.stderr.as_mut().unwrap())
        .lines()
        .find_map(|line| line.unwrap().strip_prefix("host ").map(|id| id.parse::<u32>().unwrap()))
        .expect("the worker started no host");
    std::thread::sleep(Duration::from_millis(200));
    assert!(is_running(host));
    worker.kill().unwrap();
    worker.wait().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while is_running(host) {
        assert!(Instant::now() < deadline, "filter host {host} is left over");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Not for children of ours, which stay as zombies until they are waited for.
fn is_running(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    !status.is_empty() && !status.contains("State:\tZ")
}
