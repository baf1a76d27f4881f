//! Measuring what a request costs: for `upcall bench`, and for the benchmark of the whole.
//!
//! Always true: sides that are compared run in turn, round by round, and a ratio is formed
//! round by round; with each figure stands what processor time every process used and how
//! often it slept.
//!
//! * [`measure`]: rows of figures, [`text`] for people. [`histogram`]: latencies. [`process`]: processor time.
//! * [`rig`]: a worker in this process with a chain and a disk that does nothing; [`load`]: the
//!   requests, made in the queue thread itself.
//!
//! Nothing here is part of what is measured.
#![forbid(unsafe_code)]

pub mod clock;
pub mod histogram;
pub mod load;
pub mod measure;
pub mod process;
pub mod rig;
pub mod text;
