//! Embeds the sources of `upcall-sdk`, so that `upcall filter new --lang rust` can put a
//! copy into the project it makes and the project builds anywhere.

use std::fmt::Write;
use std::path::{Path, PathBuf};

fn main() {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../upcall-sdk").canonicalize().unwrap();
    println!("cargo::rerun-if-changed={}", sdk.join("src").display());
    let mut files = Vec::new();
    collect(&sdk.join("src"), &mut files);
    files.sort();
    let mut list = String::from("&[\n");
    for file in files {
        let inside = file.strip_prefix(&sdk).unwrap();
        writeln!(list, "({inside:?}, include_str!({file:?})),").unwrap();
    }
    list += "]\n";
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap()).join("sdk.rs");
    std::fs::write(out, list).unwrap();
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}
