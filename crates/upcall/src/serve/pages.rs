//! Gives back the pages of the program that only its start needed.
//!
//! A start touches most of a program's code, and much of it never again; it stays mapped, and
//! is the largest part of what an idle worker has resident. What is needed again comes back
//! from the page cache with a minor fault.

use std::ops::Range;

use rustix::mm::{Advice, madvise};

/// Unmaps code that is exactly what its file has. Tells nobody if it cannot be done: it costs
/// memory, nothing else.
pub(super) fn give_back() {
    // What is mapped where, with how much of it is not the file's.
    let Ok(mappings) = std::fs::read_to_string("/proc/self/smaps") else { return };
    for code in unchanged_code(&mappings) {
        let start = std::ptr::with_exposed_provenance_mut(code.start);
        // SAFETY: the range is a private mapping of a file that nobody can write through and
        // of which no page is our own, so that the next access finds the same bytes in it.
        // A library that were unmapped between the look and this could only be one that another
        // thread loaded and gave up; the worker loads none.
        let _ = unsafe { madvise(start, code.len(), Advice::LinuxDontNeed) };
    }
}

/// Where code is mapped privately from files without a page that differs (as one with a
/// debugger's breakpoint does), from the text of `/proc/PID/smaps` (proc(5)).
fn unchanged_code(smaps: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut last = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next()) {
            (Some("Anonymous:"), Some("0")) => found.extend(last.take()),
            // A field of the mapping before.
            (Some(name), _) if name.ends_with(':') => {}
            (Some(range), Some(access)) => {
                let is_file = words.nth(3).is_some_and(|path| path.starts_with('/'));
                last = (access == "r-xp" && is_file).then(|| addresses(range)).flatten();
            }
            _ => {}
        }
    }
    found
}

/// `START-END`, hexadecimal.
fn addresses(range: &str) -> Option<Range<usize>> {
    let (start, end) = range.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_that_is_its_files_is_given_back() {
        let smaps = "\
1000-3000 r--p 00000000 fe:00 7 /bin/upcall
Anonymous:             0 kB
3000-5000 r-xp 00002000 fe:00 7 /bin/upcall
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
5000-6000 rw-p 00004000 fe:00 7 /bin/upcall
Anonymous:             0 kB
7000-9000 r-xp 00000000 fe:00 8 /lib/one with a breakpoint.so
Anonymous:             4 kB
9000-a000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
a000-b000 r-xp 00000000 00:00 0
Anonymous:             0 kB
b000-c000 r-xs 00000000 fe:00 9 /lib/shared.so
Anonymous:             0 kB
d000-f000 r-xp 00000000 fe:00 9 /lib/libc.so
Anonymous:             0 kB
";
        assert_eq!(unchanged_code(smaps), [0x3000..0x5000, 0xd000..0xf000]);
        assert_eq!(unchanged_code("nonsense\n\nzz-5 r-xp 0 0 0 /x\nAnonymous: 0 kB"), []);
    }

    /// Resident code, kB.
    fn resident_code_kb() -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_code = false;
        let mut sum = 0;
        for line in smaps.lines() {
            match line.split_ascii_whitespace().collect::<Vec<_>>()[..] {
                ["Rss:", kb, _] if is_code => sum += kb.parse::<u64>().unwrap(),
                [_, access, ..] if access.len() == 4 => is_code = access == "r-xp",
                _ => {}
            }
        }
        sum
    }

    #[test]
    fn code_is_given_back_and_runs_on() {
        // Code of this program all over its text: whatever of it was touched is resident.
        let before = resident_code_kb();
        give_back();
        let after = resident_code_kb();
        assert!(after < before, "{before} kB of code before, {after} after");
        only_code_that_is_its_files_is_given_back();
    }
}
