//! What kinds of filters there are: what each declares, and the steps of its work at which it may
//! die.

use upcall_block::{Op, OpSet};
use upcall_chain::{Class, SlotSpec};

/// What a filter does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Gets no data; watches.
    Watcher,
    /// Gets data, and sees whether it is right.
    Observer,
    /// Changes data, both ways.
    Changer,
    /// Writes to a second disk what goes to the first.
    Splitter,
    /// Notes writes in a place of its own on the disk, below itself, before they go on.
    Journal,
    /// Answers reads of what it has seen.
    Cache,
    /// Holds requests for a while.
    Holder,
    /// Gets data, next to the store.
    Recorder,
}

impl Role {
    /// In the order of a chain.
    pub const ALL: [Role; 8] = [
        Role::Watcher,
        Role::Observer,
        Role::Changer,
        Role::Splitter,
        Role::Journal,
        Role::Cache,
        Role::Holder,
        Role::Recorder,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Role::Watcher => "watcher",
            Role::Observer => "observer",
            Role::Changer => "changer",
            Role::Splitter => "splitter",
            Role::Journal => "journal",
            Role::Cache => "cache",
            Role::Holder => "holder",
            Role::Recorder => "recorder",
        }
    }

    /// What it declares.
    pub fn spec(self) -> SlotSpec {
        let data = OpSet::NONE.with(Op::Read).with(Op::Write);
        let (all, none) = (OpSet::ALL, OpSet::NONE);
        let (class, order, ops, sees, changes, answers) = match self {
            Role::Watcher => (Class::Inspection, 0, all, none, none, none),
            Role::Observer => (Class::Inspection, 1, all, data, none, none),
            Role::Changer => (Class::Encryption, 0, data, data, data, none),
            Role::Splitter => {
                let changing = all.without(Op::Read).without(Op::Flush);
                (Class::Replication, 0, changing, none.with(Op::Write), none, none)
            }
            Role::Journal => (Class::Replication, 1, none.with(Op::Write), none, none, none),
            Role::Cache => (Class::Cache, 0, all, data, none, none.with(Op::Read)),
            Role::Holder => (Class::Qos, 0, all, none, none, none),
            Role::Recorder => (Class::Capture, 0, all, data, none, none),
        };
        SlotSpec { class, order, ops, sees, changes, answers }
    }

    pub fn issues(self) -> bool {
        matches!(self, Role::Splitter | Role::Journal)
    }

    /// Where it can die.
    pub fn steps(self) -> &'static [Step] {
        use Step::*;
        match self {
            Role::Watcher => &[Idle, Taken, Answered, DoneTaken, DoneAnswered],
            Role::Observer | Role::Recorder => &[Idle, Taken, Answered, DoneTaken, DoneAnswered],
            Role::Changer => &[
                Idle,
                Taken,
                HalfChanged,
                Changed,
                Answered,
                Held,
                DoneTaken,
                DoneHalfChanged,
                DoneChanged,
                DoneAnswered,
            ],
            Role::Splitter | Role::Journal => &[Idle, Taken, Held, Issued, ResultTaken, Answered],
            Role::Cache => &[Idle, Taken, Answered, DoneTaken, DoneAnswered],
            Role::Holder => &[Idle, Taken, Held, Answered, CancelTaken, DoneTaken, DoneAnswered],
        }
    }
}

/// A point in a filter host's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Between two entries.
    Idle,
    /// A request was taken, and nothing is done yet.
    Taken,
    /// Some of its data is changed.
    HalfChanged,
    /// All of it is, and it is not answered.
    Changed,
    /// It is answered, and nobody was woken.
    Answered,
    /// It is held.
    Held,
    /// A request of its own was issued.
    Issued,
    /// How that ended was taken.
    ResultTaken,
    /// A cancel was taken.
    CancelTaken,
    /// A completion was taken.
    DoneTaken,
    DoneHalfChanged,
    DoneChanged,
    DoneAnswered,
}
