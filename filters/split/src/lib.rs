//! The `split` filter.
