//! What a daemon can reach: the image's files, and what it needs to start. Nothing else.
//!
//! Landlock gives it files by identity, not by name: whatever path an image talks it into,
//! what it opens is one of ours or nothing. A system call filter takes away sockets and other
//! processes. Both hold for the thread that applies them and for what it starts, so they are
//! applied by the thread that starts daemons: see [`daemon`](crate::image::daemon).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use landlock::{
    ABI, Access, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

use crate::image::plan::Plan;

/// The newest rules of Landlock that are asked for; of older kernels, what they have.
const RULES: ABI = ABI::V6;

/// What a daemon's program needs to start.
#[derive(Debug)]
pub(crate) struct Program {
    pub path: PathBuf,
    /// Its libraries and loader.
    libraries: Vec<PathBuf>,
}

/// Why a daemon cannot be confined, or its program not be used.
pub(crate) type Reason = String;

impl Program {
    /// Finds a program and what it is linked with. `Ok(None)`: it is not installed.
    pub fn find(name: &Path) -> Result<Option<Program>, Reason> {
        let Some(path) = look_up(name) else { return Ok(None) };
        // The loader's own answer, as ldd asks for it; nothing of the program runs. A
        // program without a loader would run: then only to say its version.
        let output = Command::new(&path)
            .arg("--version")
            .env_clear()
            .env("LD_TRACE_LOADED_OBJECTS", "1")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let libraries = libraries(&String::from_utf8_lossy(&output.stdout));
        if libraries.is_empty() {
            return Err(format!("cannot find out the libraries of {}", path.display()));
        }
        Ok(Some(Program { path, libraries }))
    }

    /// Whether a library of this name, without its version, is among its own.
    pub fn is_linked_with(&self, name: &str) -> bool {
        let names = self.libraries.iter().filter_map(|path| path.file_name()?.to_str());
        names.filter_map(|file| file.strip_prefix(name)).any(|rest| rest.starts_with(".so"))
    }
}

fn look_up(name: &Path) -> Option<PathBuf> {
    if name.components().count() > 1 {
        return name.exists().then(|| name.to_owned());
    }
    let search = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    let found = std::env::split_paths(&search).map(|folder| folder.join(name));
    found.filter(|path| path.is_absolute()).find(|path| path.is_file())
}

/// Files in lines like `libc.so.6 => /lib/libc.so.6 (0x7f...)` and `/lib64/ld.so (0x7f...)`.
fn libraries(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let right = line.split_once("=> ").map_or(line, |(_, right)| right).trim();
        let path = right.rsplit_once(" (").map_or(right, |(path, _)| path);
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    text.lines().filter_map(path).collect()
}

/// Confines the calling thread, and what it starts from here on, for ever.
pub(crate) fn confine(program: &Program, plan: &Plan) -> Result<(), Reason> {
    restrict_files(program, plan).map_err(|what| {
        format!(
            "cannot confine it with Landlock ({what}): that needs Linux 5.13 with \
             CONFIG_SECURITY_LANDLOCK, and landlock among the lsm= of the kernel's command line"
        )
    })?;
    let filter = system_calls().map_err(|error| format!("cannot make its filter: {error}"))?;
    apply_filter(&filter).map_err(|error| format!("cannot filter its system calls: {error}"))
}

fn restrict_files(program: &Program, plan: &Plan) -> Result<(), String> {
    let said = |error: &dyn std::fmt::Display| error.to_string();
    let all = AccessFs::from_all(RULES);
    let file = AccessFs::from_file(RULES);
    let execute = AccessFs::Execute | AccessFs::ReadFile;
    let change = file & !AccessFs::Execute & !AccessFs::IoctlDev;
    let mut rules = Ruleset::default()
        .handle_access(all)
        .and_then(|rules| rules.scope(Scope::from_all(RULES)))
        .and_then(|rules| rules.create())
        .map_err(|error| said(&error))?;
    let mut allow = |path: &Path, access| -> Result<(), String> {
        match PathFd::new(path) {
            Ok(fd) => rules_add(&mut rules, PathBeneath::new(fd, access)),
            // It does without, or says so itself.
            Err(_) => Ok(()),
        }
    };
    allow(&program.path, execute)?;
    for library in &program.libraries {
        allow(library, execute)?;
    }
    allow(Path::new("/etc/ld.so.cache"), AccessFs::ReadFile.into())?;
    allow(Path::new("/dev/urandom"), AccessFs::ReadFile.into())?;
    allow(Path::new("/dev/null"), AccessFs::ReadFile | AccessFs::WriteFile)?;
    for allowed in plan.files() {
        let mut access = AccessFs::ReadFile.into();
        if allowed.is_writable {
            access = change;
        }
        if allowed.is_device {
            access |= AccessFs::IoctlDev;
        }
        rules_add(&mut rules, PathBeneath::new(&allowed.file, access))?;
    }
    let status = rules.restrict_self().map_err(|error| said(&error))?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err("the kernel has none".to_owned()),
        _ if !status.no_new_privs => Err("no_new_privs is refused".to_owned()),
        _ => Ok(()),
    }
}

fn rules_add<F: std::os::fd::AsFd>(
    rules: &mut landlock::RulesetCreated,
    rule: PathBeneath<F>,
) -> Result<(), String> {
    rules.add_rule(rule).map(|_| ()).map_err(|error| error.to_string())
}

/// No sockets, no other processes, nothing of the system's administration. Not a list of
/// what is needed: that is another with each version of QEMU and of the C library.
fn system_calls() -> Result<BpfProgram, String> {
    let refused = [
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_getfd,
        libc::SYS_kcmp,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_fsmount,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_open_by_handle_at,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_syslog,
        libc::SYS_acct,
        libc::SYS_quotactl,
    ];
    let rules: BTreeMap<i64, _> = refused.into_iter().map(|number| (number, vec![])).collect();
    let arch = std::env::consts::ARCH.try_into().map_err(|error| format!("{error:?}"))?;
    let eperm = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, eperm, arch);
    filter.and_then(TryInto::try_into).map_err(|error: seccompiler::BackendError| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_answer_is_read() {
        let text = "\tlinux-vdso.so.1 (0x00007f2c)\n\tliba.so.1 => /lib/x/liba.so.1 (0x7f)\n\
                    \tlibgone.so => not found\n\t/lib64/ld-linux-x86-64.so.2 (0x00)\n";
        let expected = ["/lib/x/liba.so.1", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(libraries(text), expected.map(PathBuf::from));
        assert!(libraries("\tstatically linked\n").is_empty());
    }

    #[test]
    fn a_library_is_known_by_its_name_whatever_its_version() {
        let libraries = ["/lib/liba.so.1", "/lib/libaio.so.1"].map(PathBuf::from).to_vec();
        let program = Program { path: PathBuf::new(), libraries };
        assert!(program.is_linked_with("libaio") && program.is_linked_with("liba"));
        assert!(!program.is_linked_with("libai") && !program.is_linked_with("lib"));
    }

    #[test]
    fn a_program_that_is_not_there_is_not_found() {
        assert!(Program::find(Path::new("upcall-no-such-program")).unwrap().is_none());
        assert!(Program::find(Path::new("/no/such/program")).unwrap().is_none());
    }
}
