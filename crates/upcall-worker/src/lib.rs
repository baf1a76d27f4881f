//! The worker: joins frontends, chains, filter hosts and stores in queue threads
