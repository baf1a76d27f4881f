//! From counters to what is shown: rates, quantiles, shares.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use upcall_block::Op;
use upcall_stats::{HopKind, HopSnapshot, Standing};

use super::View;

/// One hop of a disk. Numbers are sums, or rates a second if the view covers a time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    #[serde(skip)]
    pub disk: String,
    pub hop: String,
    #[serde(serialize_with = "kind_name")]
    pub kind: HopKind,
    pub requests: f64,
    pub read_bytes: f64,
    pub write_bytes: f64,
    pub errors: f64,
    pub in_flight: u64,
    pub p50_ns: Option<u64>,
    pub p99_ns: Option<u64>,
    pub p999_ns: Option<u64>,
    /// Of the time of the disk's requests, the part spent at this hop.
    pub share: Option<f64>,
    pub violations: u64,
    /// How the filter is: up, restarting, bypassed, quarantined or detached.
    #[serde(serialize_with = "standing_name")]
    pub state: Standing,
    /// Since its start: how often it failed, and the longest time until it served again.
    pub failures: u64,
    pub longest_stall_ns: u64,
    /// Requests delivered again, and requests that went past it.
    pub retries: u64,
    pub skipped: u64,
    /// The filter's own: sums since its start.
    pub counters: Vec<(String, u64)>,
}

fn kind_name<S: serde::Serializer>(kind: &HopKind, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(kind.name())
}

fn standing_name<S: serde::Serializer>(state: &Standing, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}

/// Rows of all hops: sums, or rates since an earlier snapshot.
pub fn of(now: &[HopSnapshot], since: Option<(&[HopSnapshot], Duration)>) -> Vec<Row> {
    let mut request_ns = 0;
    now.iter()
        .enumerate()
        .map(|(index, hop)| {
            // After a chain change another hop may be there.
            let is_same = |then: &&HopSnapshot| then.disk == hop.disk && then.name == hop.name;
            let earlier = since.and_then(|(hops, _)| hops.get(index)).filter(is_same);
            let block = earlier.map_or(hop.block.clone(), |then| hop.block.since(&then.block));
            let total = block.total();
            if hop.kind == HopKind::Request {
                request_ns = total.time_ns;
            }
            let seconds = since.map_or(1.0, |(_, elapsed)| elapsed.as_secs_f64().max(1e-3));
            let rate = |count: u64| count as f64 / seconds;
            Row {
                disk: hop.disk.clone(),
                hop: hop.name.clone(),
                kind: hop.kind,
                requests: rate(total.requests),
                read_bytes: rate(block.ops[Op::Read as usize].bytes),
                write_bytes: rate(block.ops[Op::Write as usize].bytes),
                errors: rate(total.errors),
                in_flight: hop.block.now,
                p50_ns: block.latency.quantile_ns(0.5),
                p99_ns: block.latency.quantile_ns(0.99),
                p999_ns: block.latency.quantile_ns(0.999),
                share: (request_ns > 0).then(|| total.time_ns as f64 / request_ns as f64),
                violations: hop.block.violations,
                state: hop.health.standing,
                failures: hop.health.failures,
                longest_stall_ns: hop.health.longest_stall_ns,
                retries: hop.block.retries,
                skipped: hop.block.skipped,
                counters: hop.counters.clone(),
            }
        })
        .collect()
}

/// The view for programs. `seconds` is null for sums since the start.
pub fn json(view: &View) -> serde_json::Value {
    let mut disks: Vec<(&str, Vec<&Row>)> = Vec::new();
    for row in &view.rows {
        match disks.last_mut() {
            Some((disk, hops)) if *disk == row.disk => hops.push(row),
            _ => disks.push((&row.disk, vec![row])),
        }
    }
    let disks: Vec<_> =
        disks.into_iter().map(|(name, hops)| json!({ "name": name, "hops": hops })).collect();
    json!({ "worker": view.pid, "seconds": view.seconds, "disks": disks })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use upcall_stats::{BlockSnapshot, FilterHealth, OpCounts};

    /// A disk with one filter: 100 reads of 4 KiB and 50 writes, a fifth of the time in the
    /// filter.
    pub fn hops() -> Vec<HopSnapshot> {
        let hop = |name: &str, kind, time_ns| {
            let mut block = BlockSnapshot { now: 3, ..BlockSnapshot::default() };
            block.ops[1] = OpCounts { requests: 100, bytes: 409_600, errors: 2, time_ns };
            block.ops[2] = OpCounts { requests: 50, bytes: 204_800, errors: 0, time_ns };
            block.latency.counts[upcall_stats::bucket_of(50_000)] = 150;
            HopSnapshot {
                disk: "root".into(),
                name: name.into(),
                kind,
                block,
                health: FilterHealth::default(),
                counters: if kind == HopKind::Filter { vec![("lines".into(), 7)] } else { vec![] },
            }
        };
        vec![
            hop("request", HopKind::Request, 1000),
            hop("xor", HopKind::Filter, 200),
            hop("store", HopKind::Store, 700),
        ]
    }

    #[test]
    fn sums_and_shares_are_those_of_the_page() {
        let rows = of(&hops(), None);
        assert_eq!((rows[0].requests, rows[0].errors, rows[0].in_flight), (150.0, 2.0, 3));
        assert_eq!((rows[0].read_bytes, rows[0].write_bytes), (409_600.0, 204_800.0));
        assert_eq!(
            [rows[0].share, rows[1].share, rows[2].share],
            [Some(1.0), Some(0.2), Some(0.7)]
        );
        assert!(rows[1].p50_ns.is_some_and(|ns| ns <= 50_000 && ns > 40_000));
    }

    #[test]
    fn rates_are_what_came_in_the_time_between() {
        let (earlier, mut now) = (hops(), hops());
        now[0].block.ops[1].requests += 500;
        now[0].block.ops[1].bytes += 1 << 20;
        let rows = of(&now, Some((&earlier, Duration::from_secs(2))));
        assert_eq!((rows[0].requests, rows[0].read_bytes), (250.0, 524_288.0));
        assert_eq!((rows[1].requests, rows[1].share, rows[1].p50_ns), (0.0, None, None));
        assert_eq!(rows[1].counters, [("lines".to_owned(), 7)], "sums, not rates");
    }

    #[test]
    fn json_groups_hops_by_disk() {
        let value = json(&View { rows: of(&hops(), None), seconds: None, pid: 42 });
        assert_eq!(value["worker"], 42);
        assert_eq!(value["disks"][0]["name"], "root");
        assert_eq!(value["disks"][0]["hops"][1]["kind"], "filter");
        assert_eq!(value["disks"][0]["hops"][2]["requests"], 150.0);
    }
}
