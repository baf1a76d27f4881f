//! What happened, as a digest by which two runs of a seed are compared, and the last lines
//! for a report.

use std::collections::VecDeque;
use std::fmt::Arguments;

use crate::random::mix;

/// Lines kept.
const LINES: usize = 60;

/// See the module.
#[derive(Debug, Default)]
pub struct Trace {
    digest: u64,
    events: u64,
    lines: VecDeque<String>,
    /// Everything is printed as it happens.
    pub prints: bool,
}

impl Trace {
    /// Something happened at `now_ns`.
    pub fn add(&mut self, now_ns: u64, what: Arguments<'_>) {
        let line = format!("{:>12.3} µs  {what}", now_ns as f64 / 1000.0);
        for chunk in line.as_bytes().chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.digest = mix(self.digest ^ u64::from_le_bytes(word)).wrapping_add(self.events);
        }
        self.events += 1;
        if self.prints {
            println!("{line}");
        }
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    pub fn digest(&self) -> (u64, u64) {
        (self.events, self.digest)
    }

    pub fn last(&self) -> Vec<String> {
        self.lines.iter().cloned().collect()
    }
}
