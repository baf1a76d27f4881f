//! What is served, and what to tell QEMU or libvirt to use it. To be pasted as it stands.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use upcall_worker::DiskSummary;

use super::plan::Place;
use crate::output::size_text;
use crate::words;

/// Describes all disks; `places` in the same order.
pub fn describe(
    disks: &[DiskSummary],
    places: &[Place],
    stats: &Path,
    control: Option<&Path>,
) -> String {
    let mut text = String::new();
    for (disk, place) in disks.iter().zip(places) {
        describe_disk(&mut text, disk, place);
    }
    let served: Vec<(&DiskSummary, PathBuf)> = disks
        .iter()
        .zip(places)
        .filter_map(|(disk, place)| match place {
            Place::Path(path) => Some((disk, std::path::absolute(path).unwrap_or(path.clone()))),
            Place::Inherited | Place::Nbd | Place::Granted => None,
        })
        .collect();
    if !served.is_empty() {
        text += "\nQEMU (size: the guest's memory, as in -m):\n";
        text += "  -object memory-backend-memfd,id=upcall-memory,size=2G,share=on \\\n";
        text += "  -machine memory-backend=upcall-memory";
        served.iter().for_each(|(disk, socket)| qemu(&mut text, disk, socket));
        text += "\n\nlibvirt, in <domain>:\n";
        text += "  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\n";
        text += "libvirt, in <devices>:\n";
        let names = ('a'..='z').map(|letter| format!("vd{letter}"));
        for ((disk, socket), name) in served.iter().zip(names) {
            libvirt(&mut text, disk, socket, &name);
        }
    }
    let _ = writeln!(text, "\nLive counters: upcall top {}", shell(&stats.display().to_string()));
    if let Some(control) = control {
        let control = shell(&control.display().to_string());
        let _ = writeln!(text, "Control: upcall show --control {control}");
    }
    text
}

// Writing to a String does not fail.

fn describe_disk(text: &mut String, disk: &DiskSummary, place: &Place) {
    let info = &disk.info;
    let _ = writeln!(
        text,
        "disk {}: {}, {}, blocks of {} bytes{}",
        disk.name,
        disk.store,
        size_text(info.capacity),
        info.block_size,
        if info.read_only { ", read-only" } else { "" }
    );
    let chain: Vec<&str> = std::iter::once("guest")
        .chain(disk.chain.iter().map(String::as_str))
        .chain(["store"])
        .collect();
    let _ = match place {
        Place::Granted => return text.push_str("  for filters that are granted it\n"),
        Place::Path(path) => writeln!(text, "  socket: {}", path.display()),
        Place::Inherited => writeln!(text, "  socket: inherited"),
        Place::Nbd => Ok(()),
    };
    let _ = match disk.nbd.as_deref() {
        None => Ok(()),
        Some("") => writeln!(text, "  nbd: inherited"),
        Some(uri) => writeln!(text, "  nbd: {uri}"),
    };
    let _ = writeln!(text, "  queues: {}", disk.queues);
    let _ = writeln!(text, "  offers: {}", info.ops);
    let _ = writeln!(text, "  chain:  {}", chain.join(" -> "));
}

fn qemu(text: &mut String, disk: &DiskSummary, socket: &Path) {
    // QEMU's ids begin with a letter and have neither commas nor equals signs.
    let id = format!("upcall-{}", disk.name);
    let path = words::escape(&socket.display().to_string());
    let chardev = format!("socket,id={id},path={path},reconnect=1");
    let _ = write!(text, " \\\n  -chardev {}", shell(&chardev));
    let _ =
        write!(text, " \\\n  -device vhost-user-blk-pci,chardev={id},num-queues={}", disk.queues);
}

/// `name`: libvirt wants one for each disk; the guest chooses its own.
fn libvirt(text: &mut String, disk: &DiskSummary, socket: &Path, name: &str) {
    let _ = writeln!(
        text,
        "  <disk type='vhostuser' device='disk'>\n    \
           <driver name='qemu' type='raw' queues='{}'/>\n    \
           <source type='unix' path='{}'><reconnect enabled='yes' timeout='1'/></source>\n    \
           <target dev='{name}' bus='virtio'/>\n  \
         </disk>",
        disk.queues,
        xml(&socket.display().to_string()),
    );
}

/// `word` as a shell takes it.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use upcall_block::{DiskInfo, OpSet};

    fn disk(name: &str) -> DiskSummary {
        DiskSummary {
            name: name.into(),
            info: DiskInfo {
                capacity: 1 << 30,
                block_size: 512,
                physical_block_size: 4096,
                read_only: true,
                ops: OpSet::ALL,
                discard_granularity: 4096,
            },
            store: "raw file a.img".into(),
            chain: vec!["trace".into(), "xor".into()],
            queues: 2,
            nbd: Some("nbd://localhost:10809/root".into()),
            socket: None,
        }
    }

    #[test]
    fn what_is_printed_can_be_pasted() {
        let places = [Place::Path("/run/a, b&'c.sock".into()), Place::Granted];
        let control = Some(Path::new("/run/x.control"));
        let disks = [disk("root"), disk("copy")];
        let text = describe(&disks, &places, Path::new("/run/x.stats"), control);
        assert!(text.contains("upcall show --control /run/x.control"), "{text}");
        for part in [
            "disk root: raw file a.img, 1 GiB, blocks of 512 bytes, read-only\n",
            "  chain:  guest -> trace -> xor -> store\n",
            "  nbd: nbd://localhost:10809/root\n",
            "disk copy: ",
            "  for filters that are granted it\n",
            r"-chardev 'socket,id=upcall-root,path=/run/a,, b&'\''c.sock,reconnect=1' \",
            "-device vhost-user-blk-pci,chardev=upcall-root,num-queues=2\n",
            "path='/run/a, b&amp;&apos;c.sock'",
            "queues='2'",
            "upcall top /run/x.stats\n",
        ] {
            assert!(text.contains(part), "no {part:?} in:\n{text}");
        }
        assert!(!text.contains("upcall-copy"), "{text}");
    }
}
