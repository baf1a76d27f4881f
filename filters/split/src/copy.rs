//! One request's copy for the second disk.

use upcall_sdk::{Buffer, Held, Instance, Issue, Op};

use crate::Split;

/// The number of the granted disk that copies go to.
pub const SECOND_DISK: u32 = 1;

/// The request for the second disk that does what `held` does. None if there is no memory for
/// its data just now.
pub fn of(held: &Held<Split>, instance: &Instance) -> Option<Issue> {
    let (offset, length) = (held.offset(), held.length());
    let issue = match held.op() {
        Op::Write => Issue::write(offset, data(held, instance)?),
        Op::Discard => Issue::discard(offset, length),
        Op::WriteZeroes => Issue::write_zeroes(offset, length).unmap(held.may_unmap()),
        Op::Flush | Op::Read => Issue::flush(), // reads are not in `ops`
    };
    Some(issue.fua(held.is_fua()).on_disk(SECOND_DISK))
}

/// What a store that cannot discard is asked for instead: the range must read as zeroes
/// on both disks.
pub fn zeroes_for(held: &Held<Split>) -> Issue {
    let issue = Issue::write_zeroes(held.offset(), held.length()).unmap(true);
    issue.fua(held.is_fua()).on_disk(SECOND_DISK)
}

fn data(held: &Held<Split>, instance: &Instance) -> Option<Buffer> {
    let mut buffer = instance.buffer(held.length())?;
    held.data()?.copy_to_buffer(&mut buffer).then_some(buffer)
}
