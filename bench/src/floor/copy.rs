//! A block from one place of shared memory to another, as the engine copies data for
//! filters that look at it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use upcall_ring::{Access, Buffers, Mapping, memfd};

use crate::measure::Round;

pub const BLOCK: usize = 4096;

/// Copies blocks about in `bytes` of memory: two blocks stay in the nearest cache, 64 MiB in
/// none.
pub fn run(bytes: usize, slice: Duration) -> Result<Round, String> {
    let fd = memfd("upcall-bench-copy", bytes).map_err(|error| error.to_string())?;
    let memory =
        Mapping::new(&fd, 0, bytes, Access::ReadWrite).map_err(|error| error.to_string())?;
    let memory = Arc::new(memory);
    let block = |number: usize| Buffers::of(&memory, number * BLOCK, BLOCK, true);
    let blocks: Option<Vec<Buffers>> = (0..bytes / BLOCK).map(block).collect();
    let Some(blocks) = blocks else { return Err("a block is outside its memory".into()) };
    blocks.iter().for_each(|block| block.write(0, &[7; BLOCK]));
    // Steps with no factor in common with the number of blocks visit them all, far apart.
    let (mut at, step) = (0, if blocks.len() > 2 { 4097 } else { 1 });
    let start = Instant::now();
    let mut requests = 0;
    while start.elapsed() < slice {
        for _ in 0..200 {
            let next = (at + step) % blocks.len();
            blocks[at].copy_to(&blocks[next]);
            at = next;
        }
        requests += 200;
    }
    Ok(Round { requests, elapsed: start.elapsed(), ..Round::default() })
}
