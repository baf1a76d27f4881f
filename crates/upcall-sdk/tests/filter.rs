//! Requests, verdicts, contexts, holds and cancels, through the C table.

use std::sync::Mutex;

use upcall_sdk::testing::{Host, State};
use upcall_sdk::{
    Completion, Counter, Errno, Filter, Held, HeldCompletion, HoldId, Info, Instance, Op, OpSet,
    Param, Request, Verdict,
};

/// Counts its end.
struct Tracked(Counter);

impl Drop for Tracked {
    fn drop(&mut self) {
        self.0.add(1);
    }
}

/// Does to every request what its parameters say.
struct Probe {
    down: String,
    up: String,
    freed: Counter,
    without_context: Counter,
    cancels: Counter,
    held: Mutex<Vec<Held<Probe>>>,
    held_up: Mutex<Vec<HeldCompletion<Probe>>>,
}

impl Probe {
    fn take(&self) -> Held<Probe> {
        self.held.lock().unwrap().remove(0)
    }

    fn watch(&self, held: Held<Probe>) {
        held.watch(Tracked(self.freed.clone()));
    }
}

impl Filter for Probe {
    const INFO: Info = Info {
        name: c"probe",
        ops: OpSet::ALL,
        sees: OpSet::DATA,
        changes: OpSet::DATA,
        answers: OpSet::of(&[Op::Flush]),
        ..Info::NEW
    };
    const PARAMS: &'static [Param] = &[
        Param::choice(c"down", c"", Some(c"pass"), c"pass|watch|done|fail|hold|early|drop|xor"),
        Param::choice(c"up", c"", Some(c"pass"), c"pass|done|fail|hold|drop|xor"),
    ];
    type Context = Tracked;

    fn open(instance: Instance) -> Result<Self, Errno> {
        Ok(Probe {
            down: instance.param_string(c"down").ok_or(Errno::EINVAL)?,
            up: instance.param_string(c"up").ok_or(Errno::EINVAL)?,
            freed: instance.counter(c"freed"),
            without_context: instance.counter(c"without_context"),
            cancels: instance.counter(c"cancels"),
            held: Mutex::default(),
            held_up: Mutex::default(),
        })
    }

    fn start_io<'a>(&self, mut request: Request<'a, Self>) -> Verdict<'a> {
        match self.down.as_str() {
            "watch" => request.watch(Tracked(self.freed.clone())),
            "done" => request.done(),
            "fail" => request.fail(Errno::ENOSPC),
            "hold" => {
                let (held, verdict) = request.hold();
                self.held.lock().unwrap().push(held);
                verdict
            }
            "early" => {
                let (held, verdict) = request.hold();
                std::thread::scope(|scope| drop(scope.spawn(move || self.watch(held))));
                verdict
            }
            "drop" => request.hold().1,
            "xor" => {
                if let Some(mut data) = request.data_mut() {
                    data.update(|_, bytes| bytes.iter_mut().for_each(|byte| *byte ^= 0xff));
                }
                request.watch(Tracked(self.freed.clone()))
            }
            _ => request.pass(),
        }
    }

    fn io_done<'a>(&self, mut completion: Completion<'a, Self>) -> Verdict<'a> {
        if completion.context().is_none() {
            self.without_context.add(1);
        }
        match self.up.as_str() {
            "done" => completion.done(),
            "fail" => completion.fail(Errno::EROFS),
            "hold" => {
                let (held, verdict) = completion.hold();
                self.held_up.lock().unwrap().push(held);
                verdict
            }
            "drop" => completion.hold().1,
            "xor" => {
                if let Some(mut data) = completion.data_mut() {
                    data.update(|_, bytes| bytes.iter_mut().for_each(|byte| *byte ^= 0xff));
                }
                completion.pass()
            }
            _ => completion.pass(),
        }
    }

    fn cancel(&self, hold: HoldId) {
        self.cancels.add(1);
        let mut held = self.held.lock().unwrap();
        if let Some(index) = held.iter().position(|held| held.id() == hold) {
            held.remove(index).fail(Errno::ECANCELED);
        }
        self.held_up.lock().unwrap().retain(|held| held.id() != hold);
    }
}

fn probe(down: &str, up: &str) -> Host<Probe> {
    Host::builder().param("down", down).param("up", up).open().unwrap()
}

#[test]
fn a_passed_request_goes_down_and_is_not_seen_again() {
    let mut host = probe("pass", "fail");
    let id = host.write(512, &[3; 1024]);
    assert_eq!(host.state(id), State::Below { watched: false });
    assert_eq!(host.run(id), Ok(()));
    assert_eq!(host.stored(0)[512..1536], [3; 1024]);
}

#[test]
fn a_verdict_ends_a_request_as_it_says() {
    let mut host = probe("done", "pass");
    let id = host.request(Op::Flush, 0, 0);
    assert_eq!(host.state(id), State::Ended(Ok(())));
    let mut host = probe("fail", "pass");
    let id = host.request(Op::Read, 0, 512);
    assert_eq!(host.state(id), State::Ended(Err(Errno::ENOSPC)));
}

#[test]
fn done_to_what_the_filter_does_not_answer_is_a_violation() {
    let mut host = probe("done", "pass");
    let id = host.request(Op::Discard, 0, 512);
    assert_eq!(host.state(id), State::Ended(Err(Errno::EIO)));
    assert_eq!(host.take_violations().len(), 1);
}

#[test]
fn a_watched_request_brings_its_context_back_once() {
    let mut host = probe("watch", "pass");
    let id = host.request(Op::Read, 0, 512);
    assert_eq!(host.state(id), State::Below { watched: true });
    assert_eq!(host.counter("freed"), 0);
    host.complete(id, Err(Errno::ENOSPC));
    assert_eq!(host.state(id), State::Ended(Err(Errno::ENOSPC)));
    assert_eq!((host.counter("freed"), host.counter("without_context")), (1, 0));
}

#[test]
fn a_completion_may_be_turned_into_success_or_failure() {
    let mut host = probe("watch", "done");
    let id = host.request(Op::Read, 0, 512);
    host.complete(id, Err(Errno::EIO));
    assert_eq!(host.state(id), State::Ended(Ok(())));
    let mut host = probe("watch", "fail");
    let id = host.request(Op::Read, 0, 512);
    assert_eq!(host.run(id), Err(Errno::EROFS));
}

#[test]
fn data_is_changed_in_both_directions() {
    let mut host = probe("xor", "xor");
    let id = host.write(0, &[0x0f; 9 * 512]);
    assert_eq!(host.run(id), Ok(()));
    assert_eq!(host.stored(0)[..9 * 512], [0xf0; 9 * 512]);
    let id = host.request(Op::Read, 0, 9 * 512);
    assert_eq!(host.run(id), Ok(()));
    assert_eq!(host.data(id), [0x0f; 9 * 512]);
}

#[test]
fn a_held_request_is_answered_from_another_thread() {
    let mut host = probe("hold", "pass");
    let id = host.write(0, &[1; 512]);
    assert_eq!(host.state(id), State::Held);
    let held = host.filter().take();
    assert_eq!((held.op(), held.offset(), held.length()), (Op::Write, 0, 512));
    assert_eq!(held.data().unwrap().to_vec(), [1; 512]);
    std::thread::spawn(move || held.pass()).join().unwrap();
    assert_eq!(host.run(id), Ok(()));
}

#[test]
fn an_answer_may_come_before_the_callback_returns() {
    let mut host = probe("early", "pass");
    let id = host.write(0, &[1; 512]);
    assert_eq!(host.state(id), State::Below { watched: true });
    assert_eq!(host.run(id), Ok(()));
    assert_eq!((host.counter("freed"), host.counter("without_context")), (1, 0));
}

#[test]
fn a_forgotten_hold_fails_and_does_not_hang() {
    let mut host = probe("drop", "pass");
    let id = host.write(0, &[1; 512]);
    assert_eq!(host.state(id), State::Ended(Err(Errno::EIO)));
    let mut host = probe("watch", "drop");
    let id = host.request(Op::Read, 0, 512);
    assert_eq!(host.run(id), Err(Errno::EIO));
    assert_eq!(host.counter("freed"), 1);
}

#[test]
fn a_completion_may_be_held() {
    let mut host = probe("watch", "hold");
    let id = host.request(Op::Read, 0, 512);
    host.complete(id, Err(Errno::ENOSPC));
    assert_eq!(host.state(id), State::HeldUp);
    let held = host.filter().held_up.lock().unwrap().remove(0);
    assert!(held.context().is_some());
    assert_eq!(held.status(), Err(Errno::ENOSPC));
    held.pass();
    assert_eq!(host.state(id), State::Ended(Err(Errno::ENOSPC)));
    assert_eq!(host.counter("freed"), 1);
}

#[test]
fn a_cancel_reaches_the_one_that_is_held() {
    let mut host = probe("hold", "pass");
    let first = host.write(0, &[1; 512]);
    let second = host.write(512, &[2; 512]);
    host.cancel(second);
    assert_eq!(host.state(first), State::Held);
    assert_eq!(host.state(second), State::Ended(Err(Errno::ECANCELED)));
    assert_eq!(host.counter("cancels"), 1);
    host.filter().take().pass();
    assert_eq!(host.run(first), Ok(()));
}

#[test]
fn a_cancel_that_comes_too_late_hits_no_other() {
    let mut host = probe("hold", "pass");
    let first = host.write(0, &[1; 512]);
    host.filter().take().pass();
    assert_eq!(host.run(first), Ok(()));
    let second = host.write(512, &[2; 512]);
    host.cancel_again(first);
    assert_eq!(host.state(second), State::Held);
    host.filter().take().pass();
    assert_eq!(host.run(second), Ok(()));
}

#[test]
fn a_watch_that_crosses_a_cancel_still_brings_its_context_back() {
    for is_cancelled_first in [true, false] {
        let mut host = probe("hold", "pass");
        let id = host.write(0, &[1; 512]);
        let held = host.filter().take();
        if is_cancelled_first {
            host.cancel(id); // the filter does not find it
            host.filter().watch(held);
        } else {
            host.filter().watch(held);
            host.cancel(id);
        }
        assert_eq!(host.counter("freed"), 0);
        assert_eq!(host.run(id), Err(Errno::ECANCELED));
        assert_eq!((host.counter("freed"), host.counter("without_context")), (1, 0));
        assert_eq!(host.stored(0)[..512], [0; 512], "it reached the disk");
    }
}

#[test]
fn a_retried_request_says_so() {
    let mut host = probe("hold", "pass");
    let id = host.retry(Op::Write, 0, &[1; 512]);
    let held = host.filter().take();
    assert!(held.is_retry() && !held.is_fua());
    held.pass();
    assert_eq!(host.run(id), Ok(()));
}

/// Sees reads and writes, and changes nothing.
struct Observer;

impl Filter for Observer {
    const INFO: Info = Info { name: c"o", ops: OpSet::ALL, sees: OpSet::DATA, ..Info::NEW };
    type Context = ();

    fn open(_: Instance) -> Result<Self, Errno> {
        Ok(Observer)
    }

    fn start_io<'a>(&self, mut request: Request<'a, Self>) -> Verdict<'a> {
        assert_eq!(request.data().is_some(), request.op() == Op::Write);
        assert!(request.data_mut().is_none(), "an observer must not write");
        request.watch(())
    }

    fn io_done<'a>(&self, mut completion: Completion<'a, Self>) -> Verdict<'a> {
        assert_eq!(completion.data().is_some(), completion.op() == Op::Read);
        assert!(completion.data_mut().is_none(), "an observer must not write");
        assert!(completion.take_context().is_some(), "a context without a size is one too");
        completion.pass()
    }
}

#[test]
fn an_observer_gets_data_to_read_only() {
    let mut host = Host::<Observer>::builder().open().unwrap();
    for op in [Op::Read, Op::Flush, Op::Discard, Op::WriteZeroes] {
        let length = if op == Op::Flush { 0 } else { 512 };
        let id = host.request(op, 0, length);
        assert_eq!(host.run(id), Ok(()));
    }
    let id = host.write(0, &[1; 512]);
    assert_eq!(host.run(id), Ok(()));
}
