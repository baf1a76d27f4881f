//! A filter that uses each service once; `tests/real_host.rs` runs it in the real filter host.
//!
//! * A write is held, copied to granted disk 1, and then watched.
//! * A read is held for `delay`, then passed.
//! * A flush is held until it is cancelled.
//! * A discard panics.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use upcall_sdk::{
    Class, Completion, Counter, Errno, Filter, Held, HoldId, Info, Instance, Issue, Op, OpSet,
    Param, Request, Timer, Verdict, export_filter, info,
};

struct Rounds {
    instance: Instance,
    held: Arc<Mutex<Waiting>>,
    completed: Counter,
}

/// Held requests; reads with their timers.
type Waiting = HashMap<HoldId, (Held<Rounds>, Option<Timer>)>;

impl Filter for Rounds {
    const INFO: Info = Info {
        name: c"rounds",
        version: c"1.0",
        vendor: c"Example",
        summary: c"Uses each service once",
        class: Class::Replication,
        ops: OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Discard]),
        sees: OpSet::of(&[Op::Write]),
        issues: true,
        ..Info::NEW
    };
    const PARAMS: &'static [Param] =
        &[Param::millis(c"delay", c"How long a read is held.", Some(c"5ms"), 1, 1000)];
    /// Where the write began.
    type Context = u64;

    fn open(instance: Instance) -> Result<Self, Errno> {
        info!(instance, "a disk of {} bytes", instance.disk().capacity);
        let completed = instance.counter(c"completed");
        Ok(Rounds { instance, held: Arc::default(), completed })
    }

    fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> {
        let (held, verdict) = request.hold();
        match held.op() {
            Op::Write => self.copy(held),
            Op::Read => self.delay(held),
            Op::Flush => drop(self.held.lock().unwrap().insert(held.id(), (held, None))),
            _ => panic!("a discard, as the test asked"),
        }
        verdict
    }

    fn io_done<'a>(&self, mut completion: Completion<'a, Self>) -> Verdict<'a> {
        match completion.take_context() {
            Some(offset) if offset == completion.offset() => self.completed.add(1),
            _ => return completion.fail(Errno::EINVAL),
        }
        completion.pass()
    }

    fn cancel(&self, hold: HoldId) {
        let entry = self.held.lock().unwrap().remove(&hold);
        if let Some((held, _timer)) = entry {
            held.fail(Errno::ECANCELED);
        }
    }
}

impl Rounds {
    fn copy(&self, held: Held<Rounds>) {
        let (Some(mut copy), Some(data)) = (self.instance.buffer(held.length()), held.data())
        else {
            return held.fail(Errno::ENOMEM);
        };
        data.copy_to_buffer(&mut copy);
        let offset = held.offset();
        let issue = Issue::write(offset, copy).on_disk(1);
        let issued = self.instance.issue(issue, move |issued| match issued.result {
            Ok(()) => held.watch(offset),
            Err(errno) => held.fail(errno),
        });
        if let Err(refused) = issued {
            refused.finish();
        }
    }

    fn delay(&self, held: Held<Rounds>) {
        let (id, all) = (held.id(), self.held.clone());
        let delay = Duration::from_millis(self.instance.param_int(c"delay") as u64);
        let mut entries = self.held.lock().unwrap();
        let timer = self.instance.timer(delay, None, move || {
            let entry = all.lock().unwrap().remove(&id);
            if let Some((held, _timer)) = entry {
                held.pass();
            }
        });
        match timer {
            Ok(timer) => drop(entries.insert(id, (held, Some(timer)))),
            Err(errno) => held.fail(errno),
        }
    }
}

export_filter!(Rounds);
