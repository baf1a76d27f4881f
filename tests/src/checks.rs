//! What any disk must do for any client; tests run these with each of them.

use crate::client::{Client, Io, Outcome};
use crate::pattern::Pattern;
use crate::raw::{Part, RawClient, header, kind, range, status};

const MIB: u64 = 1 << 20;

/// Each operation works, and does to its range and only to its range what it says. Needs a
/// disk of 16 MiB of zeroes at least, and leaves the first 16 MiB as zeroes.
#[track_caller]
pub fn operations_do_what_they_say(client: &mut dyn Client) {
    let pattern = Pattern::new(1);
    let content = |sector: u64, length: usize| {
        let mut bytes = vec![0; length];
        pattern.fill(sector, 1, &mut bytes);
        bytes
    };
    for queue in 0..client.queues() {
        // Lengths from one sector to the client's most, at places that are not aligned.
        let mut sector = 1;
        for length in [512, 1024, 4096, 12800, 65536, 262144] {
            client.write(queue, sector * 512, &content(sector, length));
            assert_eq!(client.read(queue, sector * 512, length), content(sector, length));
            sector += length as u64 / 512 + 3;
        }
        assert_eq!(client.run(queue, Io::Flush), Outcome::Ok);

        for (number, io) in [
            Io::Discard { offset: 5 * MIB + 4096, length: 8192 },
            Io::WriteZeroes { offset: 5 * MIB + 4096, length: 8192, unmap: false },
            Io::WriteZeroes { offset: 5 * MIB + 4096, length: 8192, unmap: true },
            Io::WriteZeroes { offset: 5 * MIB + 4096, length: 8192, unmap: false },
        ]
        .into_iter()
        .enumerate()
        {
            let sector = 5 * MIB / 512;
            client.write(queue, 5 * MIB, &content(sector, 16384));
            assert_eq!(client.run(queue, io), Outcome::Ok, "{io:?}");
            let bytes = client.read(queue, 5 * MIB, 16384);
            assert_eq!(bytes[..4096], content(sector, 16384)[..4096], "{number}: before {io:?}");
            assert_eq!(bytes[12288..], content(sector, 16384)[12288..], "{number}: behind {io:?}");
            assert!(bytes[4096..12288].iter().all(|&byte| byte == 0), "{number}: {io:?}");
        }
        let all = Io::WriteZeroes { offset: 0, length: 16 * MIB, unmap: true };
        assert_eq!(client.run(queue, all), Outcome::Ok);
        assert_eq!(client.read(queue, 5 * MIB, 4096), [0; 4096]);
    }
}

/// Ranges that are not on the disk are IO errors, and do nothing.
#[track_caller]
pub fn ranges_past_the_end_are_io_errors(client: &mut RawClient) {
    let sectors = client.capacity() / 512;
    client.write(0, (sectors - 1) * 512, &[7; 512]);
    for sector in [sectors, sectors - 1, u64::MAX / 512, u64::MAX] {
        let data = Part::Out(vec![1; 1024]);
        assert_eq!(client.request(0, kind::READ, sector, &[Part::In(1024)]).0, status::IOERR);
        assert_eq!(client.request(0, kind::WRITE, sector, &[data]).0, status::IOERR);
        for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
            let range = Part::Out(range(sector, 2, 0));
            let (status, _) = client.request(0, kind, 0, &[range]);
            assert_eq!(status, status::IOERR, "type {kind} at {sector}");
        }
    }
    assert_eq!(client.read(0, (sectors - 1) * 512, 512), [7; 512]);
    let zeroes = Io::WriteZeroes { offset: (sectors - 1) * 512, length: 512, unmap: false };
    assert_eq!(client.run(0, zeroes), Outcome::Ok);
}

/// A request may be cut into descriptors anywhere: VERSION_1 forbids to assume framing.
#[track_caller]
pub fn framing_does_not_matter(client: &mut RawClient) {
    let split = |bytes: &[u8], at: &[usize]| -> Vec<Part> {
        let mut parts = Vec::new();
        let mut from = 0;
        for &to in at.iter().chain([&bytes.len()]) {
            parts.push(Part::Out(bytes[from..to].to_vec()));
            from = to;
        }
        parts
    };
    let data: Vec<u8> = (0..1024u32).map(|index| (index * 7) as u8).collect();
    for indirect in [false, true] {
        // The header in three pieces, the last of them with the data's first bytes.
        let mut whole = header(kind::WRITE, 64);
        whole.extend_from_slice(&data);
        let mut write = split(&whole, &[1, 9, 20, 600]);
        write.push(Part::In(1));
        let (answers, written) = exchange(client, &write, indirect);
        assert_eq!((answers[0][0], written), (status::OK, 1), "write, indirect {indirect}");

        // The data in three pieces of odd sizes, the last of them with the status byte.
        let mut read = split(&header(kind::READ, 64), &[4]);
        read.extend([Part::In(3), Part::In(500), Part::In(522)]);
        let (answers, written) = exchange(client, &read, indirect);
        let answer = answers.concat();
        assert_eq!((answer[1024], written), (status::OK, 1025), "read, indirect {indirect}");
        assert_eq!(answer[..1024], data);
    }
    let zeroes = Io::WriteZeroes { offset: 64 * 512, length: 1024, unmap: false };
    assert_eq!(client.run(0, zeroes), Outcome::Ok);
}

/// [`RawClient::exchange`] on queue 0, with the patience of a test.
#[track_caller]
pub fn exchange(client: &mut RawClient, parts: &[Part], indirect: bool) -> (Vec<Vec<u8>>, u32) {
    client
        .exchange(0, parts, indirect, std::time::Duration::from_secs(20))
        .expect("the request does not end")
}
