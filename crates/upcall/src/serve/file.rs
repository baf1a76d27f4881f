//! The configuration file: `[[disk]]` and `[[disk.filter]]` with the words of the flags.
//! Paths in it are as those in flags: relative to where the program was started.

use std::path::Path;

use serde::Deserialize;

use super::spec::DiskSpec;
use crate::failure::Failure;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    disk: Vec<DiskSpec>,
}

/// Reads the file.
pub fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path)
        .map_err(|error| Failure::new(format_args!("configuration {}: {error}", path.display())))
}

/// Checks `text`, which was read from `path`; errors name it, the line and the key.
pub fn disks(path: &Path, text: &str) -> Result<Vec<DiskSpec>, Failure> {
    parse(text)
        .map_err(|what| Failure::new(format_args!("configuration {}: {what}", path.display())))
}

fn parse(text: &str) -> Result<Vec<DiskSpec>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    if file.disk.is_empty() {
        return Err("it has no disk: write [[disk]], name = \"...\", file = \"...\"".into());
    }
    for disk in &file.disk {
        disk.check()?;
    }
    Ok(file.disk)
}

#[cfg(test)]
mod tests {
    use super::super::value::{Given, Mode};
    use super::*;

    #[test]
    fn a_file_says_what_flags_say() {
        let disks = parse(
            "[[disk]]\nname = \"root\"\nfile = \"a.img\"\nqueues = 2\ndirect = false\n\
             mode = 0o600\nreadonly = \"on\"\n\
             [[disk.filter]]\nfile = \"t.so\"\norder = 3\ngrant = \"b\"\n\
             params = { iops = 500, burst = \"1M\", strict = true, share = 0.25 }\n\
             [[disk.filter]]\nfile = \"u.so\"\ngrant = [\"b\", \"c\"]\n\
             [[disk]]\nname = \"b\"\nmemory = \"1G\"\n",
        )
        .unwrap();
        assert_eq!(disks.len(), 2);
        assert_eq!((disks[0].queues, disks[0].direct), (Some(Given(2)), Some(Given(false))));
        assert_eq!(disks[0].mode, Some(Given(Mode(0o600))));
        let [first, second] = &disks[0].filter[..] else { panic!("two filters") };
        let value = |name: &str| first.params.iter().find(|word| word.0 == name).unwrap().1.clone();
        assert_eq!([value("iops"), value("burst")], ["500", "1M"]);
        assert_eq!([value("strict"), value("share")], ["on", "0.25"]);
        assert_eq!((&first.grant[..], second.grant.len()), (&["b".to_owned()][..], 2));
    }

    #[test]
    fn a_wrong_file_is_named_with_line_and_key() {
        for (text, says) in [
            ("this is not toml", &["line 1"][..]),
            ("", &["no disk"]),
            ("[[disk]]\nname = \"r\"\ncolour = 1\n", &["line 3", "colour"]),
            ("[[disk]]\nname = \"r\"\nfile = \"x\"\nqueues = \"many\"\n", &["line 4", "many"]),
            ("[[disk]]\nfile = \"x\"\n", &["line 1", "name"]),
            ("[[disk]]\nname = \"r\"\n", &["disk r has no data"]),
            (
                "[[disk]]\nname = \"r\"\nfile = \"x\"\n[[disk.filter]]\nfile = \"f\"\nprio = 1\n",
                &["line 6", "prio"],
            ),
            ("[disks]\n", &["line 1", "disks"]),
        ] {
            let said = parse(text).unwrap_err();
            for word in says {
                assert!(said.contains(word), "{text:?} does not say {word:?}: {said}");
            }
        }
    }
}
