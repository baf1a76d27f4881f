//! The text in which a VMDK names its extents.
//!
//! Of the format itself nothing is read here. But which files an image consists of must not
//! be the image's own choice: what it names is read, looked up by us, and the daemon gets a
//! text in which descriptors of ours stand for the names.
//!
//! Always true: a text made here names nothing but what it was given.

use std::fmt::Write;

/// Longer ones are refused; real ones are a few kilobytes.
pub(crate) const DESCRIPTOR_BYTES_MAX: usize = 64 << 10;
const EXTENTS_MAX: usize = 1024;

/// A descriptor file, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    lines: Vec<Line>,
}

#[derive(Debug, PartialEq, Eq)]
enum Line {
    Plain(String),
    Extent {
        /// Access, size and type.
        before: String,
        name: String,
        /// The offset, if there is one.
        after: String,
    },
}

/// Whether a file that begins so is a text with extents elsewhere. Otherwise it is one file
/// with everything inside (or no VMDK at all: that is for the daemon to say).
pub(crate) fn is_descriptor(start: &[u8]) -> bool {
    start.trim_ascii_start().starts_with(b"# Disk DescriptorFile")
}

impl Descriptor {
    /// Takes a text apart; the error says what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Descriptor, String> {
        if bytes.len() > DESCRIPTOR_BYTES_MAX {
            return Err(format!("its descriptor has more than {DESCRIPTOR_BYTES_MAX} bytes"));
        }
        // Some writers fill it up with zeroes.
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let text = std::str::from_utf8(&bytes[..end])
            .map_err(|_| "its descriptor is not text".to_owned())?;
        // QEMU's idea of where a line or a word begins must be ours.
        if text.contains(|c: char| c.is_control() && !['\n', '\r', '\t'].contains(&c)) {
            return Err("its descriptor has control characters".to_owned());
        }
        if text.lines().any(|line| line.trim_end().contains('\r')) {
            return Err("its descriptor has a carriage return inside a line".to_owned());
        }
        let lines = text.lines().map(line).collect::<Result<Vec<Line>, String>>()?;
        let descriptor = Descriptor { lines };
        match descriptor.extents().count() {
            0 => Err("its descriptor names no extent".to_owned()),
            count if count > EXTENTS_MAX => Err(format!("it has more than {EXTENTS_MAX} extents")),
            _ => Ok(descriptor),
        }
    }

    /// What it calls its extents, in their order. Plain names of files.
    pub fn extents(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().filter_map(|line| match line {
            Line::Extent { name, .. } => Some(name.as_str()),
            Line::Plain(_) => None,
        })
    }

    /// The text with other names. `names`: as many as there are extents, without quotes.
    pub fn with_names(&self, names: &[String]) -> String {
        let (mut text, mut names) = (String::new(), names.iter());
        for line in &self.lines {
            // Writing to a String does not fail.
            let _ = match line {
                // QEMU skips the end of an empty line as any white space, and would find what
                // is in the next line there, and then once more.
                Line::Plain(line) if line.is_empty() => Ok(()),
                Line::Plain(line) => writeln!(text, "{line}"),
                Line::Extent { before, after, .. } => {
                    let name = names.next().expect("a name for each extent");
                    writeln!(text, "{before} \"{name}\"{after}")
                }
            };
        }
        text
    }
}

/// The content id in a text, and where its eight digits are. It changes when the disk does.
pub fn content_id(bytes: &[u8]) -> Option<(usize, [u8; 8])> {
    let mut at = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        if let Some(rest) = line.strip_prefix(b"CID=")
            && let Some(digits) = rest.first_chunk::<8>()
            && digits.iter().all(u8::is_ascii_hexdigit)
        {
            return Some((at + 4, *digits));
        }
        at += line.len();
    }
    None
}

/// The extents that a descriptor names, and its text with other names in their place. For
/// the fuzz target.
#[cfg(feature = "fuzzing")]
pub fn rewrite(
    bytes: &[u8],
    name: impl Fn(usize) -> String,
) -> Result<(Vec<String>, String), String> {
    let descriptor = Descriptor::parse(bytes)?;
    let extents: Vec<String> = descriptor.extents().map(str::to_owned).collect();
    let names: Vec<String> = (0..extents.len()).map(name).collect();
    let text = descriptor.with_names(&names);
    Ok((extents, text))
}

fn line(text: &str) -> Result<Line, String> {
    let trimmed = text.trim();
    if trimmed.starts_with('"') {
        // For QEMU it could be the name of the extent in the line before.
        return Err("its descriptor has a line that begins with a quote".to_owned());
    }
    let first = trimmed.split_ascii_whitespace().next().unwrap_or("");
    if !["RW", "RDONLY", "NOACCESS"].contains(&first) {
        return Ok(plain(trimmed));
    }
    let shown = trimmed.chars().take(80).collect::<String>();
    let wrong = |what: &str| format!("its descriptor has an extent that {what}: {shown}");
    let mut words = trimmed.splitn(4, ' ');
    let (access, size, kind) = (words.next(), words.next(), words.next());
    let (Some(access), Some(size), Some(kind)) = (access, size, kind) else {
        return Err(wrong("has no size or type"));
    };
    // Words are what is between single spaces: no tab may hide in the first.
    if access != first || size.parse::<u64>().is_err() {
        return Err(wrong("has no size"));
    }
    if kind == "ZERO" && words.next().is_none() {
        return Ok(Line::Plain(format!("{access} {size} {kind}")));
    }
    if !["FLAT", "SPARSE"].contains(&kind) {
        return Err(wrong("is neither FLAT, SPARSE nor ZERO"));
    }
    let rest = words.next().unwrap_or("");
    let parts = rest.strip_prefix('"').and_then(|rest| rest.split_once('"'));
    let Some((name, after)) = parts else { return Err(wrong("has no name in quotes")) };
    let is_offset = after.is_empty()
        || after.strip_prefix(' ').is_some_and(|digits| digits.trim().parse::<u64>().is_ok());
    if !is_offset {
        return Err(wrong("has something odd behind its name"));
    }
    if name.is_empty() || name.contains(['/', '\0']) || name == "." || name == ".." {
        return Err(wrong("is not a plain file name"));
    }
    Ok(Line::Extent {
        before: format!("{access} {size} {kind}"),
        name: name.to_owned(),
        after: after.to_owned(),
    })
}

/// A line that names no extent.
fn plain(text: &str) -> Line {
    // The parent is said on our command line; its name here is of no use to anybody.
    let is_hint = text.starts_with("parentFileNameHint");
    Line::Plain(if is_hint { String::new() } else { text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=824d48f1\nparentCID=ffffffff\n\
         createType=\"twoGbMaxExtentFlat\"\n\n# Extent description\n\
         RW 4192256 FLAT \"a b-f001.vmdk\" 0\nRW 2048 ZERO\nRDONLY 2048 SPARSE \"x.vmdk\"\n\
         ddb.adapterType = \"ide\"\n";

    #[test]
    fn names_are_found_and_replaced() {
        let descriptor = Descriptor::parse(TEXT.as_bytes()).unwrap();
        assert_eq!(descriptor.extents().collect::<Vec<_>>(), ["a b-f001.vmdk", "x.vmdk"]);
        let text = descriptor.with_names(&["/proc/self/fd/7".into(), "/proc/self/fd/8".into()]);
        assert!(text.contains("RW 4192256 FLAT \"/proc/self/fd/7\" 0\n"), "{text}");
        assert!(text.contains("RDONLY 2048 SPARSE \"/proc/self/fd/8\"\n"), "{text}");
        assert!(text.contains("RW 2048 ZERO\n") && text.contains("ddb.adapterType"), "{text}");
        assert!(!text.contains("vmdk"), "{text}");
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for line in [
            "RW 2048 FLAT \"/etc/passwd\" 0",
            "RW 2048 FLAT \"../x\" 0",
            "RW 2048 FLAT \"..\" 0",
            "RW 2048 FLAT \"nbd://host/x\" 0",
            "RW 2048 FLAT \"\" 0",
            "RW 2048 FLAT x 0",
            "RW 2048 FLAT \"x\" 0 \"/etc/passwd\"",
            "RW 2048 FLAT \"x",
            "RW many FLAT \"x\" 0",
            "RW 2048",
            "RW 2048 VMFSRDM \"x\"",
            "  RW 2048 VMFS \"x\" 0",
            "RW\t2048 FLAT \"/etc/passwd\" 0",
            "RW\t) 2048 FLAT \"x\" 0",
            "\x0bRW 2048 FLAT \"/etc/passwd\" 0",
            "RW 2048 ZERO \"/etc/passwd\" 0",
            "RW\n2048 FLAT \"/etc/passwd\" 0",
            "x\rRW 2048 FLAT \"/etc/passwd\" 0",
            "RW 2048 FLAT \"a\rb\" 0",
            "RW 2048 ZERO\n\"/etc/passwd\" 0\nRW 2048 FLAT \"x\" 0",
        ] {
            let text = format!("# Disk DescriptorFile\n{line}\n");
            assert!(Descriptor::parse(text.as_bytes()).is_err(), "{line}");
        }
        assert!(Descriptor::parse(b"# Disk DescriptorFile\n").is_err(), "no extent");
        assert!(Descriptor::parse(&vec![b'a'; DESCRIPTOR_BYTES_MAX + 1]).is_err());
        assert!(Descriptor::parse(b"# Disk DescriptorFile\n\xff\n").is_err());
    }

    #[test]
    fn the_parents_name_is_dropped() {
        let text = TEXT.replace("version=1", "parentFileNameHint=\"/etc/passwd\"");
        let descriptor = Descriptor::parse(text.as_bytes()).unwrap();
        assert!(!descriptor.with_names(&["a".into(), "b".into()]).contains("passwd"));
    }

    /// QEMU would count an extent twice whose line is behind an empty one.
    #[test]
    fn no_line_is_empty() {
        let text = TEXT.replace("# Extent description\n", "\n \t\nparentFileNameHint=\"x\"\n");
        let descriptor = Descriptor::parse(text.as_bytes()).unwrap();
        let made = descriptor.with_names(&["a".into(), "b".into()]);
        assert!(made.lines().all(|line| !line.trim().is_empty()), "{made}");
    }

    #[test]
    fn a_content_id_is_found_at_its_place() {
        let (at, digits) = content_id(TEXT.as_bytes()).unwrap();
        assert_eq!((&TEXT.as_bytes()[at..at + 8], &digits), (&b"824d48f1"[..], b"824d48f1"));
        assert_eq!(content_id(b"parentCID=ffffffff\nCID=xyz\nCID=12"), None);
    }

    #[test]
    fn only_a_text_is_a_descriptor() {
        assert!(is_descriptor(TEXT.as_bytes()));
        assert!(!is_descriptor(b"KDMV\x01\0\0\0") && !is_descriptor(b"QFI\xfb"));
    }
}
