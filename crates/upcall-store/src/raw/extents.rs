//! Which parts of an image are holes: SEEK_DATA and SEEK_HOLE, in whole blocks of the disk.
//!
//! Always true: what is called a hole reads as zeroes. A block that is partly data is data.
//! The descriptor's position is moved, which nothing else uses.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno as Raw;
use upcall_block::{Allocation, DiskInfo, Extent};

/// See [`Store::extents`](upcall_block::Store::extents).
pub(crate) fn find(
    file: impl AsFd,
    info: &DiskInfo,
    offset: u64,
    length: u64,
    max: usize,
) -> io::Result<Vec<Extent>> {
    let block = u64::from(info.block_size);
    let end = (offset + length).min(info.capacity);
    let seek = |to| match rustix::fs::seek(&file, to) {
        Ok(found) => Ok(found),
        // Nothing of that kind from there to the end.
        Err(Raw::NXIO) => Ok(end),
        Err(error) => Err(error),
    };
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = offset;
    while at < end && extents.len() < max {
        let found = seek(SeekFrom::Data(at))
            .and_then(|data| Ok((data, seek(SeekFrom::Hole(data.max(at)))?)));
        let (data, hole) = match found {
            Ok((data, hole)) => (data.clamp(at, end), hole.clamp(at, end)),
            // A file system that cannot tell.
            Err(Raw::INVAL | Raw::OPNOTSUPP) => (at, end),
            Err(error) => return Err(error.into()),
        };
        // Rounded so that a block in both is data. A hole shorter than a block is none.
        let data = (data / block * block).max(at);
        let hole = hole.max(data).next_multiple_of(block).min(end);
        let (until, allocation) = if data > at {
            (data, Allocation::Hole)
        } else {
            (if hole > at { hole } else { end }, Allocation::Data)
        };
        at = push(&mut extents, at, until, allocation);
    }
    Ok(extents)
}

/// Adds a stretch, joined to the one before it if that is of its kind; returns its end.
fn push(extents: &mut Vec<Extent>, at: u64, until: u64, allocation: Allocation) -> u64 {
    match extents.last_mut() {
        Some(last) if last.allocation == allocation => last.length += until - at,
        _ => extents.push(Extent { length: until - at, allocation }),
    }
    until
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use upcall_block::OpSet;

    use super::*;

    fn sparse(name: &str) -> File {
        let path =
            std::env::temp_dir().join(format!("upcall-extents-{name}-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file
    }

    fn disk(capacity: u64, block_size: u32) -> DiskInfo {
        DiskInfo {
            capacity,
            block_size,
            physical_block_size: 4096,
            read_only: false,
            ops: OpSet::ALL,
            discard_granularity: 4096,
        }
    }

    #[test]
    fn holes_and_data_are_told_apart_and_cover_the_range_in_order() {
        const M: u64 = 1 << 20;
        let file = sparse("order");
        file.set_len(8 * M).unwrap();
        file.write_all_at(&[1; 65536], 2 * M).unwrap();
        file.write_all_at(&[1; 65536], 7 * M).unwrap();
        let info = disk(8 * M, 512);
        let all = find(&file, &info, 0, 8 * M, 100).unwrap();
        assert_eq!(all.iter().map(|extent| extent.length).sum::<u64>(), 8 * M);
        let kind = |at: u64| find(&file, &info, at, 512, 100).unwrap()[0].allocation;
        assert_eq!(kind(2 * M), Allocation::Data);
        assert_eq!(kind(7 * M + 65536 - 512), Allocation::Data);
        assert_eq!(kind(0), Allocation::Hole, "a temporary folder without sparse files?");
        assert_eq!(kind(5 * M), Allocation::Hole);
        assert_eq!(find(&file, &info, 0, 8 * M, 1).unwrap().len(), 1);
        assert!(all.windows(2).all(|pair| pair[0].allocation != pair[1].allocation));
        let part = find(&file, &info, 2 * M + 512, 1024, 100).unwrap();
        assert_eq!(part, [Extent { length: 1024, allocation: Allocation::Data }]);
    }

    #[test]
    fn a_file_without_data_is_one_hole_and_an_end_in_mid_block_is_data() {
        let file = sparse("hole");
        file.set_len(1 << 20).unwrap();
        let hole = find(&file, &disk(1 << 20, 4096), 4096, 8192, 100).unwrap();
        assert_eq!(hole, [Extent { length: 8192, allocation: Allocation::Hole }]);
        // One byte of data makes its whole block data, whatever the block is.
        file.write_all_at(&[1], 300_000).unwrap();
        for extent in find(&file, &disk(1 << 20, 4096), 0, 1 << 20, 100).unwrap() {
            assert!(extent.length.is_multiple_of(4096) && extent.length > 0);
        }
        let at = 300_000 / 4096 * 4096;
        let data = find(&file, &disk(1 << 20, 4096), at, 4096, 100).unwrap();
        assert_eq!(data, [Extent { length: 4096, allocation: Allocation::Data }]);
    }
}
