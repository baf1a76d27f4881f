//! `upcall filter new`: a project that builds and passes its check at once.
//!
//! The folder appears whole or not at all: it is made under another name beside its place
//! and renamed.

mod c;
mod rust;

use std::io;
use std::path::{Path, PathBuf};

use crate::cli::{Language, NewArgs};
use crate::failure::Failure;
use crate::output::print;

/// A file of the project: path inside it, and text.
type File = (String, String);

const NAME_MAX: usize = 31;

/// Makes the project and says what to do next.
pub fn run(args: NewArgs) -> Result<(), Failure> {
    let folder = args.dir.unwrap_or_else(|| PathBuf::from(&args.name));
    let (files, built) = match args.lang {
        Language::C if args.sdk.is_some() => {
            return Err(Failure::new("--sdk is for --lang rust: a C filter needs one header only"));
        }
        Language::C => (c::files(&args.name), c::built(&args.name)),
        Language::Rust => (rust::files(&args.name, args.sdk.as_deref())?, rust::built(&args.name)),
    };
    make(&folder, &files)?;
    let build = match args.lang {
        Language::C => "make",
        Language::Rust => "cargo build",
    };
    print(&format!(
        "made {0}: begin with its README.md\n\nnext:\n  cd {0}\n  {build}\n  upcall filter check {built}\n",
        folder.display()
    ))
}

/// For the parser: whether a filter may be called this.
pub fn check_name(name: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let begins = name.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
    if begins && name.len() <= NAME_MAX && name.bytes().all(fits) && !name.ends_with('-') {
        Ok(name.to_owned())
    } else {
        Err(format!(
            "use a-z, 0-9 and -, at most {NAME_MAX} characters, a letter first, no - at the end"
        ))
    }
}

/// Puts the filter's name into a template: `@NAME@` as it is, `@IDENT@` as an identifier,
/// `@TYPE@` as the name of a type.
fn fill(template: &str, name: &str) -> String {
    let type_name: String = name
        .split('-')
        .map(|part| part[..part.len().min(1)].to_uppercase() + part.get(1..).unwrap_or(""))
        .collect();
    template
        .replace("@NAME@", name)
        .replace("@IDENT@", &name.replace('-', "_"))
        .replace("@TYPE@", &type_name)
}

fn make(folder: &Path, files: &[File]) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::new(format_args!("{}: {error}", folder.display()));
    match folder.read_dir().map(|mut entries| entries.next().is_none()) {
        Ok(true) => {}
        Ok(false) => {
            return Err(Failure::new(format_args!(
                "{}: is there and not empty; choose another folder with --dir",
                folder.display()
            )));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let absolute = std::path::absolute(folder).map_err(failed)?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    };
    let unfinished = parent.join(format!(".{}.new-{}", name.to_string_lossy(), std::process::id()));
    let made = write_all(&unfinished, files).and_then(|()| std::fs::rename(&unfinished, &absolute));
    made.map_err(|error| {
        // What cannot be removed either was not ours to make.
        let _ = std::fs::remove_dir_all(&unfinished);
        failed(error)
    })
}

fn write_all(folder: &Path, files: &[File]) -> io::Result<()> {
    std::fs::create_dir(folder)?;
    for (path, text) in files {
        let path = folder.join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(path, text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_a_filter_may_have() {
        for name in ["a", "my-filter", "x9", &"a".repeat(31)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", "9x", "-a", "a-", "My", "a_b", "a/b", "ä", ".", &"a".repeat(32)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn templates_are_filled_with_the_name() {
        assert_eq!(fill("@NAME@ @IDENT@ @TYPE@", "my-own-2"), "my-own-2 my_own_2 MyOwn2");
    }

    #[test]
    fn nothing_is_left_of_a_project_that_cannot_be_written() {
        let parent = std::env::temp_dir().join(format!("upcall-new-{}", std::process::id()));
        std::fs::create_dir(&parent).unwrap();
        // A file where the next one needs a folder.
        let files = [("a".to_owned(), String::new()), ("a/b".to_owned(), String::new())];
        assert!(make(&parent.join("mine"), &files).is_err());
        let left = parent.read_dir().unwrap().count();
        std::fs::remove_dir_all(&parent).unwrap();
        assert_eq!(left, 0);
    }

    #[test]
    fn no_template_keeps_a_placeholder() {
        for (path, text) in
            c::files("my-own").into_iter().chain(rust::files("my-own", None).unwrap())
        {
            for word in ["@NAME@", "@IDENT@", "@TYPE@", "@SDK@"] {
                assert!(!text.contains(word) && !path.contains(word), "{path}");
            }
        }
    }
}
