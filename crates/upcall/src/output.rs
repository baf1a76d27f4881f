//! Writing to standard output, where the reader may be gone.

use std::io::{self, Write};

use crate::failure::Failure;

/// Writes `text` and flushes, so that a script that reads line by line sees it now.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::of_output)
}

/// `bytes` for people: `64 MiB`, or `1000 bytes` if it is no whole number of anything.
pub fn size_text(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes != 0 && bytes.is_multiple_of(1 << shift)) {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_in_their_largest_whole_unit() {
        assert_eq!(size_text(1 << 30), "1 GiB");
        assert_eq!(size_text((1 << 30) + (1 << 20)), "1025 MiB");
        assert_eq!(size_text(1000), "1000 bytes");
        assert_eq!(size_text(0), "0 bytes");
    }
}
