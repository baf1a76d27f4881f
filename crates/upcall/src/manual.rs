//! Manual pages and completions, made from the definition in [`crate::cli`].

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::failure::Failure;
use crate::output::print;

/// Writes one page for each command into `folder`.
pub fn write_pages(folder: &Path) -> Result<(), Failure> {
    let failed = |error| Failure::new(format_args!("{}: {error}", folder.display()));
    std::fs::create_dir_all(folder).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), folder).map_err(failed)
}

/// Prints the completions for a shell.
pub fn print_completions(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "upcall", &mut script);
    print(&String::from_utf8_lossy(&script))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn pages(folder: &Path) -> BTreeMap<String, String> {
        let entries = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
        let pages = entries.filter(|path| path.extension().is_some_and(|e| e == "1"));
        pages
            .map(|path| {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, std::fs::read_to_string(path).unwrap())
            })
            .collect()
    }

    #[test]
    fn the_manual_pages_in_the_tree_are_those_of_the_definition() {
        let folder = std::env::temp_dir().join(format!("upcall-man-{}", std::process::id()));
        write_pages(&folder).unwrap();
        let made = pages(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        let kept = pages(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/man")));
        let names = |pages: &BTreeMap<String, String>| pages.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&made), names(&kept), "update them: upcall man docs/man");
        for (name, text) in made {
            assert!(kept[&name] == text, "docs/man/{name} is out of date: upcall man docs/man");
        }
    }
}
