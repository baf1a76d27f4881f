//! From pieces of memory to a block request.
//!
//! The layout is free (as VERSION_1 has it): header and data are the readable bytes in
//! their order, data and status the writable ones, however they are cut into descriptors.
//! The status is the last writable byte. What can be answered at once, is: errors of the
//! request, the serial number, and what moves nothing.

use upcall_block::{DATA_LENGTH_MAX, Op, Range, RequestFlags};
use upcall_ring::Buffers;

use crate::chain::{Chain, Piece, part, total};
use crate::config::BlkConfig;
use crate::memory::{GuestMemory, Place};
use crate::virtio::*;

/// Most pieces of the data of one request: as many as one system call takes.
const DATA_PIECES_MAX: usize = 1024;

/// A chain without memory for a status byte. Cannot be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a request without room for its status")]
pub struct NoStatus;

/// A chain that can be answered.
#[derive(Debug)]
pub struct Parsed {
    /// Where the status goes.
    pub status: Place,
    pub body: Body,
}

/// What a chain asks for.
#[derive(Debug)]
pub enum Body {
    /// Work for others. `data` has exactly `range.length()` bytes if `op` has data.
    Request { op: Op, range: Range, flags: RequestFlags, data: Buffers },
    /// Ended: the status byte, and how many bytes were written before it.
    Answer { status: u8, written: u32 },
}

impl Body {
    const OK: Body = Body::Answer { status: S_OK, written: 0 };
    const IOERR: Body = Body::Answer { status: S_IOERR, written: 0 };
    const UNSUPP: Body = Body::Answer { status: S_UNSUPP, written: 0 };
}

/// What a request is checked against.
pub struct Parser<'a> {
    pub config: &'a BlkConfig,
    pub memory: &'a GuestMemory,
    /// Modifications are durable before they complete.
    pub write_through: bool,
}

impl Parser<'_> {
    /// Says what `chain` asks for.
    #[inline]
    pub fn parse(&self, chain: &Chain) -> Result<Parsed, NoStatus> {
        let status = self.status_place(chain.writable()).ok_or(NoStatus)?;
        let body = self.body(chain).unwrap_or(Body::IOERR);
        Ok(Parsed { status, body })
    }

    /// The last writable byte.
    fn status_place(&self, writable: &[Piece]) -> Option<Place> {
        let Piece { address, length } = writable.last()?;
        self.memory.byte(address.checked_add(u64::from(*length) - 1)?)
    }

    /// `None`: no header, or memory that does not exist.
    #[inline]
    fn body(&self, chain: &Chain) -> Option<Body> {
        let readable = chain.readable();
        let out_length = total(readable).checked_sub(HEADER_SIZE as u64)?;
        let in_length = total(chain.writable()) - 1;
        let mut header = [0; HEADER_SIZE];
        self.read(readable, 0, &mut header)?;
        let kind = number_u32(&header, 0);
        let sector = number_u64(&header, 8);
        match kind {
            T_IN => self.read_or_write(Op::Read, sector, chain.writable(), 0, in_length),
            T_OUT => {
                self.read_or_write(Op::Write, sector, readable, HEADER_SIZE as u64, out_length)
            }
            T_FLUSH => Some(self.flush()),
            T_GET_ID => self.get_id(chain.writable(), in_length),
            T_DISCARD => self.segment(Op::Discard, readable, out_length),
            T_WRITE_ZEROES => self.segment(Op::WriteZeroes, readable, out_length),
            _ => Some(Body::UNSUPP),
        }
    }

    /// Whether the disk does `op` now; else how it is refused.
    fn refusal(&self, op: Op) -> Option<Body> {
        let info = self.config.info();
        if info.read_only && op == Op::Write {
            // Also where the store has no writes to offer (virtio 1.2, 5.2.6.2).
            Some(Body::IOERR)
        } else if !info.ops.contains(op) {
            Some(Body::UNSUPP)
        } else if info.read_only && op.is_modification() {
            Some(Body::IOERR)
        } else {
            None
        }
    }

    /// The range of `length` bytes at `sector`.
    #[inline]
    fn range(&self, sector: u64, length: u64) -> Option<Range> {
        self.config.range(sector.checked_mul(SECTOR_SIZE)?, length).ok()
    }

    #[inline]
    fn read_or_write(
        &self,
        op: Op,
        sector: u64,
        pieces: &[Piece],
        skip: u64,
        length: u64,
    ) -> Option<Body> {
        if let Some(refused) = self.refusal(op) {
            return Some(refused);
        }
        if length > u64::from(DATA_LENGTH_MAX) {
            return None;
        }
        let range = self.range(sector, length)?;
        if length == 0 {
            return Some(Body::OK);
        }
        let mut data = Buffers::new();
        for (address, length) in part(pieces, skip, length) {
            if !self.memory.push(address, length, op == Op::Read, &mut data) {
                return None;
            }
        }
        if data.segment_count() > DATA_PIECES_MAX {
            return None;
        }
        debug_assert_eq!(data.len() as u64, length);
        let flags =
            RequestFlags { fua: self.write_through && op == Op::Write, ..RequestFlags::default() };
        Some(Body::Request { op, range, flags, data })
    }

    fn flush(&self) -> Body {
        let (op, range) = (Op::Flush, Range::EMPTY);
        let request =
            Body::Request { op, range, flags: RequestFlags::default(), data: Buffers::new() };
        self.refusal(op).unwrap_or(request)
    }

    /// The serial number, as much of it as there is room for.
    fn get_id(&self, writable: &[Piece], in_length: u64) -> Option<Body> {
        let length = in_length.min(ID_SIZE as u64);
        let mut target = Buffers::new();
        for (address, length) in part(writable, 0, length) {
            if !self.memory.push(address, length, true, &mut target) {
                return None;
            }
        }
        target.write(0, &self.config.serial()[..target.len()]);
        Some(Body::Answer { status: S_OK, written: target.len() as u32 })
    }

    /// Discard and write-zeroes: one segment says where.
    fn segment(&self, op: Op, readable: &[Piece], out_length: u64) -> Option<Body> {
        if let Some(refused) = self.refusal(op) {
            return Some(refused);
        }
        if out_length == 0 || !out_length.is_multiple_of(SEGMENT_SIZE) {
            return None;
        }
        if out_length > SEGMENT_SIZE {
            // The configuration space says one at the most.
            return Some(Body::UNSUPP);
        }
        let mut segment = [0; SEGMENT_SIZE as usize];
        self.read(readable, HEADER_SIZE as u64, &mut segment)?;
        let (sector, sectors) = (number_u64(&segment, 0), number_u32(&segment, 8));
        let flags = number_u32(&segment, 12);
        let known = if op == Op::WriteZeroes { SEGMENT_UNMAP } else { 0 };
        if flags & !known != 0 {
            return Some(Body::UNSUPP);
        }
        let range = self.range(sector, u64::from(sectors) * SECTOR_SIZE)?;
        if range.length() == 0 {
            return Some(Body::OK);
        }
        let flags = RequestFlags {
            fua: self.write_through,
            unmap: flags & SEGMENT_UNMAP != 0,
            ..RequestFlags::default()
        };
        Some(Body::Request { op, range, flags, data: Buffers::new() })
    }

    /// Copies bytes of `pieces` from `skip` on; the caller knows that there are enough.
    fn read(&self, pieces: &[Piece], skip: u64, into: &mut [u8]) -> Option<()> {
        let mut done = 0;
        for (address, length) in part(pieces, skip, into.len() as u64) {
            let length = length as usize;
            self.memory.read(address, &mut into[done..done + length])?;
            done += length;
        }
        debug_assert_eq!(done, into.len());
        Some(())
    }
}

fn number_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn number_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}
