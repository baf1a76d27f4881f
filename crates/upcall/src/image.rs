//! `upcall image`: make, look at, convert and check images. qemu-img does the work; here it is
//! told formats by name, and that a file name is one and no more.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use upcall_worker::{ImageFormat, Layer};

use crate::cli::{ImageCheckArgs, ImageCommand, ImageConvertArgs, ImageCreateArgs, ImageInfoArgs};
use crate::failure::Failure;

const PROGRAM: &str = "qemu-img";

/// Runs the command, and says what qemu-img said.
pub fn run(command: ImageCommand) -> Result<(), Failure> {
    let args = match &command {
        ImageCommand::Create(args) => create(args)?,
        ImageCommand::Info(args) => info(args)?,
        ImageCommand::Convert(args) => convert(args)?,
        ImageCommand::Check(args) => check(args)?,
    };
    let status = Command::new(PROGRAM).args(&args).stdin(Stdio::null()).status();
    let status = status.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Failure::new(
            "qemu-img, which does this, is not installed (or not in PATH): apt-get install \
             qemu-utils (Debian, Ubuntu), dnf install qemu-img (Fedora), pacman -S qemu-img (Arch)",
        ),
        _ => Failure::new(format_args!("cannot run qemu-img: {error}")),
    })?;
    match (status.success(), &command, status.code()) {
        (true, ..) => Ok(()),
        (_, ImageCommand::Check(args), Some(code)) => {
            Err(Failure::new(format_args!("{}: {}", args.file.display(), verdict(code))))
        }
        _ => Err(Failure::new(format_args!("qemu-img failed ({status}); what it said is above"))),
    }
}

/// What the exit codes of `qemu-img check` mean.
fn verdict(code: i32) -> &'static str {
    match code {
        2 => "it is damaged; --repair tries to mend it (copy it first)",
        3 => "it is sound, but holds space that nothing uses; --repair gives that back",
        63 => "images of this format cannot be checked",
        _ => "it could not be checked; what qemu-img said is above",
    }
}

fn create(args: &ImageCreateArgs) -> Result<Vec<OsString>, Failure> {
    let mut words = words(&["create", "-f", args.format.name()]);
    if args.file.exists() {
        return Err(Failure::new(format_args!(
            "{}: is there already; remove it first, or choose another name",
            args.file.display()
        )));
    }
    for option in &args.option {
        words.extend([OsString::from("-o"), option.into()]);
    }
    if let Some(Layer { format, path }) = &args.backing {
        if !args.format.can_have_backing() {
            return Err(Failure::new("only qcow2 and vmdk images can have another image below"));
        }
        words.extend([OsString::from("-b"), plain(path)?]);
        words.extend([OsString::from("-F"), format.name().into()]);
    }
    words.push(plain(&args.file)?);
    words.extend(args.size.map(|size| OsString::from(size.0.to_string())));
    if args.size.is_none() && args.backing.is_none() {
        return Err(Failure::new("give the image a SIZE, or an image below to take it from"));
    }
    Ok(words)
}

fn info(args: &ImageInfoArgs) -> Result<Vec<OsString>, Failure> {
    let output = if args.json { "--output=json" } else { "--output=human" };
    // Shared: it may be in use.
    let mut words = words(&["info", "-U", output, "-f", args.format.name()]);
    words.push(plain(&args.file)?);
    Ok(words)
}

fn convert(args: &ImageConvertArgs) -> Result<Vec<OsString>, Failure> {
    if args.to_file.exists() {
        return Err(Failure::new(format_args!(
            "{}: is there already; remove it first, or choose another name",
            args.to_file.display()
        )));
    }
    let mut words = words(&["convert", "-f", args.from.name(), "-O", args.to.name()]);
    for option in &args.option {
        words.extend([OsString::from("-o"), option.into()]);
    }
    words.extend([plain(&args.file)?, plain(&args.to_file)?]);
    Ok(words)
}

fn check(args: &ImageCheckArgs) -> Result<Vec<OsString>, Failure> {
    let mut words = words(&["check", "-f", args.format.name()]);
    if args.repair {
        words.extend([OsString::from("-r"), "all".into()]);
    }
    words.push(plain(&args.file)?);
    Ok(words)
}

/// The path in a way that QEMU can take for nothing else, such as a protocol or JSON.
fn plain(path: &Path) -> Result<OsString, Failure> {
    let path = std::path::absolute(path)
        .map_err(|error| Failure::new(format_args!("{}: {error}", path.display())))?;
    Ok(path.into())
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// The format of an image as it is said on the command line.
pub fn format(text: &str) -> Result<ImageFormat, String> {
    crate::serve::value(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    /// What qemu-img is told for a command line.
    fn told(line: &str) -> Result<String, String> {
        let words = ["upcall", "image"].into_iter().chain(line.split(' '));
        let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        let Command::Image(command) = cli.command else { panic!("{line}") };
        let args = match &command {
            ImageCommand::Create(args) => create(args),
            ImageCommand::Info(args) => info(args),
            ImageCommand::Convert(args) => convert(args),
            ImageCommand::Check(args) => check(args),
        };
        let args = args.map_err(|failure| failure.to_string())?;
        Ok(args.join(" ".as_ref()).into_string().unwrap())
    }

    #[test]
    fn qemu_img_is_told_formats_and_plain_files() {
        for (line, expected) in [
            ("create --format qcow2 /x/a 1G", "create -f qcow2 /x/a 1073741824"),
            (
                "create --format qcow2 --backing raw:/x/b /x/a",
                "create -f qcow2 -b /x/b -F raw /x/a",
            ),
            (
                "create --format vmdk --option subformat=monolithicFlat /x/a 1M",
                "create -f vmdk -o subformat=monolithicFlat /x/a 1048576",
            ),
            ("info --format vdi /x/a", "info -U --output=human -f vdi /x/a"),
            ("convert --from raw --to vhdx /x/a /x/b", "convert -f raw -O vhdx /x/a /x/b"),
            ("check --format qcow2 --repair /x/a", "check -f qcow2 -r all /x/a"),
        ] {
            assert_eq!(told(line).as_deref(), Ok(expected), "{line}");
        }
        let told = told("info --format raw nbd:host:1").unwrap();
        assert!(told.contains(" /"), "a name with a colon is a file: {told}");
    }

    #[test]
    fn what_would_be_guessed_or_lost_is_refused() {
        for (line, says) in [
            ("info /x/a", "--format"),
            ("create --format qcow2 /x/a", "SIZE"),
            ("create --format qed /x/a 1M", "qed"),
            ("create --format vdi --backing raw:/x/b /x/a", "only qcow2 and vmdk"),
            ("create --format qcow2 / 1M", "is there already"),
            ("convert --from raw --to qcow2 /x/a /", "is there already"),
        ] {
            let said = told(line).unwrap_err();
            assert!(said.contains(says), "{line}: {said}");
        }
    }
}
