//! What is shown of a hop, besides its counts.

/// What a hop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HopKind {
    /// The whole way of a request, from the frontend and back.
    Request,
    /// One filter.
    Filter,
    /// The store.
    Store,
    /// Nothing: room for a filter that may come. Readers do not see it.
    Vacant,
}

impl HopKind {
    pub(crate) const fn number(self) -> u64 {
        match self {
            HopKind::Request => 0,
            HopKind::Filter => 1,
            HopKind::Store => 2,
            HopKind::Vacant => 3,
        }
    }

    /// The kind of this number, which another may have written; one that is none is a store's.
    pub(crate) const fn of_number(number: u64) -> HopKind {
        match number {
            0 => HopKind::Request,
            1 => HopKind::Filter,
            3 => HopKind::Vacant,
            _ => HopKind::Store,
        }
    }

    /// A word for it.
    pub const fn name(self) -> &'static str {
        match self {
            HopKind::Request => "request",
            HopKind::Filter => "filter",
            HopKind::Store => "store",
            HopKind::Vacant => "vacant",
        }
    }
}

/// How a filter stands, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// It serves.
    #[default]
    Up,
    /// It failed and is being started again; its requests wait or fail.
    Restarting,
    /// It failed and is skipped until it is back.
    Bypassed,
    /// It failed too often and is tried at long intervals.
    Quarantined,
    /// It failed and has left the chain.
    Detached,
}

impl Standing {
    /// All of them.
    pub const ALL: [Standing; 5] = [
        Standing::Up,
        Standing::Restarting,
        Standing::Bypassed,
        Standing::Quarantined,
        Standing::Detached,
    ];

    /// A word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Standing::Up => "up",
            Standing::Restarting => "restarting",
            Standing::Bypassed => "bypassed",
            Standing::Quarantined => "quarantined",
            Standing::Detached => "detached",
        }
    }
}

/// How a filter stands and stood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilterHealth {
    /// Now.
    pub standing: Standing,
    /// How often it failed: died, hung, broke too many rules, or could not be started again.
    pub failures: u64,
    /// The longest time from a failure until it served again.
    pub longest_stall_ns: u64,
}

/// A hop to keep counters for.
#[derive(Clone, Debug)]
pub struct HopSpec {
    /// The disk's name; at most 47 bytes count.
    pub disk: String,
    /// The hop's name: the filter's, or what the store is.
    pub name: String,
    /// What it is.
    pub kind: HopKind,
    /// One block for each.
    pub queues: u16,
}
