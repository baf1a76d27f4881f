//! A guest's memory made of the input: rings, descriptors, indirect tables and headers are
//! whatever the bytes say. Between steps the guest rewrites some of it.
//!
//! Always true, whatever the bytes: nothing panics; what a request points to lies in the
//! guest's memory and is exactly as long as its range; no tag is handed out twice; each
//! completion adds one used entry, whose length is not more than was written.
//!
//! Rings may be packed. There may be an in-flight region, of the input too, and the worker
//! may die and find it again.
#![no_main]

use std::collections::HashMap;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use upcall_block::{Errno, Op, Request, RequestQueue, Tag};
use upcall_vhost::mock::{Device, Driver, InflightFile, Memory, PackedDriver};
use upcall_vhost::{GuestMemory, VirtQueue};

/// Small addresses, so that bytes of the input often are ones that exist.
const BASE: u64 = 0x1000;
const LENGTH: usize = 0x3000;
/// What the driver's three parts take up of it, at least.
const RING_SIZE: u16 = 8;
const CAPACITY: u64 = 64 << 10;

/// The rest of the input, byte by byte.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }
}

fuzz_target!(|bytes: &[u8]| {
    let _ = run(Input(bytes));
});

fn run(mut input: Input<'_>) -> Option<()> {
    let flags = input.byte()?;
    // Bit 0: a packed ring; 1: an in-flight region; 2 and 3: that of the input is put there
    // before the first worker, before later ones.
    let more = if flags & 8 != 0 { input.byte()? } else { 0 };
    let (packed, tracked) = (more & 1 != 0, more & 2 != 0);
    let memory = Arc::new(Memory::at(BASE, LENGTH));
    let split_driver = Driver::new(memory.clone(), RING_SIZE, flags & 1 != 0, 0);
    let packed_driver = PackedDriver::new(memory.clone(), RING_SIZE, flags & 1 != 0);
    let region = memory.region();
    let mut device = Device::with_capacity(CAPACITY, GuestMemory::new([region.clone()]).ok()?);
    let file = InflightFile::new(RING_SIZE, packed);
    if tracked {
        if more & 4 != 0 {
            bend(&file, &mut input)?;
        }
        device.track(&file);
    }
    let start = |device: &Device| {
        if packed {
            device.try_packed_queue(&packed_driver, 0x8000, flags & 4 != 0)
        } else {
            device.try_queue(&split_driver, flags & 4 != 0)
        }
    };
    device.set_flush_negotiated(flags & 2 != 0);
    // The image: what follows lands at the start, where the ring's parts are.
    let image = input.0.len().min(LENGTH).min(usize::from(flags >> 4) * 64 + 256);
    memory.write(BASE, &input.0[..image]);
    input.0 = &input.0[image..];

    let mut queue = start(&device)?;
    let mut in_flight = HashMap::new();
    let mut requests = Vec::new();
    for _ in 0..64 {
        let Some(step) = input.byte() else { break };
        match step % 8 {
            0 | 1 => {
                let _ = queue.take(usize::from(step >> 3), &mut requests);
                for request in requests.drain(..) {
                    check(&request, &region);
                    assert!(in_flight.insert(request.tag, request).is_none(), "a tag twice");
                }
            }
            2 | 3 => complete_one(&mut queue, &mut in_flight, step),
            4 => queue.publish(),
            5 if tracked && step & 8 != 0 => {
                // The worker dies, and with it what it knew.
                in_flight.clear();
                if more & 8 != 0 {
                    bend(&file, &mut input)?;
                }
                queue = start(&device)?;
            }
            5 => {
                if queue.before_sleep() {
                    queue.after_sleep();
                }
            }
            6 => {
                // Makes more available, so that long runs happen.
                let at = split_driver.available_index();
                memory.store(at, memory.load(at).wrapping_add(u16::from(step >> 5)));
            }
            _ => {
                let at = u64::from(input.u16()?) % (LENGTH as u64 - 2) / 2 * 2;
                memory.store(BASE + at, input.u16()?);
            }
        }
        assert_eq!(queue.in_flight(), in_flight.len());
    }
    while !in_flight.is_empty() {
        complete_one(&mut queue, &mut in_flight, 0);
    }
    queue.finish();
    Some(())
}

/// Overwrites some bytes of the in-flight region.
fn bend(file: &InflightFile, input: &mut Input<'_>) -> Option<()> {
    let at = usize::from(input.byte()?) * 2 % file.length();
    let length = usize::from(input.byte()?).min(input.0.len()).min(file.length() - at);
    file.write(at, &input.0[..length]);
    input.0 = &input.0[length..];
    Some(())
}

fn check(request: &Request, region: &upcall_vhost::Region) {
    let length = request.range.length() as usize;
    assert!(request.range.offset() + u64::from(request.range.length()) <= CAPACITY);
    assert_eq!(request.data.len(), if request.op.has_data() { length } else { 0 });
    let pieces = request.data.addresses();
    let total: usize = pieces.map(|(_, length)| length).sum();
    assert_eq!(total, request.data.len());
    for (at, length) in request.data.addresses() {
        let offset = Memory::offset_of(region, at).expect("a piece outside the guest's memory");
        assert!(offset + length <= LENGTH, "a piece beyond the guest's memory");
    }
}

fn complete_one(queue: &mut VirtQueue, in_flight: &mut HashMap<Tag, Request>, step: u8) {
    let Some(tag) = in_flight.keys().min_by_key(|tag| tag.0 ^ u32::from(step >> 4)).copied() else {
        return;
    };
    let Some(request) = in_flight.remove(&tag) else { return };
    let status = if step & 8 == 0 { Ok(()) } else { Err(Errno::EIO) };
    if request.op == Op::Read && status.is_ok() {
        request.data.zero();
    }
    queue.complete(tag, status);
}
