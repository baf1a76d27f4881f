//! The course of a chain change: which step comes next, and what is undone when one fails.
//!
//! A [`Change`] says what to do next; it does nothing. It knows no disk, no filter and no
//! clock: whoever carries out a step says whether it succeeded.
//!
//! Always true: nothing is switched before the change is committed, and nothing is undone
//! after; every step that was begun and has something to undo is undone, the last first; a
//! disk that was stunned is resumed exactly once, whatever fails.

/// What to do next for a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeStep {
    /// Start what is new, as far as it goes beside what is there: no instance is opened.
    Prepare,
    /// Stun the disks: take nothing more, and let what is in flight end, within the bound.
    Stun,
    /// Tell the filters that their disk is stunned; save the state of those that leave, and
    /// close them.
    Leave,
    /// Open what is new, and hand it the state of what it replaces.
    Enter,
    /// Write down that the new chain is the disk's. If the worker dies from here on, the next
    /// one begins with it.
    Commit,
    /// Let the queue threads take on the new chain.
    Switch,
    /// Tell the filters, and let the disks go on.
    Resume,
    /// End what has left, or what was started in vain.
    CleanUp,
    /// Close what was opened.
    UndoEnter,
    /// Open again what was closed.
    UndoLeave,
    /// It has ended.
    End(ChangeEnd),
}

/// How a change ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeEnd {
    /// The disks have their new chains.
    Changed,
    /// The disks have the chains that they had, because this step failed.
    Unchanged(FailedAt),
}

/// The step at which a change was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailedAt {
    /// [`ChangeStep::Prepare`]: nobody has noticed anything.
    Prepare,
    /// [`ChangeStep::Stun`]: what was in flight did not end within the bound.
    Stun,
    /// [`ChangeStep::Leave`]: a filter refused, or died of it.
    Leave,
    /// [`ChangeStep::Enter`]: what is new does not open.
    Enter,
    /// [`ChangeStep::Commit`]: it could not be written down.
    Commit,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Change {
    next: ChangeStep,
    failed: Option<FailedAt>,
}

impl Default for Change {
    fn default() -> Change {
        Change::new()
    }
}

impl Change {
    /// A change that was checked, and of which nothing is done yet.
    pub fn new() -> Change {
        Change { next: ChangeStep::Prepare, failed: None }
    }

    /// What to do now.
    pub fn poll_step(&self) -> ChangeStep {
        self.next
    }

    /// That step was carried out, or could not be. Steps from [`ChangeStep::Switch`] on, and
    /// those that undo something, cannot fail: what goes wrong there is a filter that fails,
    /// and falls under its policy. For them a failure counts as success.
    pub fn handle_step(&mut self, is_done: bool) {
        use ChangeStep::*;
        self.next = match (self.next, is_done) {
            (Prepare, true) => Stun,
            (Stun, true) => Leave,
            (Leave, true) => Enter,
            (Enter, true) => Commit,
            (Commit, true) => Switch,
            (Switch, _) => Resume,
            (Prepare, false) => self.give_up(FailedAt::Prepare, CleanUp),
            (Stun, false) => self.give_up(FailedAt::Stun, Resume),
            // It may have done its work in part.
            (Leave, false) => self.give_up(FailedAt::Leave, UndoLeave),
            (Enter, false) => self.give_up(FailedAt::Enter, UndoEnter),
            (Commit, false) => self.give_up(FailedAt::Commit, UndoEnter),
            (UndoEnter, _) => UndoLeave,
            (UndoLeave, _) => Resume,
            (Resume, _) => CleanUp,
            (CleanUp, _) => End(match self.failed {
                None => ChangeEnd::Changed,
                Some(at) => ChangeEnd::Unchanged(at),
            }),
            (End(end), _) => End(end),
        };
    }

    fn give_up(&mut self, at: FailedAt, next: ChangeStep) -> ChangeStep {
        self.failed = Some(at);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::ChangeStep::*;
    use super::*;

    /// The steps of a change whose `failing` step fails, if it comes to it.
    fn course(failing: Option<ChangeStep>) -> Vec<ChangeStep> {
        let (mut change, mut steps) = (Change::new(), Vec::new());
        loop {
            let step = change.poll_step();
            steps.push(step);
            if let End(_) = step {
                return steps;
            }
            change.handle_step(Some(step) != failing);
        }
    }

    #[test]
    fn a_change_that_goes_well_commits_before_it_switches_and_undoes_nothing() {
        let all = [Prepare, Stun, Leave, Enter, Commit, Switch, Resume, CleanUp];
        let ends = End(ChangeEnd::Changed);
        assert_eq!(course(None), all.into_iter().chain([ends]).collect::<Vec<_>>());
    }

    #[test]
    fn whichever_step_fails_what_was_begun_is_undone_backwards() {
        for (failing, undoing, at) in [
            (Prepare, &[CleanUp][..], FailedAt::Prepare),
            (Stun, &[Resume, CleanUp], FailedAt::Stun),
            (Leave, &[UndoLeave, Resume, CleanUp], FailedAt::Leave),
            (Enter, &[UndoEnter, UndoLeave, Resume, CleanUp], FailedAt::Enter),
            (Commit, &[UndoEnter, UndoLeave, Resume, CleanUp], FailedAt::Commit),
        ] {
            let steps = course(Some(failing));
            let place = steps.iter().position(|step| *step == failing).unwrap();
            let (after, end) = steps[place + 1..].split_at(undoing.len());
            assert_eq!(after, undoing, "{failing:?}");
            assert_eq!(end, [End(ChangeEnd::Unchanged(at))], "{failing:?}");
        }
    }

    #[test]
    fn what_fails_after_the_commit_changes_nothing_any_more() {
        for failing in [Switch, Resume, CleanUp] {
            assert_eq!(course(Some(failing)), course(None), "{failing:?}");
        }
    }

    #[test]
    fn a_stunned_disk_is_resumed_exactly_once() {
        for failing in [None, Some(Prepare), Some(Stun), Some(Leave), Some(Enter), Some(Commit)] {
            let steps = course(failing);
            let count = |step| steps.iter().filter(|other| **other == step).count();
            assert_eq!(count(Resume), count(Stun), "{failing:?}");
            assert!(
                count(Resume) <= 1
                    && count(Switch) == count(Commit) - usize::from(failing == Some(Commit))
            );
        }
    }
}
