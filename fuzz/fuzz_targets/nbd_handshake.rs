//! A client that says what the input says, up to the export it uses.
//!
//! Always true, whatever the bytes and however they are cut: no panic; as many bytes are used
//! as there are, unless something is to be sent or decided first; one call answers one
//! option, with a bounded number of bytes; the handshake ends; cutting the bytes differently
//! changes nothing; where TLS is required, no session begins without it.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use upcall_block::{DiskInfo, OpSet};
use upcall_nbd::ExportInfo;
use upcall_nbd::handshake::{Handshake, Outcome, TlsMode};

static EXPORTS: LazyLock<Arc<[ExportInfo]>> = LazyLock::new(|| {
    let disk = DiskInfo {
        capacity: 1 << 30,
        block_size: 512,
        physical_block_size: 4096,
        read_only: false,
        ops: OpSet::ALL,
        discard_granularity: 4096,
    };
    let export = |name: &str| {
        ExportInfo::new(name.into(), "a disk".into(), disk.clone(), true).expect("an export")
    };
    Arc::new([export("a"), export("data")])
});

/// All that was sent, and how it ended.
fn run(mode: TlsMode, bytes: &[u8], piece: usize) -> (Vec<u8>, Vec<Outcome>) {
    let (mut sent, mut outcomes, mut out) = (Vec::new(), Vec::new(), Vec::new());
    let mut handshake = Handshake::new(EXPORTS.clone(), mode, &mut out);
    let mut secure = false;
    'pieces: for mut input in bytes.chunks(piece) {
        loop {
            sent.append(&mut out);
            let (used, outcome) = handshake.handle(input, &mut out);
            assert!(used <= input.len());
            assert!(used > 0 || input.is_empty() || outcome.is_some(), "no progress");
            assert!(out.len() < 4096, "{} bytes for one option", out.len());
            input = &input[used..];
            match outcome {
                None => {}
                Some(Outcome::StartTls) => {
                    assert!(mode != TlsMode::Off && !secure);
                    secure = true;
                    outcomes.push(Outcome::StartTls);
                    // As if all that follows came in TLS.
                    handshake = handshake.after_tls();
                }
                Some(outcome) => {
                    let session = matches!(outcome, Outcome::Transmission(_));
                    assert!(!session || mode != TlsMode::Required || secure);
                    outcomes.push(outcome);
                    break 'pieces;
                }
            }
            if input.is_empty() {
                break;
            }
        }
    }
    sent.append(&mut out);
    (sent, outcomes)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&how, bytes)) = bytes.split_first() else { return };
    let mode = [TlsMode::Off, TlsMode::Offered, TlsMode::Required][usize::from(how % 3)];
    let whole = run(mode, bytes, bytes.len().max(1));
    let cut = run(mode, bytes, usize::from(how / 3) + 1);
    assert_eq!(whole, cut);
});
