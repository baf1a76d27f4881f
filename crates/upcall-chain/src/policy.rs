//! What an operator decides for a slot: how long its filter may take, and what becomes of
//! requests while the filter is gone.
//!
//! Always true: nothing here lets an operation slip past a filter that decides data.

use std::fmt;

use crate::{Class, SlotSpec};

/// What becomes of a slot's requests while its filter host is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnFailure {
    /// They wait until it is back: the guest sees latency, however long, and no error.
    Hold,
    /// They skip the slot. What changed the disk meanwhile is recorded first.
    Bypass,
    /// They fail with EIO until it is back.
    Fail,
    /// The filter leaves the chain at its first failure, and does not come back.
    Detach,
}

impl OnFailure {
    /// All of them.
    pub const ALL: [OnFailure; 4] =
        [OnFailure::Hold, OnFailure::Bypass, OnFailure::Fail, OnFailure::Detach];

    /// The word in settings and messages.
    pub const fn name(self) -> &'static str {
        match self {
            OnFailure::Hold => "hold",
            OnFailure::Bypass => "bypass",
            OnFailure::Fail => "fail",
            OnFailure::Detach => "detach",
        }
    }

    /// The policy of a word.
    pub fn from_name(name: &str) -> Option<OnFailure> {
        OnFailure::ALL.into_iter().find(|policy| policy.name() == name)
    }

    /// What a filter gets whose operator said nothing: one that decides data is waited for;
    /// one that only looks, limits or copies is skipped.
    pub const fn default_for(spec: &SlotSpec) -> OnFailure {
        match spec.class {
            _ if spec.decides_data() => OnFailure::Hold,
            Class::Inspection | Class::Qos | Class::Capture | Class::Replication => {
                OnFailure::Bypass
            }
            Class::Compression | Class::Encryption | Class::Cache | Class::Provider => {
                OnFailure::Hold
            }
        }
    }

    /// Whether a filter with this declaration may have this policy.
    pub const fn check(self, spec: &SlotSpec) -> Result<(), PolicyError> {
        match self {
            OnFailure::Bypass | OnFailure::Detach if spec.decides_data() => {
                Err(PolicyError { policy: self })
            }
            _ => Ok(()),
        }
    }

    /// Whether what a slot missed is recorded while it is skipped. A limit has nothing to
    /// repair later; whoever looks at data or copies it has.
    pub fn records_gaps(self, spec: &SlotSpec) -> bool {
        self == OnFailure::Bypass && spec.class != Class::Qos
    }
}

impl fmt::Display for OnFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A policy that a filter cannot have: it decides what the disk holds, and would be slipped
/// past. Choose hold or fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyError {
    /// What was asked for.
    pub policy: OnFailure,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "on-failure={} is not possible: it changes data or answers requests, and the disk \
             would be wrong without it; use on-failure=hold or on-failure=fail",
            self.policy
        )
    }
}

impl std::error::Error for PolicyError {}

/// How long a filter of this class may take for one delivery, unless the operator says
/// otherwise; milliseconds. Those that wait by trade, or for another host, have more time.
pub const fn default_deadline_ms(class: Class) -> u64 {
    match class {
        Class::Qos | Class::Replication => 30_000,
        _ => 5_000,
    }
}

#[cfg(test)]
mod tests {
    use upcall_block::OpSet;

    use super::*;
    use crate::examples::*;

    #[test]
    fn who_decides_data_is_never_skipped_whatever_its_class() {
        for spec in [changer(), answerer()] {
            for class in Class::ALL {
                let spec = SlotSpec { class, ..spec.clone() };
                assert_eq!(OnFailure::default_for(&spec), OnFailure::Hold);
                for policy in [OnFailure::Bypass, OnFailure::Detach] {
                    let error = policy.check(&spec).unwrap_err();
                    assert!(error.to_string().contains("use on-failure=hold"), "{error}");
                }
                assert_eq!(OnFailure::Hold.check(&spec), Ok(()));
                assert_eq!(OnFailure::Fail.check(&spec), Ok(()));
            }
        }
    }

    #[test]
    fn who_only_looks_may_have_any_policy_and_is_skipped_by_default() {
        let spec = |class| SlotSpec { class, ..observer(OpSet::ALL) };
        for policy in OnFailure::ALL {
            assert_eq!(policy.check(&spec(Class::Capture)), Ok(()));
            assert_eq!(OnFailure::from_name(policy.name()), Some(policy));
        }
        assert_eq!(OnFailure::from_name("ignore"), None);
        for class in [Class::Inspection, Class::Replication, Class::Qos, Class::Capture] {
            assert_eq!(OnFailure::default_for(&spec(class)), OnFailure::Bypass);
        }
        assert_eq!(OnFailure::default_for(&spec(Class::Cache)), OnFailure::Hold);
    }

    #[test]
    fn what_a_skipped_filter_missed_is_recorded_unless_it_only_sets_a_pace() {
        let spec = |class| SlotSpec { class, ..observer(OpSet::ALL) };
        assert!(OnFailure::Bypass.records_gaps(&spec(Class::Replication)));
        assert!(!OnFailure::Bypass.records_gaps(&spec(Class::Qos)));
        assert!(!OnFailure::Detach.records_gaps(&spec(Class::Replication)));
    }
}
