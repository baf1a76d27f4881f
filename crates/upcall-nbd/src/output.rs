//! What waits to be sent to a client, in order.
//!
//! Data stays in the connection's own pages until it is copied out for sending; a client
//! that does not read holds those, and a bounded number of bytes beside them, and nothing of
//! anybody else's.

use std::collections::VecDeque;

use upcall_ring::{ArenaSlice, Buffers};

/// Bytes that are copied out at a time.
const CHUNK: usize = 128 << 10;
/// Bytes of replies without their data at which nothing more is asked of the connection.
const WAITING_MAX: usize = 256 << 10;

#[derive(Debug)]
enum Piece {
    Bytes(Vec<u8>),
    /// Data; the pages are given back when it is copied.
    Data {
        buffers: Buffers,
        done: usize,
        slice: ArenaSlice,
    },
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pieces: VecDeque<Piece>,
    /// Bytes in pieces that are no data.
    waiting: usize,
    /// Ready to be sent.
    chunk: Vec<u8>,
    sent: usize,
}

impl Output {
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.sent == self.chunk.len()
    }

    /// Whether so much waits that the client must read first.
    pub fn is_full(&self) -> bool {
        self.waiting >= WAITING_MAX
    }

    /// Appends bytes.
    pub fn write(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        if !matches!(self.pieces.back(), Some(Piece::Bytes(bytes)) if bytes.len() < CHUNK) {
            self.pieces.push_back(Piece::Bytes(Vec::new()));
        }
        if let Some(Piece::Bytes(bytes)) = self.pieces.back_mut() {
            let before = bytes.len();
            write(bytes);
            self.waiting += bytes.len() - before;
        }
    }

    /// Appends data.
    pub fn write_data(&mut self, buffers: Buffers, slice: ArenaSlice) {
        self.pieces.push_back(Piece::Data { buffers, done: 0, slice });
    }

    /// What is to be sent next; empty: nothing. Pages that are done with go to `free`.
    pub fn next(&mut self, free: &mut Vec<ArenaSlice>) -> &[u8] {
        if self.sent == self.chunk.len() {
            self.chunk.clear();
            self.sent = 0;
            self.fill(free);
        }
        &self.chunk[self.sent..]
    }

    fn fill(&mut self, free: &mut Vec<ArenaSlice>) {
        while self.chunk.len() < CHUNK {
            match self.pieces.front_mut() {
                None => break,
                Some(Piece::Bytes(bytes)) => {
                    self.waiting -= bytes.len();
                    self.chunk.append(bytes);
                }
                Some(Piece::Data { buffers, done, .. }) => {
                    let here = (buffers.len() - *done).min(CHUNK);
                    let start = self.chunk.len();
                    self.chunk.resize(start + here, 0);
                    buffers.read(*done, &mut self.chunk[start..]);
                    *done += here;
                    if *done < buffers.len() {
                        break;
                    }
                }
            }
            if let Some(Piece::Data { slice, .. }) = self.pieces.pop_front() {
                free.push(slice);
            }
        }
    }

    /// So many bytes of what [`next`](Self::next) gave were sent.
    pub fn advance(&mut self, count: usize) {
        self.sent += count;
        debug_assert!(self.sent <= self.chunk.len());
        if self.is_empty() {
            // An idle client holds nothing.
            self.chunk = Vec::new();
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use upcall_ring::{Access, Arena, Mapping, memfd};

    use super::*;

    #[test]
    fn everything_is_sent_in_order_and_pages_come_back() {
        let fd = memfd("test", 1 << 20).unwrap();
        let mapping = Mapping::new(&fd, 0, 1 << 20, Access::ReadWrite).unwrap();
        let mut arena = Arena::new(Arc::new(mapping), 0, 1 << 20).unwrap();
        let slice = arena.allocate(300_000).unwrap();
        let buffers = arena.buffers(&slice, 300_000);
        let data: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        buffers.write(0, &data);
        let mut output = Output::default();
        output.write(|out| out.extend(b"head"));
        output.write_data(buffers, slice);
        output.write(|out| out.extend(b"tail"));
        let (mut sent, mut free) = (Vec::<u8>::new(), Vec::new());
        loop {
            let next = output.next(&mut free);
            if next.is_empty() {
                break;
            }
            let count = next.len().min(1000);
            sent.extend(&next[..count]);
            output.advance(count);
        }
        assert!(output.is_empty());
        let expected: Vec<u8> = [&b"head"[..], &data, b"tail"].concat();
        assert!(sent == expected);
        assert_eq!(free.len(), 1);
        free.into_iter().for_each(|slice| arena.free(slice));
        assert_eq!(arena.in_use_pages(), 0);
    }

    #[test]
    fn it_is_full_until_the_client_reads() {
        let (mut output, mut free) = (Output::default(), Vec::new());
        while !output.is_full() {
            output.write(|out| out.extend([0; 1000]));
        }
        let mut left = 0;
        while !output.next(&mut free).is_empty() {
            let count = output.next(&mut free).len();
            left += count;
            output.advance(count);
        }
        assert!(!output.is_full() && left >= WAITING_MAX);
    }
}
