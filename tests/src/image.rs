//! Images of QEMU's formats, made and judged by qemu-img, which no one here wrote.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::scratch::Scratch;

/// A format as `qemu-img create` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// What to say after `format=`.
    pub format: &'static str,
    /// For qemu-img's `-o`, or nothing.
    pub option: &'static str,
    /// Whether `qemu-img check` knows it.
    pub can_be_checked: bool,
    /// Whether the image names other files.
    pub has_extents: bool,
}

const fn kind(format: &'static str, option: &'static str) -> Kind {
    Kind { format, option, can_be_checked: true, has_extents: false }
}

const fn extents(option: &'static str) -> Kind {
    Kind { has_extents: true, ..kind("vmdk", option) }
}

impl Kind {
    /// The usual one.
    pub const QCOW2: Kind = kind("qcow2", "");

    /// All that can be written to.
    pub const WRITABLE: [Kind; 8] = [
        Kind::QCOW2,
        kind("vmdk", "subformat=monolithicSparse"),
        extents("subformat=monolithicFlat"),
        extents("subformat=twoGbMaxExtentSparse"),
        extents("subformat=twoGbMaxExtentFlat"),
        kind("vhdx", ""),
        kind("vdi", ""),
        // Otherwise its size is rounded to what cylinders and heads can say.
        Kind { can_be_checked: false, ..kind("vpc", "force_size=on") },
    ];

    /// Makes an empty image in `scratch`.
    pub fn create(&self, scratch: &Scratch, name: &str, bytes: u64) -> PathBuf {
        let path = scratch.join(name);
        let (text, size) = (path.to_str().unwrap(), bytes.to_string());
        let mut args = vec!["create", "-q", "-f", self.format];
        if !self.option.is_empty() {
            args.extend(["-o", self.option]);
        }
        args.extend([text, &size]);
        qemu_img(&args);
        path
    }

    /// What to say of the image after `--disk`, with a comma before it.
    pub fn words(&self, image: &Path) -> String {
        let folder = image.parent().unwrap().display();
        let extents = if self.has_extents { format!(",extents={folder}") } else { String::new() };
        format!(",file={},format={}{extents}", image.display(), self.format)
    }

    /// Expects that `qemu-img check` finds no error; leaked clusters are none.
    #[track_caller]
    pub fn expect_sound(&self, image: &Path) {
        if !self.can_be_checked {
            return;
        }
        let output = run(&["check", "-f", self.format, image.to_str().unwrap()]);
        // 0: sound; 3: leaked clusters, and nothing worse.
        let code = output.status.code();
        assert!(matches!(code, Some(0 | 3)), "{self:?}: {}", both(&output));
    }

    /// The image's content as a raw file.
    #[track_caller]
    pub fn to_raw(&self, scratch: &Scratch, image: &Path) -> PathBuf {
        let raw = scratch.join("content.raw");
        let (from, to) = (image.to_str().unwrap(), raw.to_str().unwrap());
        qemu_img(&["convert", "-f", self.format, "-O", "raw", from, to]);
        raw
    }
}

/// Runs qemu-img; it is to succeed.
#[track_caller]
pub fn qemu_img(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "qemu-img {args:?}: {}", both(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn run(args: &[&str]) -> Output {
    Command::new("qemu-img")
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("qemu-img: {error} (scripts/deps installs it)"))
}

fn both(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}
