//! What was checked, line by line as it happens.

use crate::failure::Failure;
use crate::output::print;

/// Prints checks and remembers whether any failed.
pub struct Report {
    replay: String,
    passed: u32,
    failed: u32,
}

impl Report {
    /// `replay`: the command that does it all again.
    pub fn new(replay: String) -> Report {
        Report { replay, passed: 0, failed: 0 }
    }

    /// One check: what it found, or all that is wrong. True if it passed.
    pub fn check(
        &mut self,
        name: &str,
        found: Result<String, Vec<String>>,
    ) -> Result<bool, Failure> {
        match found {
            Ok(found) => {
                self.passed += 1;
                print(&format!("ok    {name}: {found}\n"))?;
                Ok(true)
            }
            Err(wrong) => {
                self.failed += 1;
                let mut text = format!("FAIL  {name}\n");
                wrong.iter().for_each(|line| text += &format!("        {line}\n"));
                text += &format!("        replay: {}\n", self.replay);
                print(&text)?;
                Ok(false)
            }
        }
    }

    /// The last line; an error if anything failed.
    pub fn end(self) -> Result<(), Failure> {
        let all = self.passed + self.failed;
        match self.failed {
            0 => print(&format!("all {all} checks passed\n")),
            failed => Err(Failure::new(format_args!("{failed} of {all} checks failed"))),
        }
    }
}
