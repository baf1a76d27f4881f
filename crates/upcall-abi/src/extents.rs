//! The socket on which an instance asks what its disks consist of.
//!
//! A Unix `SOCK_SEQPACKET` pair, one for each instance that asks. A question is one packet of
//! [`QUESTION_SIZE`] bytes: u64 number, u64 offset, u64 length, u32 disk (as in an issued
//! request), u32 the most extents. Its answer is one packet: u64 number of the question, u32 count,
//! u32 0, and `count` extents of [`EXTENT_SIZE`] bytes: u64 length, u32 kind, u32 0. A count of 0
//! says that nobody knows.

/// Bytes of a question.
pub const QUESTION_SIZE: usize = 32;
/// Bytes of each extent in an answer.
pub const EXTENT_SIZE: usize = 16;
/// Most extents in an answer.
pub const EXTENTS_MAX: usize = 1024;
