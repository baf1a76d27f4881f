//! The `upcall` command line.
fn main() {}
