//! What a gap file is on: a file, or in tests something that crashes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that outlive a crash once they are synced.
pub(crate) trait Medium: Send + 'static {
    /// How many bytes there are from `at`, `bytes.len()` at most.
    fn read_at(&mut self, bytes: &mut [u8], at: u64) -> io::Result<usize>;
    /// All of them. May become durable in any part and order until [`sync`](Self::sync).
    fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()>;
    /// What was written is durable when it returns Ok. After an error, what was written since
    /// the last Ok must be written again.
    fn sync(&mut self) -> io::Result<()>;
}

impl Medium for File {
    fn read_at(&mut self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < bytes.len() {
            match FileExt::read_at(self, &mut bytes[done..], at + done as u64) {
                Ok(0) => break,
                Ok(length) => done += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn sync(&mut self) -> io::Result<()> {
        loop {
            match self.sync_data() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}
