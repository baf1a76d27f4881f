//! Replies to commands, in the style that was agreed on.

use upcall_block::{Allocation, Extent};

use crate::handshake::ReplyStyle;
use crate::wire::*;

/// Most extents in one reply.
pub const EXTENTS_MAX: usize = 4096;

/// What of a command every reply repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as in the protocol")]
pub struct Asked {
    pub cookie: u64,
    pub offset: u64,
}

/// Writes replies of one style. Each function appends one whole reply (of a read: all but
/// the data) to `out`.
#[derive(Clone, Copy, Debug)]
pub struct Replies(pub ReplyStyle);

impl Replies {
    /// It is done.
    pub fn done(self, out: &mut Vec<u8>, asked: Asked) {
        match self.0 {
            ReplyStyle::Simple => simple(out, 0, asked),
            _ => self.chunk(out, chunk::NONE, asked, 0),
        }
    }

    /// Its `length` bytes of data follow.
    pub fn read(self, out: &mut Vec<u8>, asked: Asked, length: u32) {
        match self.0 {
            ReplyStyle::Simple => simple(out, 0, asked),
            _ if length == 0 => self.chunk(out, chunk::NONE, asked, 0),
            _ => {
                self.chunk(out, chunk::OFFSET_DATA, asked, u64::from(length) + 8);
                out.extend(asked.offset.to_be_bytes());
            }
        }
    }

    /// It failed.
    pub fn error(self, out: &mut Vec<u8>, asked: Asked, error: ErrorCode, text: &str) {
        if self.0 == ReplyStyle::Simple {
            return simple(out, error as u32, asked);
        }
        let text = &text.as_bytes()[..text.len().min(TEXT_MAX)];
        self.chunk(out, chunk::ERROR, asked, 6 + text.len() as u64);
        out.extend((error as u32).to_be_bytes());
        out.extend((text.len() as u16).to_be_bytes());
        out.extend(text);
    }

    /// The state of what was asked about. Only where chunks were agreed on; at least one
    /// extent.
    pub fn block_status(self, out: &mut Vec<u8>, asked: Asked, extents: &[Extent]) {
        let flags = |extent: &Extent| match extent.allocation {
            Allocation::Data => 0,
            Allocation::Zero => STATE_ZERO,
            Allocation::Hole => STATE_HOLE | STATE_ZERO,
        };
        let count = extents.len() as u64;
        if self.0 == ReplyStyle::Extended {
            self.chunk(out, chunk::BLOCK_STATUS_EXT, asked, 8 + 16 * count);
            out.extend(BASE_ALLOCATION_ID.to_be_bytes());
            out.extend((count as u32).to_be_bytes());
            for extent in extents {
                out.extend(extent.length.to_be_bytes());
                out.extend(u64::from(flags(extent)).to_be_bytes());
            }
        } else {
            self.chunk(out, chunk::BLOCK_STATUS, asked, 4 + 8 * count);
            out.extend(BASE_ALLOCATION_ID.to_be_bytes());
            for extent in extents {
                // What was asked about has a length of 32 bits, so its parts do.
                out.extend((extent.length as u32).to_be_bytes());
                out.extend(flags(extent).to_be_bytes());
            }
        }
    }

    /// The header of the only chunk of a reply.
    fn chunk(self, out: &mut Vec<u8>, kind: u16, asked: Asked, length: u64) {
        let is_extended = self.0 == ReplyStyle::Extended;
        let magic = if is_extended { MAGIC_REPLY_EXTENDED } else { MAGIC_REPLY_STRUCTURED };
        out.extend(magic.to_be_bytes());
        out.extend(chunk::FLAG_DONE.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(asked.cookie.to_be_bytes());
        if is_extended {
            out.extend(asked.offset.to_be_bytes());
            out.extend(length.to_be_bytes());
        } else {
            out.extend((length as u32).to_be_bytes());
        }
    }
}

fn simple(out: &mut Vec<u8>, error: u32, asked: Asked) {
    out.extend(MAGIC_REPLY_SIMPLE.to_be_bytes());
    out.extend(error.to_be_bytes());
    out.extend(asked.cookie.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Asked = Asked { cookie: 0x0102_0304_0506_0708, offset: 0x1000 };

    fn bytes(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out);
        out
    }

    #[test]
    fn a_simple_reply_has_16_bytes() {
        let replies = Replies(ReplyStyle::Simple);
        let done = bytes(|out| replies.done(out, ASKED));
        assert_eq!(done, *b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08");
        assert_eq!(bytes(|out| replies.read(out, ASKED, 512)), done);
        let error = bytes(|out| replies.error(out, ASKED, ErrorCode::NoSpace, "full"));
        assert_eq!(error, *b"\x67\x44\x66\x98\0\0\0\x1c\x01\x02\x03\x04\x05\x06\x07\x08");
    }

    #[test]
    fn a_structured_reply_says_how_long_it_is() {
        let replies = Replies(ReplyStyle::Structured);
        let read = bytes(|out| replies.read(out, ASKED, 512));
        assert_eq!(
            read,
            *b"\x66\x8e\x33\xef\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\x02\x08\
               \0\0\0\0\0\0\x10\0"
        );
        let error = bytes(|out| replies.error(out, ASKED, ErrorCode::Io, "no"));
        assert_eq!(error[4..8], *b"\0\x01\x80\x01");
        assert_eq!(error[16..], *b"\0\0\0\x08\0\0\0\x05\0\x02no");
        let extents = [Extent { length: 512, allocation: Allocation::Hole }];
        let status = bytes(|out| replies.block_status(out, ASKED, &extents));
        assert_eq!(status[16..], *b"\0\0\0\x0c\0\0\0\x01\0\0\x02\0\0\0\0\x03");
    }

    #[test]
    fn an_extended_reply_repeats_the_offset_and_has_long_numbers() {
        let replies = Replies(ReplyStyle::Extended);
        let done = bytes(|out| replies.done(out, ASKED));
        assert_eq!(
            done,
            *b"\x6e\x8a\x27\x8c\0\x01\0\0\x01\x02\x03\x04\x05\x06\x07\x08\
               \0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0"
        );
        let extents = [Extent { length: 1 << 40, allocation: Allocation::Zero }];
        let status = bytes(|out| replies.block_status(out, ASKED, &extents));
        assert_eq!(status[24..32], *b"\0\0\0\0\0\0\0\x18");
        assert_eq!(status[32..], *b"\0\0\0\x01\0\0\0\x01\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\x02");
    }
}
