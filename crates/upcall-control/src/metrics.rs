//! Prometheus metrics: what each hop of each disk did, as it stands when they are asked for.
//! Nothing is counted here: the numbers are those of the page of counters.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::resource::{Disk, DiskState};

/// The text of all metrics, in the OpenMetrics format.
pub(crate) fn text(disks: Vec<Disk>) -> String {
    let mut registry = Registry::with_prefix("upcall");
    registry.register_collector(Box::new(Hops(disks)));
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Hops(Vec<Disk>);

type Labels = Vec<(&'static str, String)>;

impl Collector for Hops {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let hops: Vec<(Labels, &crate::resource::Hop)> = self
            .0
            .iter()
            .flat_map(|disk| {
                disk.hops.iter().enumerate().map(move |(place, hop)| {
                    let labels = vec![
                        ("disk", disk.name.clone()),
                        ("hop", hop.name.clone()),
                        ("place", place.to_string()),
                        ("kind", hop.kind.clone()),
                    ];
                    (labels, hop)
                })
            })
            .collect();
        type Count = fn(&crate::resource::Hop) -> u64;
        let counters: [(&str, &str, Option<&Unit>, Count); 7] = [
            ("hop_requests", "Requests that have left the hop", None, |hop| hop.requests),
            ("hop_data", "Their bytes", Some(&Unit::Bytes), |hop| hop.bytes),
            ("hop_errors", "Those of them that failed", None, |hop| hop.errors),
            ("hop_violations", "Rules that the filter broke", None, |hop| hop.violations),
            ("hop_retries", "Requests delivered again", None, |hop| hop.retries),
            ("hop_skipped", "Requests that went past the filter", None, |hop| hop.skipped),
            ("hop_failures", "Failures of the filter", None, |hop| hop.failures),
        ];
        for (name, help, unit, count) in counters {
            let mut family = encoder.encode_descriptor(
                name,
                help,
                unit,
                prometheus_client::metrics::MetricType::Counter,
            )?;
            for (labels, hop) in &hops {
                ConstCounter::new(count(hop)).encode(family.encode_family(labels)?)?;
            }
        }
        let kind = prometheus_client::metrics::MetricType::Counter;
        let help = "The time that requests spent at the hop";
        let mut family = encoder.encode_descriptor("hop_time", help, Some(&Unit::Seconds), kind)?;
        for (labels, hop) in &hops {
            let seconds = ConstCounter::new(hop.time_ns as f64 / 1e9);
            seconds.encode(family.encode_family(labels)?)?;
        }
        let kind = prometheus_client::metrics::MetricType::Gauge;
        let mut family =
            encoder.encode_descriptor("hop_in_flight", "Requests at the hop now", None, kind)?;
        for (labels, hop) in &hops {
            ConstGauge::new(hop.in_flight as i64).encode(family.encode_family(labels)?)?;
        }
        let help = "Latency that so many of the hop's requests did not exceed";
        let mut family =
            encoder.encode_descriptor("hop_latency", help, Some(&Unit::Seconds), kind)?;
        for (labels, hop) in &hops {
            for (quantile, ns) in
                [("0.5", hop.p50_ns), ("0.99", hop.p99_ns), ("0.999", hop.p999_ns)]
            {
                let Some(ns) = ns else { continue };
                let mut labels = labels.clone();
                labels.push(("quantile", quantile.to_owned()));
                ConstGauge::new(ns as f64 / 1e9).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "The number of the chain's make-up";
        let mut family = encoder.encode_descriptor("chain_generation", help, None, kind)?;
        for disk in self.0.iter().filter(|disk| disk.state != DiskState::Waiting) {
            let labels = [("disk", disk.name.as_str())];
            ConstGauge::new(disk.generation as i64).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
