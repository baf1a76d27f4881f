//! A filter asks what its disk consists of, and is told what qemu-img says of the image.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use upcall_tests::{Kind, Scratch, Server, c_filter, qemu_img};

const SIZE: u64 = 64 << 20;

/// Where it begins and ends, and whether it reads as zeroes.
type Stretch = (u64, u64, bool);

fn compile(scratch: &Scratch) -> PathBuf {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let target = scratch.join("holes.so");
    let status = Command::new("cc")
        .args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-I"])
        .arg(root.join("sdk/c/include"))
        .arg("-o")
        .arg(&target)
        .arg(root.join("crates/upcall-worker/tests/data/holes.c"))
        .status()
        .unwrap();
    assert!(status.success());
    target
}

fn joined(all: impl Iterator<Item = Stretch>) -> Vec<Stretch> {
    let mut joined: Vec<Stretch> = Vec::new();
    for (begin, end, is_zero) in all {
        match joined.last_mut() {
            Some(last) if last.2 == is_zero && last.1 == begin => last.1 = end,
            _ => joined.push((begin, end, is_zero)),
        }
    }
    joined
}

fn mapped(image: &Path, format: &str) -> Vec<Stretch> {
    let map = qemu_img(&["map", "--output=json", "-f", format, image.to_str().unwrap()]);
    let map: Value = serde_json::from_str(&map).unwrap();
    joined(map.as_array().unwrap().iter().map(|part| {
        let begin = part["start"].as_u64().unwrap();
        (begin, begin + part["length"].as_u64().unwrap(), part["zero"] == true)
    }))
}

/// What the filter was told, in the order of the disk, when it was opened.
fn told(scratch: &Scratch, words: &str, below: &[String]) -> Vec<Stretch> {
    let disk = format!("name=d{words},socket={}", scratch.join("d.sock").display());
    let own = format!("disk=d,file={}", compile(scratch).display());
    let filters: Vec<&str> = std::iter::once(&own).chain(below).map(String::as_str).collect();
    let server = Server::serve(scratch, &[&disk], &filters);
    let said = server.stderr();
    server.stop();
    joined(said.lines().filter_map(|line| line.split_once("filter holes: extent ")).map(
        |(_, said)| {
            let numbers: Vec<u64> = said.split(' ').map(|word| word.parse().unwrap()).collect();
            (numbers[0], numbers[0] + numbers[1], numbers[2] != 0)
        },
    ))
}

fn sparse(scratch: &Scratch) -> PathBuf {
    let image = scratch.image("disk.img", SIZE);
    let file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
    for at in [0, 9 << 20, 40 << 20] {
        file.write_all_at(&vec![7; 1 << 20], at).unwrap();
    }
    file.sync_all().unwrap();
    image
}

#[test]
fn a_filter_sees_the_holes_of_a_sparse_file() {
    let scratch = Scratch::new();
    let image = sparse(&scratch);
    let expected = mapped(&image, "raw");
    assert_eq!(expected.len(), 6, "{expected:?}");
    assert_eq!(told(&scratch, &format!(",file={},direct=off", image.display()), &[]), expected);
}

#[test]
fn a_filter_sees_the_holes_of_a_qcow2_image() {
    let scratch = Scratch::new();
    let (from, image) = (sparse(&scratch), scratch.join("disk.qcow2"));
    let paths = [from.to_str().unwrap(), image.to_str().unwrap()];
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", paths[0], paths[1]]);
    let expected = mapped(&image, "qcow2");
    assert_eq!(expected.len(), 6, "{expected:?}");
    assert_eq!(told(&scratch, &Kind::QCOW2.words(&image), &[]), expected);
}

#[test]
fn all_is_data_above_a_filter_that_changes_data() {
    let scratch = Scratch::new();
    let image = sparse(&scratch);
    let words = format!(",file={},direct=off", image.display());
    let trace = format!("disk=d,file={}", c_filter("trace", 64).display());
    assert_eq!(told(&scratch, &words, &[trace]).len(), 6, "one that only looks hides nothing");
    // What the server before said stays behind in its folder.
    let scratch = Scratch::new();
    let image = sparse(&scratch);
    let words = format!(",file={},direct=off", image.display());
    let xor = format!("disk=d,file={}", c_filter("xor", 64).display());
    assert_eq!(told(&scratch, &words, &[xor]), [(0, SIZE, false)]);
}
