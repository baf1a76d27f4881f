//! The worker's side of the filter ring: two filter hosts that write whatever they like, into
//! their rings and over the whole channel, while a guest's requests are in flight.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    upcall_worker::play_hostile_hosts(input);
});
