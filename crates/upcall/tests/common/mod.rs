//! The program, run from outside; filters to run it with.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Ended {
        Ended {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_upcall"));
    command.args(args);
    command
}

/// Runs `upcall ARGS` to its end.
pub fn upcall(args: &[&str]) -> Ended {
    command(args).output().unwrap().into()
}

/// A folder that goes away.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("upcall-cli-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn text(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// Builds a filter in C from a source in the tree.
    pub fn filter(&self, name: &str, source: &str, flags: &[&str]) -> String {
        let target = self.0.join(format!("{name}.so"));
        let built = Command::new("cc")
            .args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"])
            .args(["-pthread", "-fvisibility=hidden"])
            .args(flags)
            .arg(format!("-I{ROOT}/sdk/c/include"))
            .arg(Path::new(ROOT).join(source))
            .arg("-o")
            .arg(&target)
            .status()
            .unwrap();
        assert!(built.success(), "{source} does not build");
        target.to_str().unwrap().to_owned()
    }

    pub fn names(&self) -> Vec<String> {
        let entries = self.0.read_dir().unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
