//! From bytes of a client to commands that cannot be wrong: a pure state machine.
//!
//! Always true, whatever the bytes: a [`Command`] lies in the disk, is one that the export
//! offers, and has only flags that it may have; a command that is refused is refused after
//! its payload, so that the next one is found; nothing of a payload is kept here; a client
//! whose next command cannot be found is [`Broken`] for good.

use upcall_block::{DATA_LENGTH_MAX, Op};

use crate::export::ExportInfo;
use crate::handshake::{ReplyStyle, Session};
use crate::wire::*;

/// Longest payload that is skipped to refuse its command: what clients may send to servers
/// that name no limit. Who sends more is not spoken to any longer.
pub const PAYLOAD_MAX: u64 = 32 << 20;

const HEADER: usize = 28;
const HEADER_EXTENDED: usize = 32;

/// What a client wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the flags of the protocol")]
pub enum Kind {
    Read,
    /// Its payload follows: `length` bytes of it, as [`Event::Payload`].
    Write {
        fua: bool,
    },
    Flush,
    Trim {
        fua: bool,
    },
    WriteZeroes {
        fua: bool,
        no_hole: bool,
    },
    Cache,
    BlockStatus {
        one: bool,
    },
}

/// A command, checked: `offset` and `length` are whole blocks inside the disk (both 0 for a
/// flush), and of what carries data not longer than [`DATA_LENGTH_MAX`]. A `length` of 0 asks
/// for nothing, and succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as in the protocol")]
pub struct Command {
    pub kind: Kind,
    pub cookie: u64,
    pub offset: u64,
    pub length: u64,
}

/// A command that cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as in the protocol")]
pub struct Refused {
    pub cookie: u64,
    pub offset: u64,
    pub error: ErrorCode,
    /// Why, for people.
    pub text: &'static str,
}

/// Why there is no next command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// It does not begin as one.
    Magic,
    /// Its payload is too long to be skipped.
    PayloadTooLong,
}

/// What a client said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Do this.
    Command(Command),
    /// More of the payload of the write that was the last [`Event::Command`].
    Payload {
        /// The bytes.
        bytes: &'a [u8],
        /// They are the last.
        is_last: bool,
    },
    /// Answer this.
    Refused(Refused),
    /// It wants to end, in order. Nothing follows.
    Disconnect,
    /// It can be understood no longer. Nothing follows.
    Broken(Broken),
}

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    Payload { left: u64 },
    Skip { left: u64, refused: Refused },
    Over,
}

/// See the module.
#[derive(Debug)]
pub struct Commands {
    export: ExportInfo,
    style: ReplyStyle,
    base_allocation: bool,
    state: State,
    header: [u8; HEADER_EXTENDED],
    have: usize,
}

struct Header {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u64,
}

type Refusal = (ErrorCode, &'static str);

impl Commands {
    /// For a session with `export`.
    pub fn new(export: ExportInfo, session: &Session) -> Commands {
        Commands {
            export,
            style: session.style,
            base_allocation: session.base_allocation,
            state: State::Header,
            header: [0; HEADER_EXTENDED],
            have: 0,
        }
    }

    /// Whether a command has begun and not ended.
    pub fn is_amid(&self) -> bool {
        self.have > 0 || matches!(self.state, State::Payload { .. } | State::Skip { .. })
    }

    /// Takes bytes up to the next event, and says how many. No event: all of them were
    /// taken, and more are needed.
    pub fn handle<'a>(&mut self, input: &'a [u8]) -> (usize, Option<Event<'a>>) {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            match self.state {
                State::Over => return (input.len(), None),
                State::Payload { left } => {
                    if rest.is_empty() {
                        return (used, None);
                    }
                    let here = shorter(left, rest.len());
                    let left = left - here as u64;
                    self.state = if left == 0 { State::Header } else { State::Payload { left } };
                    let event = Event::Payload { bytes: &rest[..here], is_last: left == 0 };
                    return (used + here, Some(event));
                }
                State::Skip { left, refused } => {
                    let here = shorter(left, rest.len());
                    used += here;
                    let left = left - here as u64;
                    if left > 0 {
                        self.state = State::Skip { left, refused };
                        return (used, None);
                    }
                    self.state = State::Header;
                    return (used, Some(Event::Refused(refused)));
                }
                State::Header => {
                    let needed = match self.style {
                        ReplyStyle::Extended => HEADER_EXTENDED,
                        _ => HEADER,
                    };
                    let here = (needed - self.have).min(rest.len());
                    self.header[self.have..self.have + here].copy_from_slice(&rest[..here]);
                    self.have += here;
                    used += here;
                    if self.have < needed {
                        return (used, None);
                    }
                    self.have = 0;
                    if let Some(event) = self.begin() {
                        return (used, Some(event));
                    }
                }
            }
        }
    }

    /// A whole header is there. No event: a payload has to be skipped first.
    fn begin(&mut self) -> Option<Event<'static>> {
        let Some(header) = self.parse() else {
            self.state = State::Over;
            return Some(Event::Broken(Broken::Magic));
        };
        if header.kind == command::DISC {
            self.state = State::Over;
            return Some(Event::Disconnect);
        }
        let has_payload = header.kind == command::WRITE
            || self.style == ReplyStyle::Extended && header.flags & command_flag::PAYLOAD_LEN != 0;
        if has_payload && header.length > PAYLOAD_MAX {
            self.state = State::Over;
            return Some(Event::Broken(Broken::PayloadTooLong));
        }
        let Header { cookie, offset, length, .. } = header;
        match self.check(&header) {
            Ok(kind) => {
                if has_payload && length > 0 {
                    self.state = State::Payload { left: length };
                }
                Some(Event::Command(Command { kind, cookie, offset, length }))
            }
            Err((error, text)) => {
                let refused = Refused { cookie, offset, error, text };
                if has_payload && length > 0 {
                    self.state = State::Skip { left: length, refused };
                    return None;
                }
                Some(Event::Refused(refused))
            }
        }
    }

    fn parse(&self) -> Option<Header> {
        let bytes = &self.header;
        let is_extended = self.style == ReplyStyle::Extended;
        let magic = if is_extended { MAGIC_REQUEST_EXTENDED } else { MAGIC_REQUEST };
        (u32_at(bytes, 0) == magic).then(|| Header {
            flags: u16_at(bytes, 4),
            kind: u16_at(bytes, 6),
            cookie: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            length: if is_extended { u64_at(bytes, 24) } else { u32_at(bytes, 24).into() },
        })
    }

    fn check(&self, header: &Header) -> Result<Kind, Refusal> {
        let flags = header.flags;
        let fua = flags & command_flag::FUA != 0;
        let (kind, op, own_flags) = match header.kind {
            command::READ => (Kind::Read, Op::Read, command_flag::DF),
            command::WRITE => (Kind::Write { fua }, Op::Write, command_flag::PAYLOAD_LEN),
            command::FLUSH => (Kind::Flush, Op::Flush, 0),
            command::TRIM => (Kind::Trim { fua }, Op::Discard, 0),
            command::CACHE => (Kind::Cache, Op::Read, 0),
            command::WRITE_ZEROES => {
                let no_hole = flags & command_flag::NO_HOLE != 0;
                let own_flags = command_flag::NO_HOLE | command_flag::FAST_ZERO;
                (Kind::WriteZeroes { fua, no_hole }, Op::WriteZeroes, own_flags)
            }
            command::BLOCK_STATUS => {
                let one = flags & command_flag::REQ_ONE != 0;
                (Kind::BlockStatus { one }, Op::Read, command_flag::REQ_ONE)
            }
            _ => return Err((ErrorCode::Invalid, "unknown command")),
        };
        self.check_flags(flags, own_flags)?;
        if op.is_modification() && self.export.disk().read_only {
            return Err((ErrorCode::Perm, "the export is read-only"));
        }
        if !self.export.offers(op) {
            return Err((ErrorCode::Invalid, "the export does not offer this command"));
        }
        if flags & command_flag::FAST_ZERO != 0
            && header.kind == command::WRITE_ZEROES
            // With NO_HOLE some file systems have to write.
            && (flags & command_flag::NO_HOLE != 0 || !self.export.zeroes_fast())
        {
            return Err((ErrorCode::NotSupported, "zeroes would not be written fast"));
        }
        self.check_range(header, kind)?;
        Ok(kind)
    }

    /// FUA may be said with every command, though it means something with few.
    fn check_flags(&self, flags: u16, own: u16) -> Result<(), Refusal> {
        let style = match self.style {
            ReplyStyle::Simple => command_flag::DF | command_flag::PAYLOAD_LEN,
            ReplyStyle::Structured => command_flag::PAYLOAD_LEN,
            ReplyStyle::Extended => 0,
        };
        let fua = if self.export.offers_fua() { command_flag::FUA } else { 0 };
        if flags & !((own & !style) | fua) != 0 {
            return Err((ErrorCode::Invalid, "flags that this command does not have"));
        }
        Ok(())
    }

    fn check_range(&self, header: &Header, kind: Kind) -> Result<(), Refusal> {
        let disk = self.export.disk();
        let &Header { offset, length, .. } = header;
        if kind == Kind::Flush {
            return match (offset, length) {
                (0, 0) => Ok(()),
                _ => Err((ErrorCode::Invalid, "a flush has neither offset nor length")),
            };
        }
        if matches!(kind, Kind::BlockStatus { .. }) {
            if !self.base_allocation {
                return Err((ErrorCode::Invalid, "no metadata context was chosen"));
            }
            if length == 0 {
                return Err((ErrorCode::Invalid, "there is no status of nothing"));
            }
        }
        if matches!(kind, Kind::Read | Kind::Write { .. }) && length > DATA_LENGTH_MAX.into() {
            return Err((ErrorCode::Invalid, "longer than the largest block size that was told"));
        }
        if offset.checked_add(length).is_none_or(|end| end > disk.capacity) {
            let error = match kind {
                Kind::Write { .. } | Kind::WriteZeroes { .. } => ErrorCode::NoSpace,
                _ => ErrorCode::Invalid,
            };
            return Err((error, "past the end of the disk"));
        }
        let block = u64::from(disk.block_size);
        if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return Err((ErrorCode::Invalid, "not a multiple of the smallest block size"));
        }
        Ok(())
    }
}

fn shorter(left: u64, length: usize) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(length)
}

#[cfg(test)]
mod tests;
