use upcall_block::{DiskInfo, OpSet};

use super::*;

fn export(name: &str, capacity: u64) -> ExportInfo {
    let disk = DiskInfo {
        capacity,
        block_size: 512,
        physical_block_size: 4096,
        read_only: false,
        ops: OpSet::ALL,
        discard_granularity: 4096,
    };
    ExportInfo::new(name.into(), "for a test".into(), disk, true).unwrap()
}

fn exports() -> Arc<[ExportInfo]> {
    Arc::new([export("root", 1 << 30), export("data", 1 << 20)])
}

/// A client's bytes for an option.
fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC_OPTION.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = text(name);
    data.extend((wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

fn contexts(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = text(export);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| text(query)));
    data
}

/// A client that has said its flags.
struct Client {
    handshake: Handshake,
}

/// A reply: option, kind, body.
type Reply = (u32, u32, Vec<u8>);

impl Client {
    fn new(tls: TlsMode) -> Client {
        let mut out = Vec::new();
        let mut handshake = Handshake::new(exports(), tls, &mut out);
        assert_eq!(out, *b"NBDMAGICIHAVEOPT\0\x03");
        out.clear();
        assert_eq!(handshake.handle(&3u32.to_be_bytes(), &mut out), (4, None));
        Client { handshake }
    }

    fn say(&mut self, bytes: &[u8]) -> (Vec<Reply>, Option<Outcome>) {
        let mut out = Vec::new();
        let (used, outcome) = self.handshake.handle(bytes, &mut out);
        assert_eq!(used, bytes.len());
        (replies(&out), outcome)
    }

    fn ask(&mut self, number: u32, data: &[u8]) -> (Vec<Reply>, Option<Outcome>) {
        self.say(&option(number, data))
    }

    /// The kind of the only reply.
    #[track_caller]
    fn kind(&mut self, number: u32, data: &[u8]) -> u32 {
        let (replies, outcome) = self.ask(number, data);
        assert_eq!((replies.len(), outcome), (1, None), "{replies:?}");
        assert_eq!(replies[0].0, number);
        replies[0].1
    }
}

fn replies(mut bytes: &[u8]) -> Vec<Reply> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(u64_at(bytes, 0), MAGIC_OPTION_REPLY);
        let length = u32_at(bytes, 16) as usize;
        all.push((u32_at(bytes, 8), u32_at(bytes, 12), bytes[20..20 + length].to_vec()));
        bytes = &bytes[20 + length..];
    }
    all
}

#[test]
fn go_tells_size_flags_and_block_sizes_and_ends_the_handshake() {
    let mut client = Client::new(TlsMode::Off);
    let (said, outcome) =
        client.ask(option::GO, &go("data", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE]));
    let kinds: Vec<u32> = said.iter().map(|reply| reply.1).collect();
    assert_eq!(kinds, [rep::INFO, rep::INFO, rep::INFO, rep::INFO, rep::ACK]);
    assert_eq!(said[0].2[..10], *b"\0\0\0\0\0\0\0\x10\0\0");
    let flags = u16_at(&said[0].2, 10);
    for (flag, told) in [
        (flag::HAS_FLAGS, true),
        (flag::READ_ONLY, false),
        (flag::SEND_FLUSH, true),
        (flag::SEND_FUA, true),
        (flag::SEND_TRIM, true),
        (flag::SEND_WRITE_ZEROES, true),
        (flag::SEND_FAST_ZERO, true),
        (flag::CAN_MULTI_CONN, true),
        (flag::SEND_CACHE, true),
        (flag::SEND_DF, false),
    ] {
        assert_eq!(flags & flag != 0, told, "{flag:#x}");
    }
    assert_eq!(said[1].2, *b"\0\x01data");
    assert_eq!(said[2].2, *b"\0\x02for a test");
    assert_eq!(said[3].2, *b"\0\x03\0\0\x02\0\0\0\x10\0\0\x40\0\0");
    let session = Session { export: 1, style: ReplyStyle::Simple, base_allocation: false };
    assert_eq!(outcome, Some(Outcome::Transmission(session)));
    assert_eq!(client.handshake.handle(b"more", &mut Vec::new()), (4, None), "it is over");
}

#[test]
fn info_tells_the_same_and_goes_on() {
    let mut client = Client::new(TlsMode::Off);
    let (said, outcome) = client.ask(option::INFO, &go("root", &[]));
    assert_eq!((said.len(), outcome), (3, None));
    assert_eq!(client.kind(option::INFO, &go("none", &[])), rep::ERR_UNKNOWN);
    assert_eq!(client.kind(option::INFO, &go("", &[])), rep::ERR_UNKNOWN, "which of two?");
    assert_eq!(client.kind(option::GO, b"short"), rep::ERR_INVALID);
    let mut long = go("root", &[]);
    long.push(0);
    assert_eq!(client.kind(option::GO, &long), rep::ERR_INVALID);
    assert_eq!(client.kind(99, b"whatever"), rep::ERR_UNSUP);
}

#[test]
fn the_only_export_is_found_without_a_name() {
    let mut out = Vec::new();
    let one: Arc<[ExportInfo]> = Arc::new([export("root", 1 << 20)]);
    let mut handshake = Handshake::new(one, TlsMode::Off, &mut out);
    let mut bytes = 0u32.to_be_bytes().to_vec();
    bytes.extend(option(option::EXPORT_NAME, b""));
    out.clear();
    let (used, outcome) = handshake.handle(&bytes, &mut out);
    assert_eq!(used, bytes.len());
    assert!(matches!(outcome, Some(Outcome::Transmission(Session { export: 0, .. }))));
    assert_eq!(out.len(), 8 + 2 + 124, "with zeroes, for who does not know better");
}

#[test]
fn list_names_all_exports() {
    let mut client = Client::new(TlsMode::Off);
    let (said, _) = client.ask(option::LIST, &[]);
    let bodies: Vec<&[u8]> = said.iter().map(|reply| &reply.2[..]).collect();
    assert_eq!(bodies, [&b"\0\0\0\x04rootfor a test"[..], b"\0\0\0\x04datafor a test", b""]);
    assert_eq!(client.kind(option::LIST, b"x"), rep::ERR_INVALID);
}

#[test]
fn old_clients_name_their_export_and_are_cut_off_if_there_is_none() {
    let mut client = Client::new(TlsMode::Off);
    let mut out = Vec::new();
    let (_, outcome) = client.handshake.handle(&option(option::EXPORT_NAME, b"root"), &mut out);
    assert!(matches!(outcome, Some(Outcome::Transmission(Session { export: 0, .. }))));
    assert_eq!(out.len(), 10, "without zeroes, as they were not wanted");
    let mut client = Client::new(TlsMode::Off);
    let (said, outcome) = client.ask(option::EXPORT_NAME, b"none");
    assert!(said.is_empty() && matches!(outcome, Some(Outcome::End(_))));
}

#[test]
fn base_allocation_counts_for_the_export_it_was_chosen_for() {
    for (chosen, used, counts) in [("root", "root", true), ("data", "root", false)] {
        let mut client = Client::new(TlsMode::Off);
        let query = contexts(chosen, &["qemu:x", BASE_ALLOCATION]);
        assert_eq!(client.kind(option::SET_META_CONTEXT, &query), rep::ERR_INVALID, "too early");
        assert_eq!(client.kind(option::STRUCTURED_REPLY, &[]), rep::ACK);
        let (said, _) = client.ask(option::SET_META_CONTEXT, &query);
        assert_eq!(said[0].2, *b"\0\0\0\x01base:allocation");
        assert_eq!(said[1].1, rep::ACK);
        let (_, outcome) = client.ask(option::GO, &go(used, &[]));
        let Some(Outcome::Transmission(session)) = outcome else { panic!("{outcome:?}") };
        assert_eq!(session.base_allocation, counts);
        assert_eq!(session.style, ReplyStyle::Structured);
    }
}

#[test]
fn contexts_are_listed_by_their_beginning_and_chosen_by_their_name() {
    let mut client = Client::new(TlsMode::Off);
    assert_eq!(client.kind(option::STRUCTURED_REPLY, &[]), rep::ACK);
    assert_eq!(client.kind(option::STRUCTURED_REPLY, &[]), rep::ERR_INVALID, "twice");
    for (queries, found) in
        [(&[][..], true), (&["base:"], true), (&[BASE_ALLOCATION], true), (&["other:"], false)]
    {
        let (said, _) = client.ask(option::LIST_META_CONTEXT, &contexts("root", queries));
        assert_eq!(said.len() == 2, found, "{queries:?}");
    }
    for queries in [&[][..], &["base:"]] {
        let (said, _) = client.ask(option::SET_META_CONTEXT, &contexts("root", queries));
        assert_eq!(said.len(), 1, "{queries:?}");
    }
    let set = contexts("root", &[BASE_ALLOCATION]);
    assert_eq!(client.ask(option::SET_META_CONTEXT, &set).0.len(), 2);
    // A request that fails takes back the one before.
    let wrong = contexts("none", &[BASE_ALLOCATION]);
    assert_eq!(client.kind(option::SET_META_CONTEXT, &wrong), rep::ERR_UNKNOWN);
    let (_, outcome) = client.ask(option::GO, &go("root", &[]));
    let Some(Outcome::Transmission(session)) = outcome else { panic!("{outcome:?}") };
    assert!(!session.base_allocation);
}

#[test]
fn extended_headers_come_instead_of_structured_replies() {
    let mut client = Client::new(TlsMode::Off);
    assert_eq!(client.kind(option::STRUCTURED_REPLY, &[]), rep::ACK);
    assert_eq!(client.kind(option::EXTENDED_HEADERS, &[]), rep::ACK);
    assert_eq!(client.kind(option::EXTENDED_HEADERS, &[]), rep::ERR_INVALID);
    assert_eq!(client.kind(option::STRUCTURED_REPLY, &[]), rep::ERR_EXT_HEADER_REQD);
    let (said, outcome) = client.ask(option::GO, &go("root", &[]));
    assert_ne!(u16_at(&said[0].2, 10) & flag::SEND_DF, 0);
    let Some(Outcome::Transmission(session)) = outcome else { panic!("{outcome:?}") };
    assert_eq!(session.style, ReplyStyle::Extended);
}

#[test]
fn where_tls_is_required_nothing_is_said_before_it() {
    let mut client = Client::new(TlsMode::Required);
    for (number, data) in [
        (option::LIST, vec![]),
        (option::INFO, go("root", &[])),
        (option::GO, go("root", &[])),
        (option::STRUCTURED_REPLY, vec![]),
        (option::SET_META_CONTEXT, contexts("root", &[])),
        (99, vec![]),
    ] {
        assert_eq!(client.kind(number, &data), rep::ERR_TLS_REQD, "{number}");
    }
    let (said, outcome) = Client::new(TlsMode::Required).ask(option::EXPORT_NAME, b"root");
    assert!(said.is_empty() && matches!(outcome, Some(Outcome::End(_))));
}

#[test]
fn nothing_that_was_agreed_on_in_the_clear_counts_in_tls() {
    let mut client = Client::new(TlsMode::Offered);
    assert_eq!(client.kind(option::EXTENDED_HEADERS, &[]), rep::ACK);
    let set = contexts("root", &[BASE_ALLOCATION]);
    assert_eq!(client.ask(option::SET_META_CONTEXT, &set).0.len(), 2);
    let mut bytes = option(option::STARTTLS, &[]);
    let length = bytes.len();
    bytes.extend(option(option::LIST, &[]));
    let mut out = Vec::new();
    let (used, outcome) = client.handshake.handle(&bytes, &mut out);
    assert_eq!((used, outcome), (length, Some(Outcome::StartTls)), "the rest is not looked at");
    let mut client = Client { handshake: client.handshake.after_tls() };
    assert_eq!(client.kind(option::STARTTLS, &[]), rep::ERR_INVALID, "twice");
    let (_, outcome) = client.ask(option::GO, &go("root", &[]));
    let session = Session { export: 0, style: ReplyStyle::Simple, base_allocation: false };
    assert_eq!(outcome, Some(Outcome::Transmission(session)));
}

#[test]
fn without_certificates_there_is_no_tls() {
    assert_eq!(Client::new(TlsMode::Off).kind(option::STARTTLS, &[]), rep::ERR_UNSUP);
}

#[test]
fn too_long_an_option_is_skipped_and_much_too_long_a_one_ends_it() {
    let mut client = Client::new(TlsMode::Off);
    let data = vec![0; OPTION_LENGTH_MAX + 1];
    assert_eq!(client.kind(option::LIST, &data), rep::ERR_TOO_BIG);
    assert!(client.handshake.gathered.capacity() <= OPTION_LENGTH_MAX);
    assert_eq!(client.ask(option::LIST, &[]).0.len(), 3, "it goes on");
    let mut bytes = option(option::LIST, &[]);
    bytes[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    let (said, outcome) = client.say(&bytes);
    assert!(said.is_empty() && matches!(outcome, Some(Outcome::End(_))));
}

#[test]
fn a_flood_of_options_ends_it() {
    let mut client = Client::new(TlsMode::Off);
    for _ in 0..OPTIONS_MAX {
        assert_eq!(client.kind(99, &[]), rep::ERR_UNSUP);
    }
    assert!(matches!(client.ask(99, &[]), (_, Some(Outcome::End(_)))));
}

#[test]
fn bytes_may_come_one_by_one() {
    let mut out = Vec::new();
    let mut handshake = Handshake::new(exports(), TlsMode::Off, &mut out);
    let mut bytes = 3u32.to_be_bytes().to_vec();
    bytes.extend(option(option::STRUCTURED_REPLY, &[]));
    bytes.extend(option(option::GO, &go("root", &[])));
    let last = bytes.len() - 1;
    for (at, byte) in bytes.iter().enumerate() {
        let (used, outcome) = handshake.handle(&[*byte], &mut out);
        assert_eq!((used, outcome.is_some()), (1, at == last));
    }
    assert_eq!(replies(&out[18..]).len(), 4);
}

#[test]
fn one_call_answers_one_option() {
    let mut client = Client::new(TlsMode::Off);
    let one = option(option::LIST, &[]);
    let many: Vec<u8> = one.repeat(10);
    let mut out = Vec::new();
    assert_eq!(client.handshake.handle(&many, &mut out), (one.len(), None));
    assert_eq!(replies(&out).len(), 3);
}

#[test]
fn abort_is_confirmed_and_garbage_is_not() {
    let (said, outcome) = Client::new(TlsMode::Required).ask(option::ABORT, &[]);
    assert_eq!(said[0].1, rep::ACK);
    assert!(matches!(outcome, Some(Outcome::End(_))));
    let (said, outcome) = Client::new(TlsMode::Off).say(b"GET / HTTP/1.1\r\n");
    assert!(said.is_empty() && matches!(outcome, Some(Outcome::End(_))));
    let mut out = Vec::new();
    let mut handshake = Handshake::new(exports(), TlsMode::Off, &mut out);
    let (_, outcome) = handshake.handle(&u32::MAX.to_be_bytes(), &mut out);
    assert!(matches!(outcome, Some(Outcome::End(_))), "flags that nobody knows");
}
