//! Chains as they are written down: with `--restart`, at the supervisor, so that the next worker
//! begins with the chains that the last one had.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use upcall_worker::{DiskConfig, OnFailure, Placement, SlotConfig, WriteDown};

use super::handover::ToSupervisor;
use crate::failure::Failure;

#[derive(Serialize, Deserialize)]
struct WrittenDisk {
    disk: String,
    chain: Vec<WrittenSlot>,
}

#[derive(Serialize, Deserialize)]
struct WrittenSlot {
    name: Option<String>,
    file: PathBuf,
    order: i32,
    inline: bool,
    deadline_ms: Option<u64>,
    on_failure: Option<String>,
    memory_bytes: Option<u64>,
    params: Vec<(String, String)>,
    grants: Vec<String>,
}

/// Writes chains down at the supervisor.
pub fn at(supervisor: ToSupervisor) -> WriteDown {
    Arc::new(move |chains| {
        let all: Vec<WrittenDisk> = chains.iter().map(written).collect();
        let text = serde_json::to_string(&all).map_err(|error| error.to_string())?;
        supervisor.say_chains(&text).map_err(|error| format!("the supervisor: {error}"))
    })
}

/// Gives the disks the chains that were written down.
pub fn restore(disks: &mut [DiskConfig], text: &str) -> Result<(), Failure> {
    let all: Vec<WrittenDisk> = serde_json::from_str(text)
        .map_err(|error| Failure::new(format_args!("the chains handed down: {error}")))?;
    for written in all {
        if let Some(disk) = disks.iter_mut().find(|disk| disk.name == written.disk) {
            disk.chain = written.chain.into_iter().map(slot_of).collect();
        }
    }
    Ok(())
}

fn written((disk, chain): &(String, Vec<SlotConfig>)) -> WrittenDisk {
    let slot = |slot: &SlotConfig| WrittenSlot {
        name: slot.name.clone(),
        file: slot.filter.clone(),
        order: slot.order,
        inline: slot.placement == Placement::Inline,
        deadline_ms: slot.deadline_ms,
        on_failure: slot.on_failure.map(|policy| policy.name().to_owned()),
        memory_bytes: slot.memory_bytes,
        params: slot.params.clone(),
        grants: slot.grants.clone(),
    };
    WrittenDisk { disk: disk.clone(), chain: chain.iter().map(slot).collect() }
}

fn slot_of(slot: WrittenSlot) -> SlotConfig {
    let policies = [OnFailure::Hold, OnFailure::Bypass, OnFailure::Fail, OnFailure::Detach];
    let named = |name: String| policies.into_iter().find(|policy| policy.name() == name);
    SlotConfig {
        name: slot.name,
        filter: slot.file,
        order: slot.order,
        placement: if slot.inline { Placement::Inline } else { Placement::Isolated },
        deadline_ms: slot.deadline_ms,
        on_failure: slot.on_failure.and_then(named),
        memory_bytes: slot.memory_bytes,
        params: slot.params,
        grants: slot.grants,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use upcall_worker::StoreConfig;

    #[test]
    fn a_chain_that_was_written_down_is_the_same_again() {
        let slot = SlotConfig {
            name: Some("x-1".into()),
            filter: "/f.so".into(),
            order: -4,
            placement: Placement::Inline,
            deadline_ms: Some(7),
            on_failure: Some(OnFailure::Bypass),
            memory_bytes: Some(1 << 28),
            params: vec![("a".into(), "b,c".into())],
            grants: vec!["d".into()],
        };
        let chain = vec![slot];
        let text = serde_json::to_string(&[written(&("root".into(), chain.clone()))]).unwrap();
        let disk = |name: &str| DiskConfig {
            name: name.into(),
            store: StoreConfig::Null { bytes: 512 },
            read_only: false,
            queues: 1,
            frontend: None,
            nbd: None,
            state: None,
            chain: Vec::new(),
        };
        let mut disks = [disk("root"), disk("other")];
        restore(&mut disks, &text).unwrap();
        assert_eq!((&disks[0].chain, disks[1].chain.len()), (&chain, 0));
        assert!(restore(&mut disks, "[{}]").is_err());
    }
}
