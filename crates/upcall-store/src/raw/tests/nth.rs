//! Every call of a workload fails once: the first, the second, and so on until none is left.
//! What the store then says must be true of the image.

use std::sync::Mutex;
use std::time::Instant;

use upcall_block::Errno;

use super::*;

const CAPACITY: usize = 1 << 20;

/// A request of the workload; numbers in bytes.
#[derive(Clone, Copy, Debug)]
struct Step {
    op: Op,
    at: usize,
    length: usize,
    flags: RequestFlags,
}

/// Small and large, aligned and not (in memory: the bounce), in one call and in several.
fn workload() -> Vec<Step> {
    let step = |op, at, length, flags| Step { op, at, length, flags };
    vec![
        step(Op::Write, 0, 4096, PLAIN),
        step(Op::Write, 8192, 65536, PLAIN),
        step(Op::Flush, 0, 0, PLAIN),
        step(Op::Write, 4096, 512, FUA),
        step(Op::Read, 0, 16384, PLAIN),
        step(Op::WriteZeroes, 16384, 32768, UNMAP),
        step(Op::WriteZeroes, 60 << 10, 8192, PLAIN),
        step(Op::Discard, 0, 4096, PLAIN),
        step(Op::Read, 0, 80 << 10, PLAIN),
        step(Op::Write, 512, 1024, PLAIN),
        step(Op::Flush, 0, 0, PLAIN),
        step(Op::Read, 512, 1024, PLAIN),
    ]
}

/// What each byte may be: one value, or also another one where a request failed.
struct Model {
    certain: Vec<u8>,
    perhaps: Vec<Option<u8>>,
}

impl Model {
    fn new() -> Model {
        Model { certain: vec![0; CAPACITY], perhaps: vec![None; CAPACITY] }
    }

    fn put(&mut self, step: Step, value: u8, status: Status) {
        for at in step.at..step.at + step.length {
            match status {
                Ok(()) => (self.certain[at], self.perhaps[at]) = (value, None),
                Err(_) => self.perhaps[at] = Some(value),
            }
        }
    }

    fn allows(&self, at: usize, byte: u8) -> bool {
        self.certain[at] == byte || self.perhaps[at] == Some(byte)
    }
}

/// Runs the workload with call number `nth` failing; returns whether there was one.
fn run_with_failure(engine: Engine, direct: bool, nth: usize, errno: i32) -> bool {
    let dir = TempDir::new();
    let path = dir.image(CAPACITY as u64);
    let calls = Arc::new(Mutex::new((0, None)));
    let counted = calls.clone();
    let tap: Tap = Arc::new(move |call| {
        let mut calls = counted.lock().unwrap();
        calls.0 += 1;
        if calls.0 != nth {
            return Answer::Make;
        }
        calls.1 = Some(call);
        Answer::Result(-errno)
    });
    let mut disk = Disk::new(open_tapped(options(&path, engine, direct), tap));
    let block = disk.store.info().block_size as usize;
    let mut model = Model::new();
    let mut failed = Vec::new();
    for (number, step) in workload().into_iter().enumerate() {
        if step.at % block != 0 || step.length % block != 0 {
            continue;
        }
        let value = number as u8 + 1;
        let status = match step.op {
            Op::Write => disk.write_flagged(step.at as u64, &vec![value; step.length], step.flags),
            Op::Read => disk.read(step.at as u64, step.length).map(|bytes| {
                let wrong = (0..step.length).find(|i| !model.allows(step.at + i, bytes[*i]));
                assert_eq!(wrong, None, "call {nth}, {step:?} read what was never written");
            }),
            op => disk.run(op, step.at as u64, step.length as u64, step.flags),
        };
        match step.op {
            Op::Write => model.put(step, value, status),
            Op::Discard | Op::WriteZeroes => model.put(step, 0, status),
            Op::Read | Op::Flush => {}
        }
        if status.is_err() {
            failed.push((step, status));
        }
    }
    let (count, hit) = *calls.lock().unwrap();
    let poisoned = disk.store.failure().is_some();
    match hit {
        None => assert!(failed.is_empty() && !poisoned, "nothing failed, yet {failed:?}"),
        // What is not durable cannot be known, so all that writes is refused from then on.
        Some(Call::Sync) => {
            assert!(poisoned && !failed.is_empty(), "call {nth}: a failed sync was forgotten");
            assert!(failed.iter().all(|(step, _)| step.op != Op::Read), "reads go on");
            assert_eq!(disk.flush(), Err(Errno::EIO));
        }
        Some(call) => {
            assert!(!poisoned, "call {nth}, {call:?}: only a sync poisons");
            assert!(failed.len() <= 1, "call {nth}, {call:?} failed {failed:?}");
            // Giving space back, and what can be done in another way, may do without a call.
            let optional = matches!(call, Call::Allocate { .. });
            assert!(optional || failed.len() == 1, "call {nth}, {call:?}: an error was swallowed");
        }
    }
    drop(disk);
    let image = std::fs::read(&path).unwrap();
    let wrong = (0..CAPACITY).find(|at| !model.allows(*at, image[*at]));
    assert_eq!(wrong, None, "call {nth} of {count}, {hit:?}: the image is not what was promised");
    hit.is_some()
}

#[test]
fn each_call_may_fail_once_and_what_the_store_says_is_true() {
    let start = Instant::now();
    let mut count = 0;
    for engine in ENGINES {
        for direct in [true, false] {
            for errno in [libc::EIO, libc::ENOSPC] {
                let failures =
                    (1..).take_while(|nth| run_with_failure(engine, direct, *nth, errno));
                let failures = failures.count();
                assert!(failures > 8, "{engine:?}: the workload makes {failures} calls");
                count += failures;
            }
        }
    }
    println!(
        "ledger: {{\"kind\":\"store-nth-call\",\"faults\":{count},\"seconds\":{},\"result\":\"ok\"}}",
        start.elapsed().as_secs()
    );
}
