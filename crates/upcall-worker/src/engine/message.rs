//! What a filter host says on its completion ring, parsed once into types that cannot be
//! wrong in themselves. Whether it fits what is in flight is for the engine to check.

use upcall_abi::filter::{self, request_flag};
use upcall_abi::ring::{Completion, NO_DATA, completion_kind};
use upcall_block::{Op, RequestFlags};
use upcall_chain::Verdict;

/// The worker's name for one delivery of one request to one filter. Never given twice
/// within 2³² deliveries of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Delivery {
    /// Number of the request in the engine's table.
    pub(crate) request: u32,
    /// Which delivery it is; never 0.
    pub(crate) serial: u32,
}

impl Delivery {
    pub(crate) fn token(self) -> u64 {
        u64::from(self.serial) << 32 | u64::from(self.request)
    }

    pub(crate) fn from_token(token: u64) -> Delivery {
        Delivery { request: token as u32, serial: (token >> 32) as u32 }
    }
}

/// A request of a filter's own, before its range is checked against the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Issue {
    /// The filter host's name for it.
    pub(crate) id: u64,
    pub(crate) op: Op,
    pub(crate) flags: RequestFlags,
    pub(crate) offset: u64,
    pub(crate) length: u32,
    /// Offset in the issue arena; there exactly for read and write.
    pub(crate) data: Option<u64>,
    /// 0: the instance's own disk, below it; n: its n-th granted disk.
    pub(crate) disk: u32,
}

/// A well-formed message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Verdict { delivery: Delivery, instance: u32, verdict: Verdict, cookie: u64 },
    Held { delivery: Delivery, instance: u32, cookie: u64 },
    Issue { instance: u32, issue: Issue },
}

/// An entry that no filter host of ours writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

/// Checks an entry. Every bit pattern gives a message or says what is wrong with it.
pub(crate) fn parse(entry: &Completion) -> Result<Message, Malformed> {
    let delivery = Delivery::from_token(entry.token);
    let (instance, cookie) = (entry.instance, entry.cookie);
    match entry.kind {
        completion_kind::VERDICT => {
            let verdict = Verdict::from_numbers(u32::from(entry.code), entry.status);
            Ok(Message::Verdict { delivery, instance, verdict, cookie })
        }
        completion_kind::HELD => Ok(Message::Held { delivery, instance, cookie }),
        completion_kind::ISSUE => Ok(Message::Issue { instance, issue: issue(entry)? }),
        _ => Err(Malformed("an entry of unknown kind")),
    }
}

fn issue(entry: &Completion) -> Result<Issue, Malformed> {
    let Some(op) = Op::from_number(entry.code) else {
        return Err(Malformed("an issued request with an unknown operation"));
    };
    let flags = match op {
        Op::Write => request_flag::FUA,
        Op::WriteZeroes => request_flag::UNMAP,
        _ => 0,
    };
    if entry.flags & !flags != 0 {
        return Err(Malformed("an issued request with flags that its operation does not have"));
    }
    if (op == Op::Flush) != (entry.length == 0) || op == Op::Flush && entry.offset != 0 {
        return Err(Malformed("an issued request with a range where there is none, or without"));
    }
    let most = if op.has_data() { filter::DATA_LENGTH_MAX } else { filter::LENGTH_MAX };
    if entry.length > most {
        return Err(Malformed("an issued request that is too long"));
    }
    if op.has_data() == (entry.data == NO_DATA) {
        return Err(Malformed("an issued request with data where there is none, or without"));
    }
    Ok(Issue {
        id: entry.token,
        op,
        flags: RequestFlags {
            fua: entry.flags & request_flag::FUA != 0,
            unmap: entry.flags & request_flag::UNMAP != 0,
            retry: false,
        },
        offset: entry.offset,
        length: entry.length,
        data: op.has_data().then_some(entry.data),
        disk: entry.disk,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_delivery() {
        let delivery = Delivery { request: u32::MAX, serial: 1 };
        assert_eq!(Delivery::from_token(delivery.token()), delivery);
        let entry = Completion {
            kind: completion_kind::VERDICT,
            token: 5 << 32 | 3,
            ..Completion::default()
        };
        let delivery = Delivery { request: 3, serial: 5 };
        let verdict = Verdict::Pass(Ok(()));
        assert_eq!(
            parse(&entry),
            Ok(Message::Verdict { delivery, instance: 0, verdict, cookie: 0 })
        );
        assert!(parse(&Completion { kind: 9, ..entry }).is_err());
    }

    #[test]
    fn an_issued_request_is_whole_or_refused() {
        let good = Completion {
            kind: completion_kind::ISSUE,
            code: Op::Write as u8,
            length: 4096,
            data: 8192,
            ..Completion::default()
        };
        assert!(parse(&good).is_ok());
        assert!(parse(&Completion { code: 0, ..good }).is_err());
        assert!(parse(&Completion { flags: request_flag::RETRY, ..good }).is_err());
        assert!(parse(&Completion { length: filter::DATA_LENGTH_MAX + 1, ..good }).is_err());
        assert!(parse(&Completion { data: NO_DATA, ..good }).is_err());
        assert!(
            parse(&Completion { code: Op::Flush as u8, ..good }).is_err(),
            "a flush has no data"
        );
        let flush = Completion { code: Op::Flush as u8, data: NO_DATA, length: 0, ..good };
        assert!(parse(&flush).is_ok());
        assert!(parse(&Completion { length: 4096, ..flush }).is_err(), "a flush has no range");
        assert!(parse(&Completion { offset: 4096, ..flush }).is_err());
        assert!(parse(&Completion { length: 0, ..good }).is_err(), "a write has one");
        assert!(parse(&Completion { flags: request_flag::FUA, ..good }).is_ok());
        assert!(parse(&Completion { flags: request_flag::UNMAP, ..good }).is_err());
        assert!(parse(&Completion { flags: request_flag::FUA, ..flush }).is_err());
    }
}
