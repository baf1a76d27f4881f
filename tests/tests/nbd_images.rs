//! Images of other formats, seen by NBD clients: what is a hole in the image is one for them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use upcall_tests::nbd::succeed;
use upcall_tests::{Filter, Kind, Rng, Scratch, Server};

const BYTES: u64 = 32 << 20;
const PIECE: u64 = 64 << 10;
/// Where there is data; far enough apart for the largest cluster.
const PLACES: [u64; 4] = [0, 4 << 20, 13 << 20, BYTES - PIECE];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A raw file with data at [`PLACES`].
fn source(scratch: &Scratch) -> PathBuf {
    let path = scratch.image("source.img", BYTES);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let mut rng = Rng::new(11);
    for at in PLACES {
        let bytes: Vec<u8> = (0..PIECE).map(|_| rng.next() as u8).collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, at).unwrap();
    }
    path
}

fn serve(scratch: &Scratch, words: &str, filters: &[String]) -> (Server, String) {
    let disk = format!("name=root,direct=off,nbd=unix:{}{words}", scratch.text("nbd.sock"));
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    let server = Server::serve(scratch, &[&disk], &filters);
    (server, format!("nbd+unix:///root?socket={}", scratch.text("nbd.sock")))
}

/// What the client is told: from where to where, and whether it reads as zeroes.
fn map(uri: &str) -> Vec<(u64, u64, bool)> {
    let map: Value = serde_json::from_str(&succeed("nbdinfo", &["--map", "--json", uri])).unwrap();
    let number = |part: &Value, key: &str| part[key].as_u64().unwrap();
    let parts = map.as_array().unwrap().iter().map(|part| {
        let at = number(part, "offset");
        (at, at + number(part, "length"), number(part, "type") & 2 != 0)
    });
    parts.collect()
}

fn zero_bytes(map: &[(u64, u64, bool)]) -> u64 {
    map.iter().filter(|part| part.2).map(|(from, to, _)| to - from).sum()
}

#[test]
fn a_sparse_disk_stays_sparse_on_its_way_in_and_out_of_every_kind() {
    for kind in Kind::WRITABLE {
        let scratch = Scratch::new();
        let source = source(&scratch);
        let image = kind.create(&scratch, "disk", BYTES);
        let (server, uri) = serve(&scratch, &kind.words(&image), &[]);
        // QEMU cannot tell what is in a VHDX.
        let tells = kind.format != "vhdx";
        // A flat file of QEMU's begins with a block of data.
        let empty = zero_bytes(&map(&uri));
        assert!(if tells { empty >= BYTES - PIECE } else { empty == 0 }, "{kind:?}: {empty}");
        // Most formats write zeroes as data.
        let copy = ["--flush", "--destination-is-zero", text(&source), &uri];
        succeed("nbdcopy", &copy);
        let map = map(&uri);
        assert_eq!(map.first().unwrap().0, 0);
        assert!(map.windows(2).all(|pair| pair[0].1 == pair[1].0), "{kind:?}: {map:?}");
        assert_eq!(map.last().unwrap().1, BYTES, "{kind:?}: {map:?}");
        for at in PLACES {
            let is_data = |part: &&(u64, u64, bool)| part.0 < at + PIECE && at < part.1 && !part.2;
            let told: u64 = map
                .iter()
                .filter(is_data)
                .map(|(from, to, _)| (*to).min(at + PIECE) - (*from).max(at))
                .sum();
            assert_eq!(told, PIECE, "{kind:?}: the data at {at} is called zeroes: {map:?}");
        }
        if tells {
            // Clusters are 2 MiB at the most (VHD), the rest is holes or zeroes.
            assert!(zero_bytes(&map) >= BYTES - 4 * (2 << 20), "{kind:?}: {map:?}");
        }
        let back = scratch.join("back.img");
        // Only from what block status says: it looks for no zeroes itself.
        succeed("nbdcopy", &["--sparse=0", &uri, text(&back)]);
        assert!(std::fs::read(&back).unwrap() == std::fs::read(&source).unwrap(), "{kind:?}");
        if tells {
            let bytes = back.metadata().unwrap().blocks() * 512;
            assert!(bytes <= 4 * (2 << 20), "{kind:?}: {bytes} bytes of the copy are no hole");
        }
        server.stop();
        kind.expect_sound(&image);
    }
}

#[test]
fn a_hole_shows_what_is_below_it() {
    let scratch = Scratch::new();
    let base = source(&scratch);
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let words = format!("{},backing=raw:{}", Kind::QCOW2.words(&image), base.display());
    let (server, uri) = serve(&scratch, &words, &[]);
    let map = map(&uri);
    for at in PLACES {
        let covers = |part: &&(u64, u64, bool)| part.0 <= at && at + PIECE <= part.1;
        assert!(map.iter().find(covers).is_some_and(|part| !part.2), "{at}: {map:?}");
    }
    assert!(zero_bytes(&map) > 28 << 20, "{map:?}");
    server.stop();
}

/// A filter that changes data makes something else of zeroes.
#[test]
fn behind_a_filter_that_changes_data_all_is_data() {
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let filters = [Filter::Xor.argument("root", &scratch)];
    let (server, uri) = serve(&scratch, &Kind::QCOW2.words(&image), &filters);
    assert_eq!(map(&uri), [(0, BYTES, false)]);
    server.stop();
}
