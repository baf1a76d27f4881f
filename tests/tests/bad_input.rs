//! What bad input gets: a message that names the thing and the way out, exit code 1 (2 for
//! wrong usage), and nothing half-created.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use upcall_tests::{
    Client, Driver, Scratch, Server, c_filter, rust_filter, upcall, upcall_program,
};

const BYTES: u64 = 16 << 20;

/// Expects that `upcall serve ARGS` refuses, naming each of `words`, and leaves `scratch`
/// as it was.
#[track_caller]
fn refused(scratch: &Scratch, code: i32, args: &[&str], words: &[&str]) {
    let before = scratch.names();
    let all: Vec<&str> = ["serve"].iter().chain(args).copied().collect();
    let ended = upcall(&all);
    assert_eq!(ended.code, Some(code), "{args:?}: {ended:#?}");
    for word in words {
        assert!(ended.stderr.contains(word), "{args:?} does not say {word:?}:\n{}", ended.stderr);
    }
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    assert!(!ended.stdout.contains("ready"), "{}", ended.stdout);
    assert_eq!(scratch.names(), before, "{args:?} leaves something behind");
}

struct Place {
    scratch: Scratch,
    image: PathBuf,
}

impl Place {
    fn new() -> Place {
        let scratch = Scratch::new();
        let image = scratch.image("disk.img", BYTES);
        Place { scratch, image }
    }

    /// A `--disk` that is right, with `more` behind it.
    fn disk(&self, more: &str) -> String {
        let socket = self.scratch.text("d.sock");
        format!("name=root,file={},socket={socket}{more}", self.image.display())
    }

    #[track_caller]
    fn refuses_filter(&self, filter: &Path, more: &str, words: &[&str]) {
        let filter = format!("disk=root,file={}{more}", filter.display());
        refused(&self.scratch, 1, &["--disk", &self.disk(""), "--filter", &filter], words);
    }
}

/// Compiles `source` to the shared object NAME.so.
fn compile(scratch: &Scratch, name: &str, source: &str, flags: &[&str]) -> PathBuf {
    let file = scratch.join(&format!("{name}.c"));
    std::fs::write(&file, source).unwrap();
    let target = scratch.join(&format!("{name}.so"));
    let include = concat!(env!("CARGO_MANIFEST_DIR"), "/../sdk/c/include");
    let status = Command::new("cc")
        .args(["-std=gnu11", "-fPIC", "-shared", "-I", include])
        .args(flags)
        .arg(&file)
        .arg("-o")
        .arg(&target)
        .status()
        .unwrap();
    assert!(status.success());
    target
}

/// A filter that does nothing.
const PLAIN_FILTER: &str = r#"
#include <upcall/filter.h>
static int32_t open_plain(struct upcall_instance *inst, void **self)
{ *self = inst; return 0; }
static uint32_t start_io(void *self, struct upcall_request *req)
{ (void)self; (void)req; return UPCALL_PASS; }
UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter), .abi_version = UPCALL_ABI_VERSION,
    .name = "plain", .version = "1", .vendor = "tests", .summary = "does nothing",
    .filter_class = UPCALL_CLASS_INSPECTION, .ops = UPCALL_OP_BIT(UPCALL_READ),
    .open = open_plain, .start_io = start_io };
"#;

#[test]
fn wrong_usage_is_exit_code_two() {
    let place = Place::new();
    let disk = place.disk("");
    for args in [
        &[][..],
        &["--no-such-flag"],
        &["--disk"],
        &["--disk", "file=/x,socket=/y"],
        &["--disk", "name=root,socket=/y"],
        &["--disk", &format!("{disk},colour=blue")],
        &["--disk", &format!("{disk},queues=many")],
        &["--disk", &format!("{disk},memory=1G")],
        &["--disk", &disk, "--filter", "disk=root"],
        &["--disk", &disk, "--filter", "file=/x.so"],
        &["--disk", &disk, "--filter", "disk=root,file=/x.so,order=first"],
        &["--disk", &disk, "--filter", "disk=root,file=/x.so,placement=outside"],
        &["--config"],
    ] {
        refused(&place.scratch, 2, args, &[]);
    }
    assert_eq!(upcall(&["no-such-command"]).code, Some(2));
    assert_eq!(upcall(&["--help"]).code, Some(0));
    assert_eq!(upcall(&["--version"]).code, Some(0));
}

#[test]
fn a_missing_image_is_named() {
    let place = Place::new();
    std::fs::remove_file(&place.image).unwrap();
    refused(&place.scratch, 1, &["--disk", &place.disk("")], &["root", "disk.img", "no such file"]);
}

#[test]
fn an_image_that_is_no_image_is_named() {
    let place = Place::new();
    std::fs::remove_file(&place.image).unwrap();
    std::fs::create_dir(&place.image).unwrap();
    refused(&place.scratch, 1, &["--disk", &place.disk("")], &["disk.img"]);
}

#[test]
fn a_busy_image_is_refused_and_its_owner_serves_on() {
    let place = Place::new();
    let other = place.scratch.text("other.sock");
    let server = Server::start(
        &place.scratch,
        &["--disk", &format!("name=first,file={},socket={other}", place.image.display())],
    );
    refused(&place.scratch, 1, &["--disk", &place.disk("")], &["root", "disk.img", "use"]);
    server.stop();
}

#[test]
fn one_image_for_two_disks_is_refused() {
    let place = Place::new();
    let second =
        format!("name=two,file={},socket={}", place.image.display(), place.scratch.text("e.sock"));
    refused(&place.scratch, 1, &["--disk", &place.disk(""), "--disk", &second], &["disk.img"]);
}

#[test]
fn a_size_that_is_no_multiple_of_the_sector_is_named() {
    let place = Place::new();
    std::fs::File::options().write(true).open(&place.image).unwrap().set_len(BYTES + 100).unwrap();
    refused(&place.scratch, 1, &["--disk", &place.disk("")], &["disk.img", "512"]);
    let socket = place.scratch.text("d.sock");
    refused(
        &place.scratch,
        1,
        &["--disk", &format!("name=m,memory=1000,socket={socket}")],
        &["512"],
    );
}

#[test]
fn an_empty_image_is_refused() {
    let place = Place::new();
    std::fs::File::options().write(true).open(&place.image).unwrap().set_len(0).unwrap();
    refused(&place.scratch, 1, &["--disk", &place.disk("")], &["disk.img"]);
}

#[test]
fn formats_are_never_probed() {
    // A guest that writes another format's header into its raw disk gains nothing.
    let place = Place::new();
    let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
    header.resize(BYTES as usize, 0);
    std::fs::write(&place.image, &header).unwrap();
    let server = Server::start(&place.scratch, &["--disk", &place.disk(",format=raw")]);
    let mut driver = Driver::usual(&place.scratch.join("d.sock"), 1);
    assert_eq!(driver.capacity(), BYTES);
    let read = driver.read(0, 0, 512);
    assert_eq!(read, header[..512]);
    drop(driver);
    server.stop();
    // What is not raw is not served as raw, nor guessed: it is wrong usage.
    refused(&place.scratch, 2, &["--disk", &place.disk(",format=qed")], &["qed", "raw, qcow2"]);
}

#[test]
fn a_file_that_is_no_socket_is_not_replaced() {
    let place = Place::new();
    std::fs::write(place.scratch.join("d.sock"), b"precious").unwrap();
    refused(&place.scratch, 1, &["--disk", &place.disk("")], &["d.sock"]);
    assert_eq!(std::fs::read(place.scratch.join("d.sock")).unwrap(), b"precious");
}

#[test]
fn a_socket_in_a_folder_that_is_missing_or_a_path_too_long_is_named() {
    let place = Place::new();
    let image = place.image.display();
    let missing = place.scratch.text("no/such/d.sock");
    let disk = format!("name=root,file={image},socket={missing}");
    refused(&place.scratch, 1, &["--disk", &disk], &["no/such/d.sock"]);
    let long = place.scratch.text(&"x".repeat(120));
    let disk = format!("name=root,file={image},socket={long}");
    refused(&place.scratch, 1, &["--disk", &disk], &["too long"]);
}

#[test]
fn a_duplicate_or_impossible_disk_name_is_named() {
    let place = Place::new();
    let second = format!("name=root,memory=1M,socket={}", place.scratch.text("e.sock"));
    refused(&place.scratch, 1, &["--disk", &place.disk(""), "--disk", &second], &["root"]);
    let odd = format!("name=ro/ot,memory=1M,socket={}", place.scratch.text("e.sock"));
    let ended = upcall(&["serve", "--disk", &odd]);
    assert!(matches!(ended.code, Some(1 | 2)), "{ended:#?}");
    assert!(ended.stderr.contains("ro/ot"), "{}", ended.stderr);
}

#[test]
fn impossible_queues_are_named() {
    let place = Place::new();
    for queues in ["0", "65"] {
        let ended = upcall(&["serve", "--disk", &place.disk(&format!(",queues={queues}"))]);
        assert!(matches!(ended.code, Some(1 | 2)), "{ended:#?}");
        assert!(ended.stderr.contains("64"), "{}", ended.stderr);
    }
    assert_eq!(place.scratch.names(), ["disk.img"]);
}

#[test]
fn a_filter_of_an_unknown_disk_or_a_grant_of_one_is_named() {
    let place = Place::new();
    let xor = c_filter("xor", 64);
    let filter = format!("disk=boot,file={}", xor.display());
    refused(&place.scratch, 1, &["--disk", &place.disk(""), "--filter", &filter], &["boot"]);
    place.refuses_filter(&xor, ",grant=elsewhere", &["elsewhere"]);
}

#[test]
fn a_missing_filter_is_named() {
    let place = Place::new();
    place.refuses_filter(Path::new("/nowhere/filter.so"), "", &["/nowhere/filter.so"]);
}

#[test]
fn a_file_that_is_no_shared_object_is_named() {
    let place = Place::new();
    let file = place.scratch.join("text.so");
    std::fs::write(&file, "this is no program\n").unwrap();
    place.refuses_filter(&file, "", &["text.so"]);
    std::fs::write(&file, "").unwrap();
    place.refuses_filter(&file, "", &["text.so"]);
}

#[test]
fn a_filter_of_a_newer_abi_is_refused() {
    let place = Place::new();
    for (name, version) in
        [("newer_minor", "UPCALL_ABI_VERSION + 1"), ("newer_major", "(UPCALL_ABI_MAJOR + 1) << 16")]
    {
        let source = PLAIN_FILTER.replace("= UPCALL_ABI_VERSION", &format!("= {version}"));
        let filter = compile(&place.scratch, name, &source, &[]);
        place.refuses_filter(&filter, "", &[name, "1.0"]);
    }
}

#[test]
fn a_filter_of_the_wrong_width_is_refused() {
    // Neither isolated nor inline can a filter for another machine run.
    let place = Place::new();
    let xor = c_filter("xor", 32);
    place.refuses_filter(&xor, ",placement=inline", &["32"]);
    let other = place.scratch.join("other.so");
    let mut bytes = std::fs::read(c_filter("xor", 64)).unwrap();
    bytes[18] = 0xb7; // e_machine: AArch64
    std::fs::write(&other, bytes).unwrap();
    place.refuses_filter(&other, "", &["other.so"]);
}

#[test]
fn a_missing_symbol_is_named() {
    let place = Place::new();
    let filter = compile(&place.scratch, "empty", "int nothing;", &[]);
    place.refuses_filter(&filter, "", &["empty.so", "upcall_filter"]);
    let source = PLAIN_FILTER.replacen(
        "#include <upcall/filter.h>",
        "#include <upcall/filter.h>\nint upcall_missing(void);",
        1,
    );
    let source =
        source.replace("*self = inst; return 0;", "*self = inst; return upcall_missing();");
    let filter = compile(&place.scratch, "unbound", &source, &[]);
    place.refuses_filter(&filter, "", &["unbound.so", "upcall_missing"]);
}

#[test]
fn an_unknown_or_wrong_parameter_is_named_before_anything_is_made() {
    let place = Place::new();
    let throttle = rust_filter("throttle");
    place.refuses_filter(&throttle, ",param.colour=blue", &["colour"]);
    place.refuses_filter(&throttle, ",param.iops=many", &["iops", "many"]);
    place.refuses_filter(&throttle, ",param.iops=-1", &["iops", "-1"]);
}

#[test]
fn a_filter_that_does_not_load_or_open_is_named() {
    let place = Place::new();
    for (name, from, to) in [
        ("no_open", "*self = inst; return 0;", "*self = inst; return -22;"),
        ("crash", "*self = inst; return 0;", "*self = inst; return *(volatile int *)8;"),
    ] {
        let source = PLAIN_FILTER.replace(from, to);
        let filter = compile(&place.scratch, name, &source, &[]);
        place.refuses_filter(&filter, "", &["root", "plain"]);
    }
}

#[test]
fn a_wrong_configuration_file_is_named_with_its_line() {
    let place = Place::new();
    let file = place.scratch.join("upcall.toml");
    for (text, words) in [
        ("this is not toml", &["upcall.toml"][..]),
        ("[[disk]]\nname = \"root\"\ncolour = \"blue\"\n", &["upcall.toml", "colour"]),
    ] {
        std::fs::write(&file, text).unwrap();
        refused(&place.scratch, 1, &["--config", file.to_str().unwrap()], words);
    }
    refused(&place.scratch, 1, &["--config", "/nowhere/upcall.toml"], &["/nowhere/upcall.toml"]);
}

#[test]
fn no_permission_for_the_image_is_named() {
    if !rustix::process::getuid().is_root() {
        let place = Place::new();
        let nothing = std::fs::Permissions::from_mode(0o000);
        std::fs::set_permissions(&place.image, nothing).unwrap();
        refused(&place.scratch, 1, &["--disk", &place.disk("")], &["disk.img", "ermission"]);
        return;
    }
    // Root may do anything: become nobody.
    let place = Place::new();
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(place.scratch.path(), open).unwrap();
    std::fs::set_permissions(&place.image, std::fs::Permissions::from_mode(0o600)).unwrap();
    // Nobody may not be able to reach the program where it is.
    let program = place.scratch.join("upcall");
    std::fs::copy(upcall_program(), &program).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&program)
        .args(["serve", "--disk", &place.disk("")])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("disk.img") && stderr.contains("ermission"), "{stderr}");
    assert!(!place.scratch.join("d.sock").exists());
}

#[test]
fn a_file_without_o_direct_is_named_if_it_is_asked_for() {
    // A pseudo file system never knows O_DIRECT, whatever the kernel.
    let place = Place::new();
    let socket = place.scratch.text("d.sock");
    let disk = format!("name=root,file=/proc/version,socket={socket},direct=on,readonly=on");
    refused(&place.scratch, 1, &["--disk", &disk], &["/proc/version"]);
}

/// `upcall serve` where io_uring_setup fails with EPERM, as under many containers' policy.
fn without_io_uring(args: &[&str]) -> Command {
    let filter = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let mut program = vec![
        filter(LOAD, 0), // the number of the system call
        libc::sock_filter { jf: 1, ..filter(EQUAL, libc::SYS_io_uring_setup as u32) },
        filter(RETURN, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        filter(RETURN, libc::SECCOMP_RET_ALLOW),
    ];
    let mut command = Command::new(upcall_program());
    command.arg("serve").args(args);
    // SAFETY: between fork and exec only prctl is called, on memory that the closure owns.
    unsafe {
        command.pre_exec(move || {
            let program =
                libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command
}

#[test]
fn forbidden_io_uring_is_named_if_it_is_asked_for_and_done_without_if_not() {
    let place = Place::new();
    let disk = place.disk(",engine=io_uring");
    let output = without_io_uring(&["--disk", &disk]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("io_uring") && stderr.contains("threads"), "{stderr}");
    assert_eq!(place.scratch.names(), ["disk.img"]);

    let server = Server::spawn(&place.scratch, without_io_uring(&["--disk", &place.disk("")]));
    let mut driver = Driver::usual(&place.scratch.join("d.sock"), 1);
    driver.write(0, 0, &[1; 4096]);
    assert_eq!(driver.read(0, 0, 4096), [1; 4096]);
    drop(driver);
    server.stop();
}
