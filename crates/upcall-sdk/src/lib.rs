//! Write Upcall filters in Rust
