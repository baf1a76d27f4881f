//! `@NAME@`: a filter for Upcall.
//!
//! It watches every request of a disk and counts those that failed; and, if told so, it
//! refuses to write to the first bytes of the disk. Begin here and make it yours: the
//! documentation of `upcall_sdk` says what else there is (`cargo doc --open`).

use upcall_sdk::{
    Class, Completion, Counter, Errno, Filter, Info, Instance, Op, OpSet, Param, Request, Verdict,
    export_filter,
};

/// One instance: this filter on one disk. Callbacks come from several threads at once.
struct @TYPE@ {
    /// Bytes at the start of the disk that must not be changed.
    protect: u64,
    // Counters: `upcall top` shows them.
    requests: Counter,
    failed: Counter,
}

impl Filter for @TYPE@ {
    /// `ops` says which requests come to us. We do not ask to see data (`sees`), so no data
    /// is mapped into our process; nor do we change any (`changes`).
    const INFO: Info = Info {
        name: c"@NAME@",
        version: c"0.1.0",
        vendor: c"",
        summary: c"Counts requests, and protects the start of a disk",
        class: Class::Inspection,
        ops: OpSet::ALL,
        ..Info::NEW
    };

    const PARAMS: &'static [Param] = &[Param::size(
        c"protect",
        c"Bytes at the start of the disk that must not be changed.",
        Some(c"0"),
        0,
        i64::MAX,
    )];

    /// What a request carries from `start_io` to `io_done`: nothing yet.
    type Context = ();

    fn open(instance: Instance) -> Result<Self, Errno> {
        Ok(@TYPE@ {
            protect: instance.param_int(c"protect") as u64,
            requests: instance.counter(c"requests"),
            failed: instance.counter(c"failed"),
        })
    }

    /// A request on its way down: from the guest towards the disk.
    fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> {
        self.requests.add(1);
        let changes = !matches!(request.op(), Op::Read | Op::Flush);
        if changes && request.offset() < self.protect {
            return request.fail(Errno::EROFS);
        }
        // Call `io_done` when it is done. `request.pass()` would be the end of it for us.
        request.watch(())
    }

    /// The same request on its way up, done or failed.
    fn io_done<'a>(&self, completion: Completion<'a, Self>) -> Verdict<'a> {
        if completion.status().is_err() {
            self.failed.add(1);
        }
        completion.pass()
    }
}

export_filter!(@TYPE@);

#[cfg(test)]
mod tests {
    use super::*;
    use upcall_sdk::testing::Host;

    #[test]
    fn what_is_written_is_stored() {
        let mut host = Host::<@TYPE@>::builder().disk(1 << 20).open().unwrap();
        let id = host.write(4096, &[7; 512]);
        assert_eq!(host.run(id), Ok(()));
        assert_eq!(host.stored(0)[4096..4608], [7; 512]);
    }
}
