//! What filters say, and what they must not say.

use std::fmt;

use upcall_block::{Errno, Op, Status};

use crate::SlotIndex;

/// A filter's answer to a request on either way. What each means on which way is the table
/// of verdicts in `upcall/filter.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Down: go on, without a call on completion; the status says nothing. Up: go on with
    /// this status.
    Pass(Status),
    /// Down: go on, and call on completion. Up: a violation.
    Watch,
    /// Down: answered with success, if declared. Up: go on with success.
    Done,
    /// Turn back, or go on up, with this error.
    Fail(Errno),
    /// The answer comes later: once more, and no second hold.
    Hold,
    /// What is none of these: always a violation.
    Nonsense,
}

impl Verdict {
    /// The verdict of the numbers that a filter gave: `code` as `UPCALL_PASS` and so on,
    /// `status` 0 or a negative errno. Any numbers are a verdict: an unknown code, or a
    /// failure without an errno, is [`Verdict::Nonsense`]. A pass, whose status may say
    /// nothing, is one with any status; one that is no status counts as EIO.
    pub const fn from_numbers(code: u32, status: i32) -> Verdict {
        match (code, status) {
            (0, 0) => Verdict::Pass(Ok(())),
            (0, -4095..=-1) => Verdict::Pass(Err(Errno::from_raw(-status))),
            (0, _) => Verdict::Pass(Err(Errno::EIO)),
            (1, _) => Verdict::Watch,
            (2, _) => Verdict::Done,
            (3, -4095..=-1) => Verdict::Fail(Errno::from_raw(-status)),
            (4, _) => Verdict::Hold,
            _ => Verdict::Nonsense,
        }
    }
}

/// An event that broke the rules. A verdict that the filter may not give has failed its
/// request with EIO; any other event has changed nothing. What names a slot is counted
/// against that filter's host; the rest is a bug of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Violation {
    /// Done on the way down, for an operation that is not in `answers`.
    DoneNotDeclared {
        /// Who.
        slot: SlotIndex,
        /// What it was asked.
        op: Op,
    },
    /// Watch, on the way up: there is nothing left to watch.
    WatchOnWayUp {
        /// Who.
        slot: SlotIndex,
    },
    /// Hold, of what it holds already.
    HeldTwice {
        /// Who.
        slot: SlotIndex,
    },
    /// No verdict at all; see [`Verdict::Nonsense`].
    Nonsense {
        /// Who.
        slot: SlotIndex,
    },
    /// An answer to what the filter was not asked, or has answered.
    NotAsked {
        /// Who.
        slot: SlotIndex,
    },
    /// A completion of the store, which does not have the request.
    NotWithStore,
    /// Any event after the request has ended.
    Ended,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::DoneNotDeclared { slot, op } => {
                write!(f, "slot {slot} answered a {op} with done, but {op} is not in its `answers`")
            }
            Violation::WatchOnWayUp { slot } => {
                write!(f, "slot {slot} wants to watch a request that has completed below it")
            }
            Violation::HeldTwice { slot } => {
                write!(f, "slot {slot} held a request that it holds already")
            }
            Violation::Nonsense { slot } => {
                write!(f, "slot {slot} gave an unknown verdict, or fail without a negative errno")
            }
            Violation::NotAsked { slot } => {
                write!(f, "slot {slot} answered a request that it does not have")
            }
            Violation::NotWithStore => {
                f.write_str("the store completed a request that it does not have")
            }
            Violation::Ended => f.write_str("the request has ended already"),
        }
    }
}

impl std::error::Error for Violation {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_numbers_are_a_verdict() {
        assert_eq!(Verdict::from_numbers(0, 0), Verdict::Pass(Ok(())));
        assert_eq!(Verdict::from_numbers(0, -28), Verdict::Pass(Err(Errno::ENOSPC)));
        assert_eq!(Verdict::from_numbers(0, 28), Verdict::Pass(Err(Errno::EIO)));
        assert_eq!(Verdict::from_numbers(1, 7), Verdict::Watch);
        assert_eq!(Verdict::from_numbers(2, i32::MIN), Verdict::Done);
        assert_eq!(Verdict::from_numbers(3, -30), Verdict::Fail(Errno::EROFS));
        assert_eq!(Verdict::from_numbers(4, 0), Verdict::Hold);
        for (code, status) in [(3, 0), (3, 5), (3, -4096), (3, i32::MIN), (5, 0), (u32::MAX, 0)] {
            assert_eq!(Verdict::from_numbers(code, status), Verdict::Nonsense, "{code} {status}");
        }
    }
}
