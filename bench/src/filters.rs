//! The filters that are put into chains: built from `bench/filters/probe.c` when they are
//! needed, beside the benchmark's own program.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What a filter declares, and for which width it is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    /// What it wants of the data.
    pub data: Data,
    /// 64 or 32 bits.
    pub width: u32,
}

/// What a filter wants of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Data {
    /// Nothing.
    None,
    /// To see it.
    Sees,
    /// To change it.
    Changes,
    /// Nothing; and it asks for no operation but discard.
    Elsewhere,
}

impl Kind {
    /// One that sees no data, for 64 bits.
    pub const PLAIN: Kind = Kind { data: Data::None, width: 64 };

    /// One that wants data, for 64 bits.
    pub const fn with(data: Data) -> Kind {
        Kind { data, width: 64 }
    }
}

/// Builds filters into a folder.
#[derive(Clone, Debug)]
pub struct Filters {
    folder: PathBuf,
}

impl Filters {
    /// Into this folder, which is made if it is not there.
    pub fn new(folder: PathBuf) -> Result<Filters, String> {
        std::fs::create_dir_all(&folder)
            .map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
        Ok(Filters { folder })
    }

    /// The `number`-th filter of a kind. Filters of different numbers are different files,
    /// so that each gets a filter host of its own.
    pub fn build(&self, kind: Kind, number: usize) -> Result<PathBuf, String> {
        self.build_version(kind, number, 1)
    }

    /// The same filter in another version, which can take the place of the first.
    pub fn build_version(
        &self,
        kind: Kind,
        number: usize,
        version: u32,
    ) -> Result<PathBuf, String> {
        let Kind { data, width } = kind;
        let rw = "(UPCALL_OP_BIT(UPCALL_READ)|UPCALL_OP_BIT(UPCALL_WRITE))";
        let (word, declares) = match data {
            Data::None => ("none", vec![]),
            Data::Sees => ("sees", vec![format!("-DSEES={rw}")]),
            Data::Changes => (
                "changes",
                vec![
                    format!("-DSEES={rw}"),
                    format!("-DCHANGES={rw}"),
                    "-DCLASS=UPCALL_CLASS_ENCRYPTION".into(),
                ],
            ),
            Data::Elsewhere => {
                ("elsewhere", vec!["-DOPS=UPCALL_OP_BIT(UPCALL_DISCARD)".to_owned()])
            }
        };
        let name = match version {
            1 => format!("{word}-{width}-{number}.so"),
            _ => format!("{word}-{width}-{number}-version-{version}.so"),
        };
        let target = self.folder.join(name);
        let root = root();
        let source = root.join("bench/filters/probe.c");
        if is_newer(&target, &[&source, &root.join("sdk/c/include/upcall/filter.h")]) {
            return Ok(target);
        }
        let mut cc = Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
        cc.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"]);
        cc.arg(format!("-m{width}")).args(declares);
        cc.arg(format!("-DNAME=\"bench-{word}-{number}\""));
        cc.arg(format!("-DVERSION=\"{version}\""));
        cc.arg(format!("-I{}", root.join("sdk/c/include").display()));
        cc.arg("-o").arg(&target).arg(source);
        match cc.output() {
            Ok(output) if output.status.success() => Ok(target),
            Ok(output) => Err(format!(
                "the filter for {width} bits cannot be built (Debian: gcc-multilib): {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )),
            Err(error) => Err(format!("no C compiler: {cc:?}: {error}")),
        }
    }
}

/// Whether a file is there and newer than all that it is made of.
fn is_newer(target: &Path, sources: &[&Path]) -> bool {
    let changed = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    let built = changed(target);
    built.is_some() && sources.iter().all(|source| changed(source) < built)
}

/// The top of the source tree.
pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The folder of the programs that were built with this one.
pub fn programs() -> PathBuf {
    let folder = std::env::current_exe().ok().and_then(|own| own.parent().map(Path::to_owned));
    let mut folder = folder.unwrap_or_default();
    // A test lies in `deps`.
    if folder.ends_with("deps") {
        folder.pop();
    }
    folder
}
