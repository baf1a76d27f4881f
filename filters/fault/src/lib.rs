//! The `fault` filter: makes a disk as bad as a test needs it.
//!
//! It fails, delays, loses or tears requests; which ones, module `decision` says. Its class is
//! capture, the one nearest to the store: what it does is what a bad store would do, so
//! everything above it, caches and replication too, must bear it.
//!
//! A lost or torn write is answered with success, so the filter decides what is on the
//! disk, and handles every operation.
#![deny(unsafe_code)]

mod decision;
mod settings;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use upcall_sdk::{
    Class, Counter, Errno, Filter, Held, HoldId, Info, Instance, Issue, Issued, Op, OpSet, Param,
    Request, Timer, Verdict, export_filter, warn,
};

use crate::decision::Subject;
use crate::settings::{Effect, Settings};

/// One bad disk.
struct Fault {
    instance: Instance,
    settings: Settings,
    /// Requests so far.
    requests: AtomicU64,
    delayed: Arc<Delayed>,
    hits: Counter,
    spared: Counter,
}

/// Requests that wait for their time.
type Delayed = Mutex<HashMap<HoldId, (Held<Fault>, Timer)>>;

impl Filter for Fault {
    const INFO: Info = Info {
        name: c"fault",
        version: c"0.1.0",
        vendor: c"Upcall",
        summary: c"Fails, delays, loses or tears requests, for tests",
        class: Class::Capture,
        ops: OpSet::ALL,
        sees: OpSet::of(&[Op::Write]),
        answers: OpSet::of(&[Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes]),
        issues: true,
        ..Info::NEW
    };
    const PARAMS: &'static [Param] = settings::PARAMS;
    type Context = ();

    fn open(instance: Instance) -> Result<Self, Errno> {
        let settings = Settings::read(&instance)?;
        warn!(
            instance,
            "this disk is made bad on purpose: {:?} for {:?}", settings.effect, settings.target
        );
        Ok(Fault {
            settings,
            requests: AtomicU64::new(0),
            delayed: Arc::default(),
            hits: instance.counter(c"hits"),
            spared: instance.counter(c"spared"),
            instance,
        })
    }

    fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> {
        let subject = Subject {
            number: self.requests.fetch_add(1, Ordering::Relaxed),
            op: request.op(),
            offset: request.offset(),
            length: request.length(),
        };
        if !self.settings.target.hits(subject) {
            return request.pass();
        }
        match self.settings.effect {
            Effect::Error(errno) => self.hit(request.fail(errno)),
            Effect::Delay(time) => self.delay(request, time),
            Effect::Lose if subject.op != Op::Read => self.hit(request.done()),
            Effect::Tear if subject.op == Op::Write => self.tear(request, subject),
            Effect::Lose | Effect::Tear => self.spare(request),
        }
    }

    fn cancel(&self, hold: HoldId) {
        // Anything else is a torn write, which is answered when its part is written.
        let entry = lock(&self.delayed).remove(&hold);
        // Not under the lock: dropping the timer may wait for its closure, which takes it.
        if let Some((held, _timer)) = entry {
            held.fail(Errno::ECANCELED);
        }
    }
}

export_filter!(Fault);

impl Fault {
    fn hit<'a>(&self, verdict: Verdict<'a>) -> Verdict<'a> {
        self.hits.add(1);
        verdict
    }

    /// Hit, but the effect cannot be had.
    fn spare<'a>(&self, request: Request<'a, Fault>) -> Verdict<'a> {
        self.spared.add(1);
        request.pass()
    }

    fn delay<'a>(&self, request: Request<'a, Fault>, time: Duration) -> Verdict<'a> {
        let (held, verdict) = request.hold();
        let id = held.id();
        let weak = Arc::downgrade(&self.delayed);
        let mut delayed = lock(&self.delayed); // or the timer might be too early
        let timer = self.instance.timer(time, None, move || {
            let Some(delayed) = weak.upgrade() else { return };
            let entry = lock(&delayed).remove(&id);
            if let Some((held, _timer)) = entry {
                held.pass();
            }
        });
        match timer {
            Ok(timer) => {
                delayed.insert(id, (held, timer));
                self.hit(verdict)
            }
            Err(_) => {
                drop(delayed);
                held.pass();
                self.spared.add(1);
                verdict
            }
        }
    }

    /// Writes the first part, and says that all is written.
    fn tear<'a>(&self, request: Request<'a, Fault>, subject: Subject) -> Verdict<'a> {
        let block_size = self.instance.disk().block_size;
        let Some(length) = self.settings.target.torn_length(subject, block_size) else {
            return self.spare(request);
        };
        let (Some(mut part), Some(data)) = (self.instance.buffer(length), request.data()) else {
            return self.spare(request);
        };
        if !data.copy_to_buffer(&mut part) {
            return self.spare(request);
        }
        let issue = Issue::write(subject.offset, part).fua(request.is_fua());
        let (held, verdict) = request.hold();
        let done = move |issued: Issued| match issued.result {
            Ok(()) => held.done(),
            Err(Errno::EAGAIN) => held.pass(), // not even begun: too much is in flight
            Err(errno) => held.fail(errno),
        };
        match self.instance.issue(issue, done) {
            Ok(()) => self.hit(verdict),
            Err(refused) => {
                self.spared.add(1);
                refused.finish();
                verdict
            }
        }
    }
}

fn lock(delayed: &Delayed) -> MutexGuard<'_, HashMap<HoldId, (Held<Fault>, Timer)>> {
    delayed.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
