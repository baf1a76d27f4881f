//! The dialogue against hosts that a test plays: each in its own way not what it should be.

use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use super::*;
use crate::description::tests::sample;

/// A host played by the test: a process that only sleeps, and the other end of its socket.
#[allow(clippy::zombie_processes)] // whoever adopts it waits for it
fn played() -> (HostProcess, OwnedFd, Arc<Mutex<Vec<LogLine>>>) {
    let (socket, theirs) = socket::pair().unwrap();
    let child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
    let engine =
        Engine::Isolated(HostChild::adopt(rustix::process::Pid::from_child(&child)).unwrap());
    let lines = Arc::new(Mutex::new(Vec::new()));
    let sink = lines.clone();
    let log: LogSink = Arc::new(move |line| sink.lock().unwrap().push(line));
    let mut host = HostProcess::over("played".into(), Width::Bits64, socket, engine, log);
    host.set_timeout(Duration::from_millis(300));
    (host, theirs, lines)
}

fn packet(kind: u32, id: u32, value: u32, payload: &[u8]) -> Vec<u8> {
    let mut packet = [kind, WIRE_VERSION, id, value].map(u32::to_le_bytes).concat();
    packet.extend(payload);
    packet
}

fn say(fd: &OwnedFd, packet: &[u8]) {
    rustix::net::send(fd, packet, rustix::net::SendFlags::NOSIGNAL).unwrap();
}

#[test]
fn a_silent_host_is_an_error_that_names_filter_and_step_in_time() {
    let (mut host, _theirs, _) = played();
    let begun = Instant::now();
    let error = host.load().unwrap_err();
    assert_eq!(error.to_string(), "filter played: its host did not answer LOAD within 300 ms");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let later = host.close(0).unwrap_err();
    assert!(matches!(later, FilterError::Ended { step: "CLOSE", .. }), "{later}");
}

#[test]
fn a_host_that_only_logs_is_silent_all_the_same() {
    let (mut host, theirs, lines) = played();
    let begun = Instant::now();
    let logger = thread::spawn(move || {
        let line = packet(kind::LOG, u32::MAX, 3, b"still busy");
        while rustix::net::send(&theirs, &line, rustix::net::SendFlags::NOSIGNAL).is_ok() {}
    });
    assert!(matches!(host.load(), Err(FilterError::Silent { .. })));
    drop(host);
    logger.join().unwrap();
    let count = lines.lock().unwrap().len() as u64;
    let seconds = begun.elapsed().as_secs() + 1;
    let count_max = seconds * (u64::from(LINES_PER_SECOND) + 1);
    assert!((1..=count_max).contains(&count), "{count} lines in {seconds} s");
}

#[test]
fn messages_against_the_rules_end_the_dialogue() {
    let mut other_version = packet(kind::RESULT, 0, 0, b"");
    other_version[4] = 9;
    for (packet, says) in [
        (vec![1, 2, 3], "a message of 3 bytes"),
        (other_version, "wire version 9"),
        (packet(kind::RESULT, 5, 0, b""), "answered with 5, which is no errno"),
        (packet(kind::RESULT, i32::MIN as u32, 0, b""), "no errno"),
        (packet(77, 0, 0, b""), "kind 77"),
        (packet(kind::DESCRIPTION, 0, 0, b"{}"), "described itself"),
        (packet(kind::RESULT, 0, 0, &vec![b'x'; MESSAGE_MAX]), "more than 65536 bytes"),
    ] {
        let (mut host, theirs, _) = played();
        say(&theirs, &packet);
        let error = host.load().unwrap_err();
        assert!(matches!(error, FilterError::Misbehaved { step: "LOAD", .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert!(host.load().is_err(), "the dialogue is over");
    }
}

#[test]
fn descriptors_from_a_host_are_refused_and_not_kept() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let (mut host, theirs, _) = played();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [writer.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let packet = packet(kind::RESULT, 0, 0, b"");
    let parts = [std::io::IoSlice::new(&packet)];
    rustix::net::sendmsg(&theirs, &parts, &mut control, SendFlags::empty()).unwrap();
    let error = host.load().unwrap_err();
    assert!(error.to_string().contains("sent descriptors"), "{error}");
    drop(writer);
    // Were the writing end still open somewhere, this would not be the end of the file.
    let deadline = Instant::now() + Duration::from_secs(2);
    socket::wait_readable(&[Some(reader.as_fd())], deadline).unwrap();
    assert!(Instant::now() < deadline, "a descriptor of the host was kept");
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0));
}

#[test]
fn a_refusal_brings_the_hosts_words_cleaned_and_the_dialogue_goes_on() {
    let (mut host, theirs, lines) = played();
    say(&theirs, &packet(kind::LOG, 4, 1, b"\x1b[2Jbye\n"));
    say(&theirs, &packet(kind::RESULT, -13i32 as u32, 0, b"no key\x07"));
    say(&theirs, &packet(kind::RESULT, 0, 0, b""));
    let error = host.load().unwrap_err();
    assert!(
        error.to_string().contains("LOAD failed: no key\u{fffd} (Permission denied"),
        "{error}"
    );
    host.load().unwrap();
    let lines = lines.lock().unwrap();
    assert_eq!((lines[0].instance, lines[0].level), (Some(4), LogLevel::Error));
    assert_eq!(lines[0].text, "\u{fffd}[2Jbye");
}

#[test]
fn a_closed_socket_is_the_end_though_the_process_lives() {
    let (mut host, theirs, _) = played();
    drop(theirs);
    let error = host.load().unwrap_err();
    assert!(error.to_string().contains("it closed its control socket"), "{error}");
}

#[test]
fn the_end_of_the_process_is_seen_though_its_socket_stays_open() {
    let (mut host, _theirs, _) = played();
    host.set_timeout(Duration::from_secs(10));
    if let Engine::Isolated(child) = &mut host.engine {
        child.kill();
    }
    let begun = Instant::now();
    let error = host.load().unwrap_err();
    assert!(error.to_string().contains("killed by signal 9 (SIGKILL)"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(3));
}

#[test]
fn a_wrong_description_is_refused() {
    let (mut host, theirs, _) = played();
    let mut wrong = sample();
    wrong["ops"] = 1.into();
    say(&theirs, &packet(kind::DESCRIPTION, 0, 0, wrong.to_string().as_bytes()));
    let error = host.describe().unwrap_err();
    assert!(error.to_string().contains("filter played: its table is wrong: `ops`"), "{error}");
    assert!(host.load().is_err());
}

#[test]
fn a_described_filter_goes_by_its_name() {
    let (mut host, theirs, _) = played();
    say(&theirs, &packet(kind::DESCRIPTION, 0, 0, sample().to_string().as_bytes()));
    host.describe().unwrap();
    assert!(host.load().unwrap_err().to_string().starts_with("filter xor: "));
}

#[test]
fn service_passes_log_lines_on_and_accepts_nothing_else() {
    let (mut host, theirs, lines) = played();
    host.service().unwrap();
    say(&theirs, &packet(kind::LOG, u32::MAX, 2, b"one"));
    say(&theirs, &packet(kind::LOG, 0, 3, b"two"));
    host.service().unwrap();
    assert_eq!(lines.lock().unwrap().len(), 2);
    say(&theirs, &packet(kind::RESULT, 0, 0, b""));
    assert!(matches!(host.service(), Err(FilterError::Misbehaved { .. })));
}

#[test]
fn a_host_that_does_not_read_does_not_block_us() {
    let (mut host, theirs, _) = played();
    let answer = packet(kind::RESULT, 0, 0, b"");
    let mut failed = None;
    for _ in 0..100_000 {
        say(&theirs, &answer);
        if let Err(error) = host.event(0, 1) {
            failed = Some(error.to_string());
            break;
        }
    }
    assert!(failed.expect("the socket takes no end of messages").contains("does not read"));
}

#[test]
fn a_dropped_host_is_killed_and_reaped() {
    let (host, _theirs, _) = played();
    let process = host.process_id().unwrap();
    assert!(std::path::Path::new(&format!("/proc/{process}")).exists());
    drop(host);
    assert!(!std::path::Path::new(&format!("/proc/{process}")).exists());
}

#[test]
fn parameters_that_fill_more_than_a_message_are_refused_before_they_are_sent() {
    let (mut host, theirs, _) = played();
    let mut wide = sample();
    let param = |number: u32| {
        serde_json::json!({"name": format!("p{number}"), "type": 3, "doc": "", "default": "",
            "choices": null, "min": 0, "max": 4096})
    };
    wide["params"] = (0..17).map(param).collect();
    let description = Description::parse(wide.to_string().as_bytes(), Width::Bits64).unwrap();
    let given: Vec<_> = (0..17).map(|number| (format!("p{number}"), "x".repeat(4096))).collect();
    let params = crate::params::resolve(&description, &given).unwrap();
    let counters = Counters::new().unwrap();
    let open = OpenInstance {
        instance: 0,
        arena: 0,
        disks: &[],
        params: &params,
        counters: &counters,
        sidecar: None,
        extents: None,
    };
    let error = host.open(&open).unwrap_err();
    assert!(error.to_string().contains("at most 65536 bytes"), "{error}");
    say(&theirs, &packet(kind::RESULT, 0, 0, b""));
    host.load().unwrap();
}

#[test]
fn more_files_than_a_message_can_carry_are_refused() {
    let (mut host, _theirs, _) = played();
    let mut wide = sample();
    let param = |number: u32| {
        serde_json::json!({"name": format!("p{number}"), "type": 8, "doc": "", "default": null,
            "choices": null, "min": 0, "max": 0})
    };
    wide["params"] = (0..32).map(param).collect();
    let description = Description::parse(wide.to_string().as_bytes(), Width::Bits64).unwrap();
    let given: Vec<_> = (0..32).map(|number| (format!("p{number}"), "/dev/null".into())).collect();
    let params = crate::params::resolve(&description, &given).unwrap();
    let counters = Counters::new().unwrap();
    let open = OpenInstance {
        instance: 0,
        arena: 0,
        disks: &[],
        params: &params,
        counters: &counters,
        sidecar: None,
        extents: None,
    };
    let error = host.open(&open).unwrap_err();
    assert!(error.to_string().contains("at most 31 files"), "{error}");
}

#[test]
fn hosts_and_channels_may_move_to_other_threads() {
    fn is_send<T: Send>() {}
    is_send::<HostProcess>();
    is_send::<InlineChannel>();
}

#[test]
fn dropped_lines_are_counted_and_said() {
    let seen = Mutex::new(Vec::new());
    let sink = |line: LogLine| seen.lock().unwrap().push(line.text);
    let line = log_line(&"f".into(), header(kind::LOG, 1, 3), b"x");
    let mut budget = LogBudget::new();
    for _ in 0..LINES_PER_SECOND + 5 {
        budget.pass(line.clone(), &sink);
    }
    assert_eq!(seen.lock().unwrap().len(), LINES_PER_SECOND as usize);
    budget.second -= Duration::from_secs(2);
    budget.pass(line, &sink);
    let seen = seen.lock().unwrap();
    assert_eq!(seen[LINES_PER_SECOND as usize..], ["5 lines of this filter were dropped", "x"]);
}
