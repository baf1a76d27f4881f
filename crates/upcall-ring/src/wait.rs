//! placeholder
/// placeholder
#[derive(Debug)]
pub enum Turn {}
/// placeholder
#[derive(Debug)]
pub struct Waiter {}
