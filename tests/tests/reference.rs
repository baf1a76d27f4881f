//! The clients of these tests against a disk that others made: what fails here is a bug of
//! the test kit, not of Upcall.

use std::os::unix::fs::FileExt;

use upcall_tests::{
    Client, Driver, Mix, RawClient, RawOptions, Reference, Rng, Scratch, Workload, checks, feature,
};
use virtio_driver::VirtioFeatureFlags;

const BYTES: u64 = 32 << 20;

fn with_reference(queues: usize, test: impl FnOnce(&Reference, &std::path::Path)) {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", BYTES);
    let reference = Reference::start(&scratch, &image, queues);
    test(&reference, &image);
}

fn raw_kinds() -> [RawOptions; 4] {
    let usual = RawOptions { queues: 2, ..RawOptions::default() };
    [
        usual,
        RawOptions { indirect: true, ..usual },
        RawOptions { features: usual.features & !feature::EVENT_IDX, ..usual },
        RawOptions { queues: 1, queue_size: 16, slots: 1, ..usual },
    ]
}

#[test]
fn the_driver_sees_a_disk() {
    with_reference(2, |reference, _| {
        let mut driver = Driver::usual(reference.socket(), 2);
        assert_eq!(driver.capacity(), BYTES);
        checks::operations_do_what_they_say(&mut driver);
    });
}

#[test]
fn the_raw_client_sees_a_disk() {
    for options in raw_kinds() {
        with_reference(2, |reference, _| {
            let mut client = RawClient::connect(reference.socket(), options).unwrap();
            assert_eq!(client.capacity(), BYTES);
            checks::operations_do_what_they_say(&mut client);
            checks::ranges_past_the_end_are_io_errors(&mut client);
            checks::framing_does_not_matter(&mut client);
        });
    }
}

#[test]
fn random_requests_are_verified() {
    let seed = Rng::seed();
    for (run, queues) in [1, 4].into_iter().enumerate() {
        with_reference(queues, |reference, image| {
            let mut workload = Workload::new(seed + run as u64, BYTES);
            let mut driver = Driver::usual(reference.socket(), queues);
            workload.run(&mut driver, &Mix::default(), 5000);
            workload.read_back(&mut driver);
            drop(driver);

            let plain = VirtioFeatureFlags::empty();
            let mut driver = Driver::connect(reference.socket(), queues, 64, 4, plain).unwrap();
            workload.run(&mut driver, &Mix::default(), 2000);
            drop(driver);

            for options in raw_kinds() {
                let options = RawOptions { queues, ..options };
                let mut client = RawClient::connect(reference.socket(), options).unwrap();
                workload.run(&mut client, &Mix::default(), 1000);
                workload.read_back(&mut client);
            }
            workload.check_image(image);
        });
    }
}

#[test]
fn a_wrong_byte_is_seen() {
    with_reference(1, |reference, image| {
        let mut workload = Workload::new(1, BYTES);
        let mut driver = Driver::usual(reference.socket(), 1);
        workload.run(&mut driver, &Mix::default(), 100);
        assert_eq!(workload.compare_image(image), Ok(()));
        let file = std::fs::File::options().write(true).open(image).unwrap();
        file.write_all_at(b"x", 40000 * 512 + 77).unwrap();
        let error = workload.compare_image(image).unwrap_err();
        assert!(error.contains("sector 40000"), "{error}");
        let error = workload.compare_disk(&mut driver).unwrap_err();
        assert!(error.contains("sector 40000"), "{error}");
    });
}
