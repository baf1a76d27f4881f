//! The project of a filter in Rust: a crate, with a copy of the SDK that it builds with.

use std::path::Path;

use super::{File, fill};
use crate::failure::Failure;

/// The sources of the crate `upcall-sdk`: path in it, and text.
const SDK: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/sdk.rs"));

/// All files of the project; `sdk`: where the crate upcall-sdk is, for no copy of it.
pub fn files(name: &str, sdk: Option<&Path>) -> Result<Vec<File>, Failure> {
    let dependency = match sdk {
        None => "upcall-sdk".to_owned(),
        Some(path) => absolute(path)?,
    };
    let filled = |template| fill(template, name);
    let manifest = filled(include_str!("templates/rust/Cargo.toml"));
    let mut files = vec![
        // Debug writes a string as TOML takes it: quoted, with escapes.
        ("Cargo.toml".into(), manifest.replace("@SDK@", &format!("{dependency:?}"))),
        ("src/lib.rs".into(), filled(include_str!("templates/rust/lib.rs"))),
        ("README.md".into(), filled(include_str!("templates/rust/README.md"))),
        (".gitignore".into(), "/target\n".into()),
    ];
    if sdk.is_none() {
        let manifest = include_str!("templates/rust/sdk.toml");
        let manifest = manifest.replace("@VERSION@", env!("CARGO_PKG_VERSION"));
        files.push(("upcall-sdk/Cargo.toml".into(), manifest));
        files.extend(SDK.iter().map(|(path, text)| (format!("upcall-sdk/{path}"), (*text).into())));
    }
    Ok(files)
}

/// Where the build puts the filter.
pub fn built(name: &str) -> String {
    format!("target/debug/lib{}.so", name.replace('-', "_"))
}

fn absolute(sdk: &Path) -> Result<String, Failure> {
    let wrong = |what: &str| {
        Failure::new(format_args!(
            "--sdk {}: {what}; give the folder of the crate upcall-sdk, or leave --sdk out to \
             have a copy of it in the project",
            sdk.display()
        ))
    };
    let manifest = std::fs::read_to_string(sdk.join("Cargo.toml"))
        .map_err(|error| wrong(&format!("cannot read its Cargo.toml: {error}")))?;
    if !manifest.contains("name = \"upcall-sdk\"") {
        return Err(wrong("it is another crate"));
    }
    let path = sdk.canonicalize().map_err(|error| wrong(&error.to_string()))?;
    path.into_os_string().into_string().map_err(|_| wrong("its path is not plain text"))
}
