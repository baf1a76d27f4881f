//! Memory of our own at an aligned address, for transfers the guest's memory is not fit for.

/// Zeroed bytes whose address is a multiple of what was asked. They do not move.
#[derive(Debug)]
pub(crate) struct AlignedMemory {
    memory: Vec<u8>,
    skip: usize,
    length: usize,
}

impl AlignedMemory {
    /// `length` bytes at a multiple of `alignment`, a power of two.
    pub fn new(length: usize, alignment: usize) -> AlignedMemory {
        let memory = vec![0; length + alignment - 1];
        let skip = (memory.as_ptr() as usize).wrapping_neg() & (alignment - 1);
        AlignedMemory { memory, skip, length }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.skip..self.skip + self.length]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.skip..self.skip + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_aligned_and_all_bytes_are_there() {
        for alignment in [1, 512, 4096, 65536] {
            let mut memory = AlignedMemory::new(1000, alignment);
            assert!((memory.bytes().as_ptr() as usize).is_multiple_of(alignment));
            assert_eq!(memory.bytes_mut().len(), 1000);
            assert_eq!(memory.bytes(), [0; 1000]);
        }
    }
}
