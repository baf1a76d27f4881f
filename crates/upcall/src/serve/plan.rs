//! From what is asked for to what a worker is told, with the defaults filled in.

use std::path::PathBuf;

use upcall_worker::{
    DiskConfig, Engine, FrontendConfig, ImageOptions, NbdAddress, NbdConfig, NbdServer, NbdTls,
    Placement, SlotConfig, SocketSource, StoreConfig, TlsFiles,
};

use super::sockets::{self, HandedOver};
use super::spec::{DiskSpec, FilterSpec};
use super::value::{NbdPlace, NbdTlsUse};
use crate::failure::Failure;

/// Guests with up to four processors get a queue for each; more queues cost a thread each.
const QUEUES: u16 = 4;
/// As QEMU's own default for vhost-user-blk has it, doubled: room for indirect descriptors.
const QUEUE_SIZE: u16 = 256;
/// Most NBD connections.
const NBD_CONNECTIONS: u16 = 256;
const SERIAL_MAX: usize = 20;

/// What a worker is told, and where each disk is found.
pub struct Plan {
    pub disks: Vec<DiskConfig>,
    pub places: Vec<Place>,
}

/// Where a guest finds a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A socket at this path.
    Path(PathBuf),
    /// An inherited socket whose path nobody told us.
    Inherited,
    /// Only where NBD clients do.
    Nbd,
    /// It is there for filters alone.
    Granted,
}

/// Where a disk is listened on, and at which path, if that can be known. None: nowhere, it is
/// there for NBD clients or filters alone.
pub type Socket = Option<(SocketSource, Option<PathBuf>)>;

/// Where each disk is listened on.
pub fn sockets(specs: &[DiskSpec]) -> Result<Vec<Socket>, Failure> {
    let granted: Vec<&String> =
        specs.iter().flat_map(|disk| &disk.filter).flat_map(|filter| &filter.grant).collect();
    let is_free = |disk: &DiskSpec| disk.socket.is_none() && disk.fd.is_none();
    // It has no socket of this kind.
    let is_granted =
        |disk: &DiskSpec| disk.is_only_nbd() || is_free(disk) && granted.contains(&&disk.name);
    let wants: Vec<&str> = specs
        .iter()
        .filter(|disk| is_free(disk) && !is_granted(disk))
        .map(|disk| disk.name.as_str())
        .collect();
    let is_for_nbd = |name: &str| {
        let mut places = specs.iter().filter_map(|disk| disk.nbd.as_ref());
        places.any(|place| matches!(&place.0, NbdPlace::Systemd(wanted) if wanted == name))
    };
    let mut handed_over = HandedOver::take(is_for_nbd).share_out(&wants)?.into_iter();
    let socket = |spec: &DiskSpec| {
        if is_granted(spec) {
            return Ok(None);
        }
        let inherited = if is_free(spec) { handed_over.next().flatten() } else { None };
        sockets::of(spec, inherited).map(Some)
    };
    specs.iter().map(socket).collect()
}

/// Plans for all disks, `sockets` in their order.
pub fn make(specs: Vec<DiskSpec>, sockets: Vec<Socket>) -> Result<Plan, Failure> {
    let (mut disks, mut places) = (Vec::new(), Vec::new());
    for (spec, socket) in specs.into_iter().zip(sockets) {
        let Some((socket, path)) = socket else {
            places.push(if spec.nbd.is_some() { Place::Nbd } else { Place::Granted });
            disks.push(disk_of(spec, None, 0)?);
            continue;
        };
        let frontend = FrontendConfig {
            socket,
            queue_size: spec.queue_size.map_or(QUEUE_SIZE, |given| given.0),
            serial: spec.serial.clone().unwrap_or_else(|| usual_serial(&spec.name)),
            write_cache: spec.write_cache.is_none_or(|given| given.0),
        };
        places.push(path.map_or(Place::Inherited, Place::Path));
        disks.push(disk_of(spec, Some(frontend), QUEUES)?);
    }
    Ok(Plan { disks, places })
}

/// The same disks once more, served to nobody: for a worker whose frontends are elsewhere.
/// They were planned before, with frontends.
pub fn without_frontends(specs: &[DiskSpec]) -> Vec<DiskConfig> {
    let disk = |spec: &DiskSpec| disk_of(spec.clone(), None, QUEUES).expect("planned before");
    specs.iter().map(disk).collect()
}

fn disk_of(
    spec: DiskSpec,
    frontend: Option<FrontendConfig>,
    queues: u16,
) -> Result<DiskConfig, Failure> {
    let nbd = nbd_of(&spec)?;
    // Without another frontend, all queues are for NBD.
    let given = spec.queues.filter(|_| !spec.is_only_nbd());
    Ok(DiskConfig {
        store: store_of(&spec),
        read_only: spec.readonly.is_some_and(|given| given.0),
        queues: given.map_or(queues, |given| given.0),
        frontend,
        nbd,
        state: spec.state.clone(),
        chain: spec.filter.into_iter().map(slot_of).collect(),
        name: spec.name,
    })
}

fn nbd_of(spec: &DiskSpec) -> Result<Option<NbdConfig>, Failure> {
    let Some(place) = &spec.nbd else { return Ok(None) };
    let address = match &place.0 {
        NbdPlace::Unix(path) => NbdAddress::Unix(path.clone(), spec.mode.map(|mode| mode.0.0)),
        NbdPlace::Tcp(address) => NbdAddress::Tcp(address.clone()),
        NbdPlace::Fd(number) => sockets::inherited(&spec.name, (*number).into())
            .map(|fd| NbdAddress::Fd((*number).into(), fd))?,
        NbdPlace::Systemd(name) => {
            let (number, fd) = sockets::named(&spec.name, name)?;
            NbdAddress::Fd(number, fd)
        }
    };
    let tls = spec.nbd_tls_cert.as_ref().zip(spec.nbd_tls_key.as_ref());
    let tls = tls.map(|(certificate, key)| NbdTls {
        files: TlsFiles {
            certificate: certificate.clone(),
            key: key.clone(),
            client_ca: spec.nbd_tls_ca.clone(),
        },
        required: spec.nbd_tls.is_none_or(|given| given.0 == NbdTlsUse::Required),
    });
    // Beside a guest, readers share one queue.
    let queues = match spec.is_only_nbd() {
        true => spec.queues.map_or(QUEUES, |given| given.0),
        false => 1,
    };
    Ok(Some(NbdConfig {
        address,
        export: spec.nbd_export.clone().unwrap_or_else(|| spec.name.clone()),
        read_only: spec.nbd_readonly.is_some_and(|given| given.0),
        queues,
        write_cache: spec.write_cache.is_none_or(|given| given.0),
        tls,
        connections: spec.nbd_connections.map_or(NBD_CONNECTIONS, |given| given.0).into(),
    }))
}

fn store_of(spec: &DiskSpec) -> StoreConfig {
    if let (Some(path), Some(format)) = (&spec.file, spec.image_format()) {
        let mut options = ImageOptions::new(format, path);
        options.direct = spec.direct.is_none_or(|given| given.0);
        options.backing = spec.backing.iter().map(|given| given.0.clone()).collect();
        options.data_file = spec.data_file.clone();
        options.extents = spec.extents.clone();
        options.secret = spec.secret.clone();
        return StoreConfig::Image(Box::new(options));
    }
    if let Some(place) = &spec.remote {
        let export = spec.remote_export.clone().unwrap_or_default();
        let server = NbdServer { place: place.0.clone(), export };
        return StoreConfig::Image(Box::new(ImageOptions::of_server(server)));
    }
    match (&spec.file, spec.memory, spec.null) {
        (Some(path), ..) => StoreConfig::Raw {
            path: path.clone(),
            direct: spec.direct.is_none_or(|given| given.0),
            engine: spec.engine.map_or(Engine::Auto, |given| given.0),
        },
        (None, Some(size), _) => StoreConfig::Memory { bytes: size.0.0 },
        (None, None, Some(size)) => StoreConfig::Null { bytes: size.0.0 },
        (None, None, None) => unreachable!("checked when it was read"),
    }
}

fn slot_of(spec: FilterSpec) -> SlotConfig {
    SlotConfig {
        name: spec.name,
        filter: spec.file,
        order: spec.order.map_or(0, |given| given.0),
        placement: spec.placement.map_or(Placement::Isolated, |given| given.0),
        deadline_ms: spec.deadline_ms.map(|given| given.0.into()),
        on_failure: spec.on_failure.map(|given| given.0),
        memory_bytes: spec.memory.map(|given| given.0.0),
        params: spec.params,
        grants: spec.grant,
    }
}

/// As much of the name as a serial number holds.
fn usual_serial(name: &str) -> String {
    let mut end = name.len().min(SERIAL_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(words: &[&str]) -> Plan {
        planned(words.iter().map(|words| DiskSpec::from_words(words).unwrap()).collect())
    }

    fn planned(disks: Vec<DiskSpec>) -> Plan {
        let sockets = sockets(&disks).unwrap();
        make(disks, sockets).unwrap()
    }

    #[test]
    fn a_disk_has_usual_values() {
        let plan = plan(&["name=root,file=a.img"]);
        let disk = &plan.disks[0];
        assert_eq!(plan.places, [Place::Path("./root.sock".into())]);
        assert_eq!((disk.queues, disk.read_only), (4, false));
        let frontend = disk.frontend.as_ref().unwrap();
        assert_eq!((frontend.queue_size, frontend.write_cache), (256, true));
        assert_eq!(frontend.serial, "root");
        assert!(matches!(disk.store, StoreConfig::Raw { direct: true, .. }));
    }

    #[test]
    fn a_granted_disk_has_no_frontend_unless_it_says_where() {
        let mut disks: Vec<DiskSpec> = ["name=a,memory=1M", "name=b,memory=1M"]
            .map(|words| DiskSpec::from_words(words).unwrap())
            .into();
        let filter = super::super::FilterOnDisk::from_words("disk=a,file=f.so,grant=b").unwrap();
        filter.join(&mut disks).unwrap();
        let mut with_socket = disks.clone();
        let plan = planned(disks);
        assert_eq!(plan.places[1], Place::Granted);
        assert!(plan.disks[1].frontend.is_none() && plan.disks[1].queues == 0);
        with_socket[1].socket = Some("b.sock".into());
        let plan = planned(with_socket);
        assert_eq!(plan.places[1], Place::Path("b.sock".into()));
        assert!(plan.disks[1].frontend.is_some() && plan.disks[1].queues == 4);
    }

    #[test]
    fn a_long_name_is_cut_for_the_serial_number() {
        assert_eq!(usual_serial("a-name-of-more-than-twenty"), "a-name-of-more-than-");
        assert_eq!(usual_serial("ääääääääääé"), "ääääääääää");
    }
}
