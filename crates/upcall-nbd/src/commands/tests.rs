use upcall_block::{DiskInfo, OpSet};

use super::*;

const CAPACITY: u64 = 1 << 40;

fn disk() -> DiskInfo {
    DiskInfo {
        capacity: CAPACITY,
        block_size: 512,
        physical_block_size: 4096,
        read_only: false,
        ops: OpSet::ALL,
        discard_granularity: 4096,
    }
}

fn commands_of(disk: DiskInfo, style: ReplyStyle, fast_zero: bool) -> Commands {
    let export = ExportInfo::new("x".into(), String::new(), disk, fast_zero).unwrap();
    let base_allocation = style != ReplyStyle::Simple;
    Commands::new(export, &Session { export: 0, style, base_allocation })
}

fn commands(style: ReplyStyle) -> Commands {
    commands_of(disk(), style, true)
}

fn header(style: ReplyStyle, flags: u16, kind: u16, offset: u64, length: u64) -> Vec<u8> {
    let is_extended = style == ReplyStyle::Extended;
    let magic = if is_extended { MAGIC_REQUEST_EXTENDED } else { MAGIC_REQUEST };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(7u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    match is_extended {
        true => bytes.extend(length.to_be_bytes()),
        false => bytes.extend((length as u32).to_be_bytes()),
    }
    bytes
}

/// What a command without payload is taken for.
#[track_caller]
fn said(
    commands: &mut Commands,
    flags: u16,
    kind: u16,
    offset: u64,
    length: u64,
) -> Result<Kind, ErrorCode> {
    let bytes = header(commands.style, flags, kind, offset, length);
    match commands.handle(&bytes) {
        (used, Some(Event::Command(command))) => {
            assert_eq!(used, bytes.len());
            assert_eq!((command.cookie, command.offset, command.length), (7, offset, length));
            Ok(command.kind)
        }
        (used, Some(Event::Refused(refused))) => {
            assert_eq!((used, refused.cookie, refused.offset), (bytes.len(), 7, offset));
            Err(refused.error)
        }
        other => panic!("{other:?}"),
    }
}

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
const ALL_FLAGS: u16 = 0x3f;

#[test]
fn every_command_is_understood_in_every_style() {
    use command_flag::*;
    for style in STYLES {
        let mut commands = commands(style);
        let chunked = style != ReplyStyle::Simple;
        for (kind, flags, expected) in [
            (command::READ, 0, Kind::Read),
            (command::READ, FUA, Kind::Read),
            (command::FLUSH, 0, Kind::Flush),
            (command::TRIM, 0, Kind::Trim { fua: false }),
            (command::TRIM, FUA, Kind::Trim { fua: true }),
            (command::CACHE, 0, Kind::Cache),
            (command::WRITE_ZEROES, FUA, Kind::WriteZeroes { fua: true, no_hole: false }),
            (command::WRITE_ZEROES, NO_HOLE, Kind::WriteZeroes { fua: false, no_hole: true }),
            (command::WRITE_ZEROES, FAST_ZERO, Kind::WriteZeroes { fua: false, no_hole: false }),
        ] {
            let length = if kind == command::FLUSH { 0 } else { 4096 };
            let offset = if kind == command::FLUSH { 0 } else { 8192 };
            assert_eq!(said(&mut commands, flags, kind, offset, length), Ok(expected), "{style:?}");
        }
        let status = |flags| (flags, command::BLOCK_STATUS, 0, 512);
        for (flags, kind, offset, length) in [status(0), status(REQ_ONE)] {
            let expected = Kind::BlockStatus { one: flags != 0 };
            let result = said(&mut commands, flags, kind, offset, length);
            assert_eq!(result, if chunked { Ok(expected) } else { Err(ErrorCode::Invalid) });
        }
        let df = said(&mut commands, DF, command::READ, 0, 512);
        assert_eq!(df.is_ok(), chunked, "{style:?}");
    }
}

#[test]
fn flags_that_a_command_does_not_have_are_refused() {
    use command_flag::*;
    for (kind, own) in [
        (command::READ, FUA | DF),
        (command::FLUSH, FUA),
        (command::TRIM, FUA),
        (command::CACHE, FUA),
        (command::WRITE_ZEROES, FUA | NO_HOLE | FAST_ZERO),
        (command::BLOCK_STATUS, FUA | REQ_ONE),
    ] {
        let (offset, length) = if kind == command::FLUSH { (0, 0) } else { (0, 512) };
        for bit in 0..16 {
            let flag = 1u16 << bit;
            let mut commands = commands(ReplyStyle::Structured);
            let result = said(&mut commands, flag, kind, offset, length);
            assert_eq!(result.is_ok(), own & flag != 0, "command {kind}, flag {flag:#x}");
        }
    }
    assert_eq!(
        said(&mut commands(ReplyStyle::Simple), ALL_FLAGS, 99, 0, 0),
        Err(ErrorCode::Invalid),
        "a command that nobody knows"
    );
}

#[test]
fn a_range_lies_in_the_disk_in_whole_blocks() {
    use ErrorCode::{Invalid, NoSpace};
    let mut commands = commands(ReplyStyle::Extended);
    for (kind, offset, length, expected) in [
        (command::READ, CAPACITY - 512, 512, None),
        (command::READ, CAPACITY, 512, Some(Invalid)),
        (command::READ, CAPACITY - 512, 1024, Some(Invalid)),
        (command::READ, u64::MAX - 511, 512, Some(Invalid)),
        (command::READ, u64::MAX, u64::MAX, Some(Invalid)),
        (command::READ, CAPACITY, 0, None),
        (command::READ, CAPACITY + 512, 0, Some(Invalid)),
        (command::READ, 1, 512, Some(Invalid)),
        (command::READ, 0, 513, Some(Invalid)),
        (command::READ, 0, 4 << 20, None),
        (command::READ, 0, (4 << 20) + 512, Some(Invalid)),
        (command::TRIM, 0, CAPACITY, None),
        (command::TRIM, 512, CAPACITY, Some(Invalid)),
        (command::WRITE_ZEROES, 0, CAPACITY, None),
        (command::WRITE_ZEROES, 512, CAPACITY, Some(NoSpace)),
        (command::CACHE, 0, CAPACITY, None),
        (command::BLOCK_STATUS, 0, CAPACITY, None),
        (command::BLOCK_STATUS, 0, 0, Some(Invalid)),
        (command::FLUSH, 512, 0, Some(Invalid)),
        (command::FLUSH, 0, 512, Some(Invalid)),
    ] {
        let result = said(&mut commands, 0, kind, offset, length);
        assert_eq!(result.err(), expected, "command {kind} at {offset}, {length} bytes");
    }
}

#[test]
fn what_an_export_does_not_offer_is_refused() {
    let read_only = DiskInfo { read_only: true, ..disk() };
    let mut commands = commands_of(read_only, ReplyStyle::Structured, true);
    for kind in [command::TRIM, command::WRITE_ZEROES] {
        assert_eq!(said(&mut commands, 0, kind, 0, 512), Err(ErrorCode::Perm));
    }
    assert_eq!(said(&mut commands, 0, command::READ, 0, 512), Ok(Kind::Read));
    let few = DiskInfo { ops: OpSet::NONE.with(Op::Read).with(Op::Write), ..disk() };
    let mut commands = commands_of(few, ReplyStyle::Structured, true);
    for kind in [command::TRIM, command::WRITE_ZEROES] {
        assert_eq!(said(&mut commands, 0, kind, 0, 512), Err(ErrorCode::Invalid));
    }
    assert_eq!(said(&mut commands, 0, command::FLUSH, 0, 0), Err(ErrorCode::Invalid));
    let fua = command_flag::FUA;
    assert_eq!(said(&mut commands, fua, command::READ, 0, 512), Err(ErrorCode::Invalid));
}

#[test]
fn zeroes_that_must_be_fast_are_refused_where_that_is_not_known() {
    use command_flag::{FAST_ZERO, NO_HOLE};
    let zero = command::WRITE_ZEROES;
    let mut slow = commands_of(disk(), ReplyStyle::Structured, false);
    assert_eq!(said(&mut slow, FAST_ZERO, zero, 0, 512), Err(ErrorCode::NotSupported));
    assert!(said(&mut slow, 0, zero, 0, 512).is_ok());
    let mut fast = commands(ReplyStyle::Structured);
    assert!(said(&mut fast, FAST_ZERO, zero, 0, 512).is_ok());
    assert_eq!(said(&mut fast, FAST_ZERO | NO_HOLE, zero, 0, 512), Err(ErrorCode::NotSupported));
}

/// All events of `bytes`, given in pieces of `piece` bytes, with payloads joined.
fn events(commands: &mut Commands, bytes: &[u8], piece: usize) -> Vec<String> {
    let mut all = Vec::new();
    let mut payload: Vec<u8> = Vec::new();
    for mut bytes in bytes.chunks(piece) {
        while !bytes.is_empty() {
            let (used, event) = commands.handle(bytes);
            assert!(used > 0);
            bytes = &bytes[used..];
            match event {
                None => assert!(bytes.is_empty()),
                Some(Event::Payload { bytes, is_last }) => {
                    payload.extend(bytes);
                    if is_last {
                        all.push(format!("payload {:?}", std::mem::take(&mut payload)));
                    }
                }
                Some(Event::Command(command)) => all.push(format!("{:?}", command.kind)),
                Some(Event::Refused(refused)) => all.push(format!("{:?}", refused.error)),
                Some(other) => all.push(format!("{other:?}")),
            }
        }
    }
    all
}

#[test]
fn payloads_follow_their_writes_however_the_bytes_come() {
    for style in STYLES {
        let payload_flag =
            if style == ReplyStyle::Extended { command_flag::PAYLOAD_LEN } else { 0 };
        let mut bytes = header(style, payload_flag, command::WRITE, 0, 512);
        bytes.extend([1; 512]);
        // Refused, with its payload; and one without any.
        bytes.extend(header(style, payload_flag, command::WRITE, CAPACITY, 512));
        bytes.extend([2; 512]);
        bytes.extend(header(style, payload_flag, command::WRITE, 0, 0));
        bytes.extend(header(style, command_flag::FUA | payload_flag, command::WRITE, 512, 512));
        bytes.extend([3; 512]);
        bytes.extend(header(style, 0, command::DISC, 0, 0));
        bytes.extend([0xff; 100]);
        for piece in [1, 7, 28, 512, 10_000] {
            let mut commands = commands(style);
            let all = events(&mut commands, &bytes, piece);
            let expected = [
                "Write { fua: false }".into(),
                format!("payload {:?}", [1; 512]),
                "NoSpace".into(),
                "Write { fua: false }".into(),
                "Write { fua: true }".into(),
                format!("payload {:?}", [3; 512]),
                "Disconnect".into(),
            ];
            assert_eq!(all, expected, "{style:?}, {piece}");
            assert!(!commands.is_amid());
        }
    }
}

#[test]
fn a_payload_is_skipped_up_to_what_clients_may_send_and_not_further() {
    let style = ReplyStyle::Structured;
    let mut commands = commands(style);
    let mut bytes = header(style, 0, command::WRITE, 0, PAYLOAD_MAX);
    bytes.resize(bytes.len() + PAYLOAD_MAX as usize, 0);
    bytes.extend(header(style, 0, command::READ, 0, 512));
    assert_eq!(events(&mut commands, &bytes, 1 << 20), ["Invalid", "Read"]);
    let long = header(style, 0, command::WRITE, 0, PAYLOAD_MAX + 512);
    let (_, event) = commands.handle(&long);
    assert_eq!(event, Some(Event::Broken(Broken::PayloadTooLong)));
    let more = header(style, 0, command::READ, 0, 512);
    let (used, event) = commands.handle(&more);
    assert_eq!((used, event), (28, None), "nothing follows");
}

#[test]
fn in_extended_headers_any_command_may_have_a_payload_and_is_refused_after_it() {
    let style = ReplyStyle::Extended;
    let mut bytes = header(style, command_flag::PAYLOAD_LEN, command::READ, 0, 600);
    bytes.extend([9; 600]);
    bytes.extend(header(style, 0, command::READ, 0, 512));
    assert_eq!(events(&mut commands(style), &bytes, 100), ["Invalid", "Read"]);
    let long = header(style, command_flag::PAYLOAD_LEN, command::TRIM, 0, u64::MAX);
    let (_, event) = commands(style).handle(&long);
    assert_eq!(event, Some(Event::Broken(Broken::PayloadTooLong)));
}

#[test]
fn what_is_no_command_breaks_it() {
    for (style, other) in
        [(ReplyStyle::Simple, ReplyStyle::Extended), (ReplyStyle::Extended, ReplyStyle::Simple)]
    {
        let mut bytes = header(other, 0, command::READ, 0, 512);
        bytes.resize(32, 0);
        let (_, event) = commands(style).handle(&bytes);
        assert_eq!(event, Some(Event::Broken(Broken::Magic)));
    }
}
