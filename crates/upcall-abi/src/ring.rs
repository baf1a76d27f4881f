//! A channel: a submission ring (worker to filter host), a completion ring (back), and
//! the few words by which the sides wait for each other.
//!
//! A channel belongs to one filter host and one queue thread of the worker. Each ring has
//! one producer and one consumer. The channel is one memfd, made and sealed against
//! resizing by the worker:
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 8 | [`MAGIC`] |
//! | 8 | 4 | [`crate::WIRE_VERSION`] |
//! | 12 | 4 | `entries`: of each ring; a power of two, at most [`ENTRIES_MAX`] |
//! | 64 | 4 | `submission_sleeping`: 1 while the filter host sleeps; written by both |
//! | 128 | 4 | `completion_sleeping`: 1 while the worker sleeps; written by both |
//! | 192 | 4 | `submission_head`: position up to which the filter host has taken entries |
//! | 256 | 4 | `completion_head`: position up to which the worker has taken entries |
//! | 4096 | 64 × entries | submission ring |
//! | 4096 + 64 × entries | 64 × entries | completion ring |
//!
//! **Positions** count entries from 0 and wrap at 2³². The entry of position `p` is at
//! index `p % entries`. It is ready for the consumer when its `seq` is `p + 1` (so a
//! zeroed ring is empty); the producer writes the other words first and `seq` last, with
//! release; the consumer reads `seq` with acquire. The producer may use position `p` when
//! `p - head < entries`, `head` read with acquire.
//!
//! **Sleeping**: a consumer that found nothing stores 1 in its `sleeping` word, fences
//! (sequentially consistent), looks once more, and blocks on its doorbell (an eventfd).
//! A producer fences after it published, and if `sleeping` is 1 swaps it with 0 and rings.
//!
//! Everything is in the machine's byte order; both sides are on one machine.

/// `"UPCLRING"` as a little-endian number.
pub const MAGIC: u64 = u64::from_le_bytes(*b"UPCLRING");
/// Bytes of an entry of either ring: one cache line.
pub const ENTRY_SIZE: usize = 64;
/// Where the rings begin.
pub const RINGS_OFFSET: usize = 4096;
/// Most entries of a ring.
pub const ENTRIES_MAX: u32 = 4096;
/// Offset of `entries`.
pub const ENTRIES_OFFSET: usize = 12;
/// Offset of `submission_sleeping`.
pub const SUBMISSION_SLEEPING_OFFSET: usize = 64;
/// Offset of `completion_sleeping`.
pub const COMPLETION_SLEEPING_OFFSET: usize = 128;
/// Offset of `submission_head`.
pub const SUBMISSION_HEAD_OFFSET: usize = 192;
/// Offset of `completion_head`.
pub const COMPLETION_HEAD_OFFSET: usize = 256;

/// Size of a channel's memfd, bytes.
pub const fn channel_size(entries: u32) -> usize {
    RINGS_OFFSET + 2 * ENTRY_SIZE * entries as usize
}

/// `data` of an entry without data.
pub const NO_DATA: u64 = u64::MAX;

/// What a [`Submission`] says.
pub mod submission_kind {
    /// `start_io`: answer with a verdict. `token` names the delivery.
    pub const START: u8 = 1;
    /// `io_done`: likewise; `status` and `cookie` count.
    pub const DONE: u8 = 2;
    /// `cancel` of the held delivery `token`, whose cookie is `cookie`. No answer of its own.
    pub const CANCEL: u8 = 3;
    /// The issued request whose cookie was `token` ended with `status`. No answer.
    pub const ISSUED: u8 = 4;
}

/// What a [`Completion`] says.
pub mod completion_kind {
    /// The verdict on delivery `token`.
    pub const VERDICT: u8 = 1;
    /// A request of the filter's own; `token` is its cookie.
    pub const ISSUE: u8 = 2;
    /// The filter holds delivery `token` and has stored `cookie` in its context. Sent
    /// once for each HOLD, so that a later cancel can carry the cookie.
    pub const HELD: u8 = 3;
}

/// An entry of the submission ring. 64 bytes; every word naturally aligned.
///
/// | offset | 0 | 4 | 5 | 6 | 8 | 16 | 24 | 28 | 32 | 40 | 48 | 52 | 56 |
/// |---|---|---|---|---|---|---|---|---|---|---|---|---|---|
/// | | seq | kind | op | flags | token | offset | length | status | data | cookie | instance | disk | reserved |
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Submission {
    /// Position + 1; written last.
    pub seq: u32,
    /// [`submission_kind`].
    pub kind: u8,
    /// [`crate::filter::op`].
    pub op: u8,
    /// [`crate::filter::request_flag`].
    pub flags: u16,
    /// The worker's name for this delivery; the filter host only echoes it.
    pub token: u64,
    /// Bytes from the start of the disk.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
    /// 0 or a negative errno.
    pub status: i32,
    /// Where the data is in the disk's arena, or [`NO_DATA`].
    pub data: u64,
    /// What the filter stored in the request's context.
    pub cookie: u64,
    /// Number of the instance, as given when it was opened.
    pub instance: u32,
    /// 0.
    pub disk: u32,
    /// 0.
    pub reserved: u64,
}

/// An entry of the completion ring. Hostile: see `upcall-worker`'s `verdicts` for the
/// checks. Same layout as [`Submission`].
///
/// | offset | 0 | 4 | 5 | 6 | 8 | 16 | 24 | 28 | 32 | 40 | 48 | 52 | 56 |
/// |---|---|---|---|---|---|---|---|---|---|---|---|---|---|
/// | | seq | kind | code | flags | token | offset | length | status | data | cookie | instance | disk | reserved |
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Position + 1; written last.
    pub seq: u32,
    /// [`completion_kind`].
    pub kind: u8,
    /// VERDICT: [`crate::filter::verdict`]; ISSUE: [`crate::filter::op`].
    pub code: u8,
    /// ISSUE: [`crate::filter::request_flag`].
    pub flags: u16,
    /// VERDICT, HELD: the delivery; ISSUE: the filter host's name for the request.
    pub token: u64,
    /// ISSUE: bytes from the start of the disk.
    pub offset: u64,
    /// ISSUE: bytes.
    pub length: u32,
    /// VERDICT: 0 or a negative errno.
    pub status: i32,
    /// ISSUE: where the data is in the filter host's issue arena, or [`NO_DATA`].
    pub data: u64,
    /// VERDICT WATCH, HELD: what the filter stored in the request's context.
    pub cookie: u64,
    /// Number of the instance.
    pub instance: u32,
    /// ISSUE: 0 for the instance's own disk, below it; n for the n-th granted disk.
    pub disk: u32,
    /// 0.
    pub reserved: u64,
}

/// An entry as the eight words in which it crosses shared memory.
pub type Words = [u64; 8];

macro_rules! words {
    ($type:ident, $code:ident) => {
        impl $type {
            /// The entry as words. Word 0 holds `seq` in its low half.
            pub const fn to_words(&self) -> Words {
                [
                    self.seq as u64
                        | (self.kind as u64) << 32
                        | (self.$code as u64) << 40
                        | (self.flags as u64) << 48,
                    self.token,
                    self.offset,
                    self.length as u64 | (self.status as u32 as u64) << 32,
                    self.data,
                    self.cookie,
                    self.instance as u64 | (self.disk as u64) << 32,
                    self.reserved,
                ]
            }

            /// The entry of these words. Any words make an entry; nothing is checked.
            pub const fn from_words(words: &Words) -> Self {
                Self {
                    seq: words[0] as u32,
                    kind: (words[0] >> 32) as u8,
                    $code: (words[0] >> 40) as u8,
                    flags: (words[0] >> 48) as u16,
                    token: words[1],
                    offset: words[2],
                    length: words[3] as u32,
                    status: (words[3] >> 32) as i32,
                    data: words[4],
                    cookie: words[5],
                    instance: words[6] as u32,
                    disk: (words[6] >> 32) as u32,
                    reserved: words[7],
                }
            }
        }
    };
}
words!(Submission, op);
words!(Completion, code);

#[cfg(not(target_endian = "little"))]
compile_error!("entries cross shared memory as words in little-endian order");

const _: () = {
    use core::mem::{align_of, offset_of, size_of};
    assert!(size_of::<Submission>() == ENTRY_SIZE && align_of::<Submission>() == 8);
    assert!(size_of::<Completion>() == ENTRY_SIZE && align_of::<Completion>() == 8);
    assert!(offset_of!(Submission, token) == 8 && offset_of!(Completion, token) == 8);
    assert!(offset_of!(Submission, status) == 28 && offset_of!(Completion, status) == 28);
    assert!(offset_of!(Submission, cookie) == 40 && offset_of!(Completion, cookie) == 40);
    assert!(offset_of!(Submission, disk) == 52 && offset_of!(Completion, disk) == 52);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_survives_its_words() {
        let words =
            [0x0403_0201_0000_0007, 1 << 63, 3, 0xffff_fffb_0000_1000, NO_DATA, 6, 7 << 32 | 8, 9];
        assert_eq!(Submission::from_words(&words).to_words(), words);
        assert_eq!(Completion::from_words(&words).to_words(), words);
        let entry = Completion::from_words(&words);
        assert_eq!((entry.seq, entry.kind, entry.code, entry.flags), (7, 1, 2, 0x0403));
        assert_eq!((entry.length, entry.status, entry.instance, entry.disk), (4096, -5, 8, 7));
    }
}
