//! A client's commands, in each style of headers.
//!
//! Always true, whatever the bytes and however they are cut: no panic; a command lies in the
//! disk, in whole blocks, and is one that the export offers; a write's payload is exactly as
//! long as the write; nothing follows an end; cutting the bytes differently changes nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use upcall_block::{DATA_LENGTH_MAX, DiskInfo, Op, OpSet};
use upcall_nbd::ExportInfo;
use upcall_nbd::commands::{Command, Commands, Event, Kind};
use upcall_nbd::handshake::{ReplyStyle, Session};

const CAPACITY: u64 = 1 << 33;

fn export(how: u8) -> ExportInfo {
    let disk = DiskInfo {
        capacity: CAPACITY,
        block_size: if how & 1 == 0 { 512 } else { 4096 },
        physical_block_size: 4096,
        read_only: how & 2 != 0,
        ops: if how & 4 == 0 { OpSet::ALL } else { OpSet::NONE.with(Op::Read).with(Op::Write) },
        discard_granularity: 4096,
    };
    ExportInfo::new("x".into(), String::new(), disk, how & 8 != 0).expect("an export")
}

fn check(export: &ExportInfo, command: &Command) {
    let disk = export.disk();
    let op = match command.kind {
        Kind::Read | Kind::Cache | Kind::BlockStatus { .. } => Op::Read,
        Kind::Write { .. } => Op::Write,
        Kind::Flush => Op::Flush,
        Kind::Trim { .. } => Op::Discard,
        Kind::WriteZeroes { .. } => Op::WriteZeroes,
    };
    assert!(export.offers(op), "{command:?}");
    assert!(command.offset.checked_add(command.length).is_some_and(|end| end <= disk.capacity));
    let block = u64::from(disk.block_size);
    assert!(command.offset % block == 0 && command.length % block == 0, "{command:?}");
    if matches!(command.kind, Kind::Read | Kind::Write { .. }) {
        assert!(command.length <= u64::from(DATA_LENGTH_MAX));
    }
}

/// What was understood, with payloads joined.
fn run(how: u8, bytes: &[u8], piece: usize) -> Vec<String> {
    let style = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended]
        [usize::from(how >> 4) % 3];
    let export = export(how);
    let session = Session { export: 0, style, base_allocation: how & 0x80 != 0 };
    let mut commands = Commands::new(export.clone(), &session);
    let (mut seen, mut left, mut over) = (Vec::new(), 0u64, false);
    for mut input in bytes.chunks(piece) {
        while !input.is_empty() {
            let (used, event) = commands.handle(input);
            assert!(used > 0 && used <= input.len());
            input = &input[used..];
            assert!(event.is_none() || !over, "something after the end");
            match event {
                None => assert!(input.is_empty()),
                Some(Event::Command(command)) => {
                    assert_eq!(left, 0, "a command in a payload");
                    check(&export, &command);
                    if matches!(command.kind, Kind::Write { .. }) {
                        left = command.length;
                    }
                    seen.push(format!("{command:?}"));
                }
                Some(Event::Payload { bytes, is_last }) => {
                    left -= bytes.len() as u64;
                    assert_eq!(is_last, left == 0);
                }
                Some(Event::Refused(refused)) => {
                    assert_eq!(left, 0);
                    seen.push(format!("{refused:?}"));
                }
                Some(event @ (Event::Disconnect | Event::Broken(_))) => {
                    assert_eq!(left, 0);
                    over = true;
                    seen.push(format!("{event:?}"));
                }
            }
        }
    }
    seen
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&[how, cut], bytes)) = bytes.split_first_chunk() else { return };
    let whole = run(how, bytes, bytes.len().max(1));
    assert_eq!(whole, run(how, bytes, usize::from(cut) + 1));
});
