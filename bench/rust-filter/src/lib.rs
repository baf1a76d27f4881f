//! A filter that passes every request and looks at nothing: what the Rust kit itself costs.
//! Beside it stands `bench/filters/probe.c`, which does the same in C.

use upcall_sdk::export_filter;
use upcall_sdk::{Class, Errno, Filter, Info, Instance, Op, OpSet, Request, Verdict};

struct Pass;

impl Filter for Pass {
    const INFO: Info = Info {
        name: c"bench-rust",
        version: c"1.0",
        vendor: c"Upcall",
        summary: c"Passes everything, for the benchmark",
        class: Class::Inspection,
        ops: OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes]),
        ..Info::NEW
    };
    type Context = ();

    fn open(_: Instance) -> Result<Self, Errno> {
        Ok(Pass)
    }

    fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> {
        request.pass()
    }
}

export_filter!(Pass);
