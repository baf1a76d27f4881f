//! Real guests, emulated: those of `tests/guest`, driven by its `guest-ctl`.
//!
//! Always true: a guest ends when its [`Vm`] is dropped, and by itself if everybody forgot it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::filters::root;

/// A guest may live this long, whatever happens to who started it.
const LIFETIME: Duration = Duration::from_secs(1200);

/// A running guest.
pub struct Vm {
    folder: PathBuf,
}

/// What a QEMU says of a guest that it has sent to another one.
#[derive(Clone, Copy, Debug)]
pub struct Moved {
    /// How long the guest stood still.
    pub downtime: Duration,
    /// From the first byte to the last.
    pub total: Duration,
}

impl Vm {
    /// Starts one with what its folder is to be and `guest-ctl start`'s options; does not wait
    /// for its boot.
    pub fn start(folder: &Path, options: &[String]) -> Result<Vm, String> {
        let vm = Vm { folder: folder.to_owned() };
        vm.ctl("start", &[&["--no-wait".to_owned()], options].concat())?;
        Ok(vm)
    }

    /// Waits until it can be used.
    pub fn wait(&self) -> Result<(), String> {
        self.ctl("wait", &[]).map(drop)
    }

    /// Runs a script in it; what that printed.
    pub fn run(&self, script: &str, patience: Duration) -> Result<String, String> {
        let patience = patience.as_secs().to_string();
        self.ctl("exec", &["--timeout".into(), patience, "-c".into(), script.into()])
    }

    /// Moves the guest to another one, which was started with `--incoming`.
    pub fn move_to(&self, other: &Vm) -> Result<Moved, String> {
        // Memory is copied as fast as it goes. What is left for the last step, and so most of
        // what the guest stands still for, is as much as QEMU is allowed.
        let words = ["--bandwidth", "1000000000", "--downtime", "300", "--timeout", "60"];
        let words = words.map(str::to_owned);
        let options = [&[other.folder.display().to_string()], &words[..]].concat();
        let said = self.ctl("migrate", &options)?;
        let nonsense = || format!("guest-ctl migrate said: {said}");
        let said: serde_json::Value = serde_json::from_str(&said).map_err(|_| nonsense())?;
        let time = |name: &str| said[name].as_u64().map(Duration::from_millis);
        match (time("downtime"), time("total-time")) {
            (Some(downtime), Some(total)) => Ok(Moved { downtime, total }),
            _ => Err(nonsense()),
        }
    }

    /// Its QEMU.
    pub fn pid(&self) -> Result<u32, String> {
        let file = self.folder.join("qemu.pid");
        let pid = std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok());
        pid.ok_or_else(|| format!("{}: no process", file.display()))
    }

    /// Ends it at once, as a power failure does; nothing if it has ended.
    pub fn end(&self) {
        let _ = self.ctl("kill", &[]);
    }

    fn ctl(&self, verb: &str, args: &[String]) -> Result<String, String> {
        let mut command = Command::new(root().join("tests/guest/guest-ctl"));
        command.arg(verb).arg(&self.folder).args(args);
        command.env("RIG_LIFETIME", LIFETIME.as_secs().to_string());
        let output = command.output().map_err(|error| format!("guest-ctl: {error}"))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(said);
        }
        let complaint = String::from_utf8_lossy(&output.stderr);
        Err(format!("guest-ctl {verb}: {}: {}{}", output.status, said, complaint.trim()))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.end();
    }
}
