//! A disk as it came over the socket, back in the form that the page of counters has: what
//! watches the one watches the other.
//!
//! What came is not trusted: words that are none of ours are an error, and names are made fit for
//! a terminal.

use upcall_block::Op;
use upcall_stats::{
    BlockSnapshot, FilterHealth, Histogram, HopKind, HopSnapshot, OpCounts, Standing, bucket_of,
};

use crate::resource::{Disk, Hop};

/// The hops of a disk; an error says what is none of a worker's words.
pub(crate) fn of(disk: &Disk) -> impl Iterator<Item = Result<HopSnapshot, String>> {
    disk.hops.iter().map(|hop| snapshot(&disk.name, hop))
}

fn snapshot(disk: &str, hop: &Hop) -> Result<HopSnapshot, String> {
    let kinds = [HopKind::Request, HopKind::Filter, HopKind::Store];
    let kind = kinds.into_iter().find(|kind| kind.name() == hop.kind);
    let standing = Standing::ALL.into_iter().find(|standing| standing.name() == hop.state);
    let mut ops = [OpCounts::default(); 6];
    for count in &hop.ops {
        let op = Op::ALL.into_iter().find(|op| op.name() == count.op);
        ops[op.ok_or_else(|| format!("operation {:?}", count.op))? as usize] = OpCounts {
            requests: count.requests,
            bytes: count.bytes,
            errors: count.errors,
            time_ns: count.time_ns,
        };
    }
    let mut latency = Histogram::default();
    for bucket in &hop.latency {
        latency.counts[bucket_of(bucket.below_ns.saturating_sub(1))] = bucket.requests;
    }
    Ok(HopSnapshot {
        disk: plain(disk),
        name: plain(&hop.name),
        kind: kind.ok_or_else(|| format!("kind {:?}", hop.kind))?,
        block: BlockSnapshot {
            ops,
            now: hop.in_flight,
            violations: hop.violations,
            retries: hop.retries,
            skipped: hop.skipped,
            latency,
        },
        health: FilterHealth {
            standing: standing.ok_or_else(|| format!("state {:?}", hop.state))?,
            failures: hop.failures,
            longest_stall_ns: hop.longest_stall_ns,
        },
        counters: hop
            .counters
            .iter()
            .map(|counter| (plain(&counter.name), counter.value))
            .collect(),
    })
}

fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop() -> HopSnapshot {
        let mut block = BlockSnapshot {
            now: 3,
            violations: 4,
            retries: 5,
            skipped: 6,
            ..BlockSnapshot::default()
        };
        for (number, op) in Op::ALL.into_iter().enumerate().filter(|(_, op)| *op != Op::Discard) {
            let n = number as u64;
            block.ops[op as usize] =
                OpCounts { requests: 10 + n, bytes: 20 + n, errors: 30 + n, time_ns: 40 + n };
        }
        for (number, ns) in [0, 1, 3, 4, 5, 1000, 123_456, u64::MAX].into_iter().enumerate() {
            block.latency.counts[bucket_of(ns)] = 1 + number as u64;
        }
        let standing = Standing::Quarantined;
        HopSnapshot {
            disk: "root".into(),
            name: "trace".into(),
            kind: HopKind::Filter,
            block,
            health: FilterHealth { standing, failures: 7, longest_stall_ns: 8 },
            counters: vec![("lines".into(), 9)],
        }
    }

    type Change = fn(&mut Hop);

    fn disk(hops: &[HopSnapshot]) -> Disk {
        Disk {
            name: "root".into(),
            state: crate::resource::DiskState::Here,
            store: String::new(),
            capacity_bytes: 0,
            queues: 1,
            generation: 1,
            chain: Vec::new(),
            hops: hops.iter().map(Hop::new).collect(),
        }
    }

    #[test]
    fn what_is_sent_is_what_the_page_has() {
        let kinds = [HopKind::Request, HopKind::Filter, HopKind::Store];
        let hops: Vec<HopSnapshot> = kinds
            .into_iter()
            .zip(Standing::ALL)
            .map(|(kind, standing)| {
                let mut hop = HopSnapshot { kind, ..hop() };
                hop.health.standing = standing;
                hop
            })
            .collect();
        let text = serde_json::to_string(&disk(&hops)).unwrap();
        let sent: Disk = serde_json::from_str(&text).unwrap();
        assert_eq!(of(&sent).collect::<Result<Vec<_>, _>>().unwrap(), hops);
    }

    #[test]
    fn words_that_are_none_of_ours_are_an_error_and_names_are_fit_for_a_terminal() {
        let said = |change: Change| {
            let mut disk = disk(&[hop()]);
            change(&mut disk.hops[0]);
            of(&disk).next().unwrap()
        };
        let changes: [(Change, &str); 3] = [
            (|hop| hop.kind = "vacant".into(), "vacant"),
            (|hop| hop.state = "well".into(), "well"),
            (|hop| hop.ops[0].op = "erase".into(), "erase"),
        ];
        for (change, word) in changes {
            assert!(said(change).unwrap_err().contains(word));
        }
        let said = said(|hop| {
            hop.name = "a\x1b[2J".into();
            hop.counters[0].name = "b\n".into();
            hop.latency[0].below_ns = 0;
        });
        let said = said.unwrap();
        assert_eq!(said.name, "a\u{fffd}[2J");
        assert_eq!(said.counters[0].0, "b\u{fffd}");
    }
}
