//! The `throttle` filter.
