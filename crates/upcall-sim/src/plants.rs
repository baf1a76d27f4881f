//! Bugs of others, planted again in the production crates: proof that worlds would show
//! them.
//!
//! Always true: a plant is in the thread that runs the world, and only as long as it runs.

use upcall_vhost::plant;

/// A planted bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// In the frontend.
    Vhost(plant::Bug),
}

impl Plant {
    /// All that a world can show. A guest that makes a descriptor available twice is not in
    /// these worlds.
    pub fn all() -> Vec<Plant> {
        let in_flight = plant::Bug::ALL.into_iter();
        let in_flight = in_flight.filter(|bug| *bug != plant::Bug::DuplicateHead);
        let vhost = in_flight.chain(plant::Bug::UNLOGGED).chain(plant::Bug::MOVED);
        vhost.map(Plant::Vhost).collect()
    }

    pub fn name(self) -> &'static str {
        match self {
            Plant::Vhost(bug) => bug.name(),
        }
    }

    /// Plants it in this thread.
    pub fn set(plant: Option<Plant>) {
        plant::set(plant.map(|Plant::Vhost(bug)| bug));
    }
}
