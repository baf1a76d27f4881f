//! NBD, seen by clients that no one here wrote: libnbd's programs, QEMU's, fio, nbdfuse.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use upcall_tests::nbd::{fail, nbdsh, run, succeed};
use upcall_tests::{CHAINS, Filter, Rng, Scratch, Server, rust_filter};

const BYTES: u64 = 32 << 20;

/// A disk served to NBD clients.
struct Export {
    scratch: Scratch,
    image: PathBuf,
    uri: String,
    server: Option<Server>,
}

impl Export {
    fn new(options: &str, chain: &[Filter]) -> Export {
        let scratch = Scratch::new();
        let filters: Vec<String> =
            chain.iter().map(|filter| filter.argument("root", &scratch)).collect();
        Export::with(scratch, options, &filters)
    }

    fn with(scratch: Scratch, options: &str, filters: &[String]) -> Export {
        let image = scratch.image("disk.img", BYTES);
        Export::of(scratch, image, options, filters)
    }

    fn of(scratch: Scratch, image: PathBuf, options: &str, filters: &[String]) -> Export {
        let disk = format!(
            "name=root,file={},direct=off,nbd=unix:{}{options}",
            image.display(),
            scratch.text("nbd.sock")
        );
        let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
        let server = Server::serve(&scratch, &[&disk], &filters);
        let uri = uri(&server);
        Export { scratch, image, uri, server: Some(server) }
    }

    /// Ends the server and gives the image as clients saw it.
    fn plain_image(&mut self, chain: &[Filter]) -> PathBuf {
        self.stop();
        let mut image = self.image.clone();
        for (index, filter) in chain.iter().enumerate() {
            if matches!(filter, Filter::Xor | Filter::Xor32 | Filter::XorInline) {
                let plain = self.scratch.join(&format!("plain{index}.img"));
                let unxor = upcall_tests::root().join("filters/xor/unxor.py");
                let status = Command::new("python3").arg(unxor).args([&image, &plain]).status();
                assert!(status.unwrap().success());
                image = plain;
            }
        }
        image
    }

    fn stop(&mut self) {
        self.server.take().unwrap().stop();
    }
}

/// The URI that the server prints.
fn uri(server: &Server) -> String {
    let line = server.stdout().lines().find_map(|line| line.trim().strip_prefix("nbd: "));
    line.unwrap_or_else(|| panic!("no URI in:\n{}", server.stdout())).to_owned()
}

/// An image with data and holes, the same each time.
fn sparse_image(scratch: &Scratch) -> PathBuf {
    let path = scratch.image("source.img", BYTES);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let mut rng = Rng::new(7);
    for at in [0, 3 << 20, (9 << 20) + 4096, 20 << 20, BYTES - 65536] {
        let bytes: Vec<u8> = (0..65536).map(|_| rng.next() as u8).collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, at).unwrap();
    }
    path
}

fn assert_same(one: &Path, other: &Path) {
    let same = std::fs::read(one).unwrap() == std::fs::read(other).unwrap();
    assert!(same, "{} and {} differ", one.display(), other.display());
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn nbdinfo_shows_what_is_offered() {
    let export = Export::new(",nbd-export=the disk", &[]);
    let info: Value = serde_json::from_str(&succeed("nbdinfo", &["--json", &export.uri])).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    assert_eq!(info["TLS"], false);
    let of = &info["exports"][0];
    assert_eq!((&of["export-name"], &of["export-size"]), (&"the disk".into(), &BYTES.into()));
    for (what, expected) in [
        ("is_read_only", false),
        ("can_flush", true),
        ("can_fua", true),
        ("can_trim", true),
        ("can_zero", true),
        ("can_fast_zero", true),
        ("can_multi_conn", true),
        ("can_cache", true),
        ("can_df", true),
        ("is_rotational", false),
    ] {
        assert_eq!(of[what], expected, "{what}: {info:#}");
    }
    assert_eq!(of["block_size_minimum"], 512);
    assert_eq!(of["block_size_preferred"], 4096);
    assert_eq!(of["block_size_maximum"], 4 << 20);
    assert_eq!(of["contexts"], serde_json::json!(["base:allocation"]));
    let list: Value =
        serde_json::from_str(&succeed("nbdinfo", &["--list", "--json", &export.uri])).unwrap();
    assert_eq!(list["exports"][0]["description"], "disk root of Upcall");
}

#[test]
fn one_server_has_several_exports_and_names_are_told_apart() {
    let scratch = Scratch::new();
    let socket = scratch.text("nbd.sock");
    let disk = |name: &str, size: &str| format!("name={name},memory={size},nbd=unix:{socket}");
    let (a, b) = (disk("a", "1M"), disk("b", "2M") + ",readonly=on");
    let server = Server::serve(&scratch, &[&a, &b], &[]);
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={socket}");
    assert_eq!(succeed("nbdinfo", &["--size", &uri("a")]), "1048576\n");
    assert_eq!(succeed("nbdinfo", &["--size", &uri("b")]), "2097152\n");
    assert!(!run("nbdinfo", &["--can", "write", &uri("b")]).status.success());
    fail("nbdinfo", &[&uri("c")]);
    let list: Value =
        serde_json::from_str(&succeed("nbdinfo", &["--list", "--json", &uri("")])).unwrap();
    assert_eq!(list["exports"].as_array().unwrap().len(), 2);
    server.stop();
}

#[test]
fn every_command_does_what_it_says() {
    let mut export = Export::new("", &[]);
    nbdsh(
        &export.uri,
        "
h.add_meta_context('base:allocation')
h.connect_uri(uri)
def status(count, offset, flags=0):
    seen = []
    h.block_status(count, offset, lambda name, at, entries, error: seen.extend(entries), flags)
    return seen
assert h.pread(512, 0) == bytearray(512)
assert status(h.get_size(), 0) == [h.get_size(), 3], status(h.get_size(), 0)
data = bytearray(i % 251 for i in range(1 << 20))
h.pwrite(data, 4 << 20)
assert h.pread(1 << 20, 4 << 20) == data
h.flush()
h.pwrite(data[:65536], 8 << 20, nbd.CMD_FLAG_FUA)
assert status(4 << 20, 4 << 20) == [1 << 20, 0, 3 << 20, 3], status(4 << 20, 4 << 20)
assert status(4 << 20, 4 << 20, nbd.CMD_FLAG_REQ_ONE) == [1 << 20, 0]
h.trim(65536, 4 << 20)
assert h.pread(65536, 4 << 20) == bytearray(65536)
h.trim(65536, (4 << 20) + 65536, nbd.CMD_FLAG_FUA)
assert status(131072, 4 << 20) == [131072, 3]
h.zero(65536, 8 << 20)
assert h.pread(65536, 8 << 20) == bytearray(65536)
h.pwrite(data[:65536], 8 << 20)
h.zero(65536, 8 << 20, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(65536, 8 << 20) == bytearray(65536)
h.pwrite(data[:65536], 8 << 20)
h.zero(65536, 8 << 20, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(65536, 8 << 20) == bytearray(65536)
h.cache(8 << 20, 0)
# The largest there is.
big = bytearray(4 << 20)
big[:1 << 20] = data
h.pwrite(big, 16 << 20)
assert h.pread(4 << 20, 16 << 20) == big
seen = []
h.pread_structured(65536, 16 << 20, lambda data, at, kind, error: seen.append(len(data)), nbd.CMD_FLAG_DF)
assert seen == [65536]
# Many at once.
buffers = [nbd.Buffer(65536) for _ in range(64)]
cookies = {h.aio_pread(buffer, (16 << 20) + i * 4096) for i, buffer in enumerate(buffers)}
while cookies:
    h.poll(-1)
    for cookie in list(cookies):
        if h.aio_command_completed(cookie):
            cookies.remove(cookie)
for i, buffer in enumerate(buffers):
    assert buffer.to_bytearray() == big[i * 4096:i * 4096 + 65536]
h.shutdown()
",
    );
    export.stop();
    let image = std::fs::read(&export.image).unwrap();
    assert!(image[16 << 20..17 << 20].iter().enumerate().all(|(i, b)| *b == (i % 251) as u8));
}

#[test]
fn every_wrong_command_gets_its_error_and_the_next_is_served() {
    let export = Export::new("", &[]);
    nbdsh(
        &export.uri,
        "
h.add_meta_context('base:allocation')
h.connect_uri(uri)
h.set_strict_mode(0)
size = h.get_size()
ignore = lambda *args: 0
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.EINVAL, h.pread, 1024, size - 512)
fails(errno.EINVAL, h.pread, 100, 0)
fails(errno.EINVAL, h.pread, 512, 7)
fails(errno.EINVAL, h.pread, (4 << 20) + 512, 0)
fails(errno.ENOSPC, h.pwrite, bytearray(512), size)
fails(errno.EINVAL, h.pwrite, bytearray(512), 7)
fails(errno.EINVAL, h.pwrite, bytearray((4 << 20) + 512), 0)
fails(errno.EINVAL, h.pwrite, bytearray(512), 0, nbd.CMD_FLAG_REQ_ONE)
fails(errno.EINVAL, h.trim, 512, size)
fails(errno.ENOSPC, h.zero, 512, size)
fails(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
fails(errno.EINVAL, h.cache, 512, size)
fails(errno.EINVAL, h.block_status, 512, size, ignore)
fails(errno.EINVAL, h.block_status, 0, 0, ignore)
fails(errno.EINVAL, h.flush, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(512, size - 512) == bytearray(512)
# Without what was not agreed on.
g = nbd.NBD()
g.set_request_structured_replies(False)
g.connect_uri(uri)
g.set_strict_mode(0)
fails(errno.EINVAL, g.pread, 512, 0, nbd.CMD_FLAG_DF)
fails(errno.EINVAL, g.pread, 512, size)
assert g.pread(512, 0) == bytearray(512)
",
    );
    drop(export);
    let export = Export::new(",nbd-readonly=on", &[]);
    nbdsh(
        &export.uri,
        "
h.connect_uri(uri)
assert h.is_read_only()
h.set_strict_mode(0)
fails(errno.EPERM, h.pwrite, bytearray(512), 0)
fails(errno.EPERM, h.zero, 512, 0)
fails(errno.EPERM, h.trim, 512, 0)
h.flush()
assert h.pread(512, 0) == bytearray(512)
",
    );
}

#[test]
fn what_fails_below_is_told_to_the_client() {
    for (given, expected) in [
        ("EIO", "errno.EIO"),
        ("ENOSPC", "errno.ENOSPC"),
        ("EROFS", "errno.EPERM"),
        ("ETIMEDOUT", "errno.EIO"),
        ("EOPNOTSUPP", "errno.ENOTSUP"),
    ] {
        let fault = rust_filter("fault");
        let filter = format!("disk=root,file={},param.errno={given}", fault.display());
        let export = Export::with(Scratch::new(), "", &[filter]);
        nbdsh(
            &export.uri,
            &format!(
                "
h.connect_uri(uri)
said = fails({expected}, h.pread, 512, 0)
fails({expected}, h.pwrite, bytearray(512), 0)
fails({expected}, h.pwrite, bytearray(512), 0, nbd.CMD_FLAG_FUA)
fails({expected}, h.flush)
fails({expected}, h.trim, 4096, 0)
fails({expected}, h.zero, 4096, 0)
fails({expected}, h.cache, 4096, 0)
g = nbd.NBD()
g.set_request_structured_replies(False)
g.connect_uri(uri)
fails({expected}, g.pread, 512, 0)
"
            ),
        );
    }
}

#[test]
fn nbdcopy_copies_both_ways_through_every_chain() {
    for (number, chain) in CHAINS.into_iter().enumerate() {
        let scratch = Scratch::new();
        let source = sparse_image(&scratch);
        let mut export = Export::new("", chain);
        let connections = if number % 2 == 0 { "--connections=1" } else { "--connections=4" };
        succeed("nbdcopy", &[connections, "--flush", text(&source), &export.uri]);
        let back = scratch.join("back.img");
        succeed("nbdcopy", &[connections, &export.uri, text(&back)]);
        assert_same(&source, &back);
        assert_same(&source, &export.plain_image(chain));
    }
}

#[test]
fn what_was_a_hole_is_one_after_the_copy() {
    let scratch = Scratch::new();
    let source = sparse_image(&scratch);
    let mut export = Export::of(Scratch::new(), source.clone(), "", &[]);
    let back = scratch.join("back.img");
    // From our holes, as told by block status; nothing else would skip them.
    succeed("nbdcopy", &["--sparse=0", &export.uri, text(&back)]);
    export.stop();
    assert_same(&source, &back);
    let blocks = |path: &Path| std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap());
    assert!(blocks(&back) * 512 < 2 << 20, "{} blocks", blocks(&back));
}

#[test]
fn qemu_converts_compares_maps_and_measures() {
    let scratch = Scratch::new();
    let source = sparse_image(&scratch);
    let mut export = Export::new("", &[]);
    let uri = export.uri.clone();
    succeed("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&source), &uri]);
    let same = succeed("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &uri]);
    assert!(same.contains("identical"), "{same}");
    let map = succeed("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let map = map.as_array().unwrap();
    assert!(map.len() >= 9, "data and holes: {map:?}");
    assert!(map.iter().any(|part| part["data"] == false && part["zero"] == true));
    let back = scratch.join("back.qcow2");
    succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, text(&back)]);
    succeed("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&source), text(&back)]);
    succeed("qemu-img", &["bench", "-c", "2000", "-d", "32", "-s", "4096", "-f", "raw", &uri]);
    let bench = ["bench", "-w", "-c", "1000", "-d", "16", "--flush-interval=50", "-f", "raw", &uri];
    succeed("qemu-img", &bench);
    export.stop();
}

#[test]
fn qemu_io_reads_back_what_it_wrote() {
    let mut export = Export::new("", &[Filter::Trace, Filter::Xor, Filter::Throttle]);
    let commands = [
        "write -P 17 0 1M",
        "write -f -P 18 1M 64k",
        "aio_write -P 19 2M 4M",
        "aio_flush",
        "write -z -u 512k 64k",
        "write -z 600k 4k",
        "discard 768k 64k",
        "flush",
        "read -P 17 0 512k",
        "read -P 0 512k 64k",
        "read -P 0 600k 4k",
        "read -P 18 1M 64k",
        "read -P 19 2M 4M",
    ];
    let mut args = vec!["-f", "raw"];
    args.extend(commands.iter().flat_map(|command| ["-c", *command]));
    args.push(&export.uri);
    let said = succeed("qemu-io", &args);
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    export.stop();
}

#[test]
fn fio_verifies_what_it_wrote() {
    for chain in [&[][..], &[Filter::Trace, Filter::Xor, Filter::Throttle]] {
        let mut export = Export::new("", chain);
        let uri = format!("--uri={}", export.uri);
        let args = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randrw",
            "--bsrange=512-128k",
            "--iodepth=16",
            "--size=16M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--fsync=64",
            "--output-format=terse",
            "--verify_state_save=0",
        ];
        succeed("fio", &args);
        export.stop();
    }
}

#[test]
fn a_file_system_lives_on_nbdfuse() {
    let scratch = Scratch::new();
    let mut export = Export::new("", &[Filter::Xor]);
    let (folder, mounted) = (scratch.join("fuse"), scratch.join("mounted"));
    std::fs::create_dir(&folder).unwrap();
    std::fs::create_dir(&mounted).unwrap();
    let file = folder.join("nbd");
    let mut fuse =
        Command::new("nbdfuse").args([text(&file), &export.uri]).spawn().expect("nbdfuse");
    let deadline = Instant::now() + Duration::from_secs(10);
    while !file.exists() {
        if let Some(status) = fuse.try_wait().unwrap() {
            // Inside some containers nothing can be mounted.
            eprintln!("nbdfuse cannot be used here ({status}): not tested");
            return;
        }
        assert!(Instant::now() < deadline, "nbdfuse does not mount");
        std::thread::sleep(Duration::from_millis(20));
    }
    succeed("mkfs.ext4", &["-q", "-F", text(&file)]);
    let is_mounted = run("mount", &["-o", "loop", text(&file), text(&mounted)]).status.success();
    if is_mounted {
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 241) as u8).collect();
        std::fs::write(mounted.join("file"), &bytes).unwrap();
        succeed("umount", &[text(&mounted)]);
        succeed("mount", &["-o", "loop", text(&file), text(&mounted)]);
        let same = std::fs::read(mounted.join("file")).unwrap() == bytes;
        succeed("umount", &[text(&mounted)]);
        assert!(same, "the file is another");
    } else {
        eprintln!("no loop device to be had: the file system is only checked");
    }
    succeed("fusermount3", &["-u", text(&folder)]);
    assert!(fuse.wait().unwrap().success());
    let plain = export.plain_image(&[Filter::Xor]);
    succeed("e2fsck", &["-f", "-n", text(&plain)]);
}
