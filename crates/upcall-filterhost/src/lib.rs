//! Starts filter hosts and talks to them
