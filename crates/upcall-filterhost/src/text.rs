//! Text from filters, made safe to print.
//!
//! A filter is not trusted, and an operator's terminal obeys escape sequences: nothing that
//! a filter wrote is shown before it went through here.

use std::path::Path;

/// At most `bytes_max` bytes of `text`, on one line: control characters, and those that
/// reorder text, become `\u{fffd}`; what is cut shows as `…`.
pub fn clean(text: &[u8], bytes_max: usize) -> String {
    let mut out = String::new();
    for char in String::from_utf8_lossy(text).trim_end().chars() {
        let char = if is_unprintable(char) { '\u{fffd}' } else { char };
        if out.len() + char.len_utf8() > bytes_max {
            out.push('…');
            break;
        }
        out.push(char);
    }
    out
}

pub(crate) fn clean_path(path: &Path) -> String {
    clean(path.as_os_str().as_encoded_bytes(), 4096)
}

fn is_unprintable(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_and_reordering_lose_their_power() {
        assert_eq!(clean(b"\x1b[2Jhello\nworld\x07", 99), "\u{fffd}[2Jhello\u{fffd}world\u{fffd}");
        assert_eq!(clean("a\u{202e}b\u{9b}c".as_bytes(), 99), "a\u{fffd}b\u{fffd}c");
        assert_eq!(clean(b"fine: \xc3\xa9 \n", 99), "fine: é");
        assert_eq!(clean(b"\xff\xfe", 99), "\u{fffd}\u{fffd}");
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        assert_eq!(clean("éééé".as_bytes(), 5), "éé…");
        assert_eq!(clean(b"abc", 3), "abc");
    }
}
