//! The parameters, declared and read. Nothing acts here.

use std::time::Duration;

use upcall_sdk::{Errno, Instance, Param, error};

use crate::decision::{Target, parse_ops};

/// What the operator may set.
pub const PARAMS: &[Param] = &[
    Param::choice(
        c"effect",
        c"What happens to a request that is hit.",
        Some(c"error"),
        c"error|delay|lose|tear",
    ),
    Param::string(
        c"ops",
        c"The operations that may be hit, with commas between them.",
        Some(c"read,write,flush,discard,write-zeroes"),
        0,
        64,
    ),
    Param::size(c"offset", c"Where the range that may be hit begins.", Some(c"0"), 0, i64::MAX),
    Param::size(c"length", c"How long it is; 0: to the end of the disk.", Some(c"0"), 0, i64::MAX),
    Param::fraction(c"probability", c"How many of them are hit; 1: all.", Some(c"1")),
    Param::int(c"seed", c"Which of them are hit.", Some(c"1"), 0, i64::MAX),
    Param::choice(
        c"errno",
        c"The error of the effect error.",
        Some(c"EIO"),
        c"EIO|ENOSPC|EROFS|ETIMEDOUT|EOPNOTSUPP",
    ),
    Param::millis(c"delay", c"The time of the effect delay.", Some(c"100ms"), 1, 3_600_000),
];

/// What happens to a request that is hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It fails.
    Error(Errno),
    /// It goes on later.
    Delay(Duration),
    /// It is done without reaching the disk.
    Lose,
    /// It is done, and a part of it has reached the disk.
    Tear,
}

/// What was set.
pub struct Settings {
    /// Whom it hits.
    pub target: Target,
    /// How.
    pub effect: Effect,
}

impl Settings {
    /// Reads them, and says in the log what cannot be.
    pub fn read(instance: &Instance) -> Result<Settings, Errno> {
        let effect = effect(instance)?;
        let ops = instance.param_string(c"ops").ok_or(Errno::EINVAL)?;
        let ops = parse_ops(&ops).map_err(|name| {
            error!(instance, "ops: {name:?} is none of read, write, flush, discard, write-zeroes");
            Errno::EINVAL
        })?;
        let number = |name| u64::try_from(instance.param_int(name)).unwrap_or(0);
        let (start, length) = (number(c"offset"), number(c"length"));
        let end = if length == 0 { u64::MAX } else { start.saturating_add(length) };
        let probability = instance.param_fraction(c"probability").ok_or(Errno::EINVAL)?;
        let target = Target { ops, start, end, probability, seed: number(c"seed") };
        Ok(Settings { target, effect })
    }
}

fn effect(instance: &Instance) -> Result<Effect, Errno> {
    match instance.param_string(c"effect").as_deref() {
        Some("error") => Ok(Effect::Error(errno(instance)?)),
        Some("delay") => {
            let delay_ms = u64::try_from(instance.param_int(c"delay")).unwrap_or(0);
            Ok(Effect::Delay(Duration::from_millis(delay_ms)))
        }
        Some("lose") => Ok(Effect::Lose),
        Some("tear") => Ok(Effect::Tear),
        _ => Err(Errno::EINVAL),
    }
}

fn errno(instance: &Instance) -> Result<Errno, Errno> {
    match instance.param_string(c"errno").as_deref() {
        Some("EIO") => Ok(Errno::EIO),
        Some("ENOSPC") => Ok(Errno::ENOSPC),
        Some("EROFS") => Ok(Errno::EROFS),
        Some("ETIMEDOUT") => Ok(Errno::ETIMEDOUT),
        Some("EOPNOTSUPP") => Ok(Errno::EOPNOTSUPP),
        _ => Err(Errno::EINVAL),
    }
}
