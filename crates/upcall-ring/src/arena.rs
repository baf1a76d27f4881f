//! placeholder
use crate::{Buffers, Mapping};
use std::sync::Arc;
/// Hands out pages of a part of a mapping.
#[derive(Debug)]
pub struct Arena {
    pub(crate) mapping: Arc<Mapping>,
}
/// Pages handed out.
#[derive(Debug)]
pub struct ArenaSlice {
    offset: u64,
    length: u32,
}
