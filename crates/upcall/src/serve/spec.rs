//! Disks and filters as an operator asks for them. One definition for flags and TOML: the
//! fields are the words. Nothing is opened or looked up here.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::value::{Error as WordError, MapDeserializer};
use serde::de::{Deserializer, Error, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use upcall_worker::{Engine, ImageFormat, Layer, OnFailure, Placement};

use super::value::{Given, Mode, NbdPlace, NbdTlsUse, Size, Text, Value};
use crate::failure::Failure;
use crate::words::{self, Word};

/// A disk that is asked for.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskSpec {
    pub name: String,
    pub file: Option<PathBuf>,
    pub memory: Option<Given<Size>>,
    pub null: Option<Given<Size>>,
    /// An NBD server that has the disk.
    pub remote: Option<Given<upcall_worker::NbdPlace>>,
    pub remote_export: Option<String>,
    pub format: Option<Given<ImageFormat>>,
    /// The images below, nearest first.
    #[serde(default, deserialize_with = "one_or_several")]
    pub backing: Vec<Given<Layer>>,
    pub data_file: Option<PathBuf>,
    pub extents: Option<PathBuf>,
    pub secret: Option<PathBuf>,
    pub socket: Option<PathBuf>,
    pub fd: Option<Given<u16>>,
    pub mode: Option<Given<Mode>>,
    pub queues: Option<Given<u16>>,
    pub queue_size: Option<Given<u16>>,
    pub direct: Option<Given<bool>>,
    pub readonly: Option<Given<bool>>,
    pub engine: Option<Given<Engine>>,
    pub serial: Option<String>,
    pub write_cache: Option<Given<bool>>,
    pub nbd: Option<Given<NbdPlace>>,
    pub nbd_export: Option<String>,
    pub nbd_readonly: Option<Given<bool>>,
    pub nbd_connections: Option<Given<u16>>,
    pub nbd_tls_cert: Option<PathBuf>,
    pub nbd_tls_key: Option<PathBuf>,
    pub nbd_tls_ca: Option<PathBuf>,
    pub nbd_tls: Option<Given<NbdTlsUse>>,
    pub state: Option<PathBuf>,
    #[serde(default)]
    pub filter: Vec<FilterSpec>,
}

impl DiskSpec {
    /// From the words of `--disk`.
    pub fn from_words(text: &str) -> Result<DiskSpec, String> {
        let is_backing = |word: &Word| word.0 == "backing";
        let (backing, rest): (Vec<_>, Vec<_>) =
            words::split(text)?.into_iter().partition(is_backing);
        let mut disk: DiskSpec = from_words(rest)?;
        for (key, value) in backing {
            let layer = Layer::from_text(&value).map_err(|error| format!("{key}: {error}"))?;
            disk.backing.push(Given(layer));
        }
        disk.check()?;
        Ok(disk)
    }

    /// What no single word can tell.
    pub fn check(&self) -> Result<(), String> {
        let name = &self.name;
        let stores = [
            self.file.is_some(),
            self.memory.is_some(),
            self.null.is_some(),
            self.remote.is_some(),
        ];
        match stores.into_iter().filter(|is_some| *is_some).count() {
            1 => {}
            0 => {
                return Err(format!(
                    "disk {name} has no data: give it file=PATH, memory=SIZE, null=SIZE or \
                     remote=ADDRESS"
                ));
            }
            _ => {
                return Err(format!("disk {name}: give only one of file, memory, null and remote"));
            }
        }
        if self.socket.is_some() && self.fd.is_some() {
            return Err(format!("disk {name}: give only one of socket and fd"));
        }
        if self.fd.is_some() && self.mode.is_some() {
            return Err(format!("disk {name}: the mode of an inherited socket is its maker's"));
        }
        if self.remote_export.is_some() && self.remote.is_none() {
            return Err(format!("disk {name}: remote-export is for disks with remote=ADDRESS"));
        }
        self.filter.iter().try_for_each(FilterSpec::check)?;
        self.check_nbd()?;
        if self.file.is_none() && (self.direct.is_some() || self.engine.is_some()) {
            return Err(format!("disk {name}: direct and engine are for disks with file"));
        }
        let is_layered = !self.backing.is_empty() || self.data_file.is_some();
        match self.image_format() {
            Some(_) if self.file.is_none() => {
                Err(format!("disk {name}: a format is for a disk with file"))
            }
            Some(format) if self.engine.is_some() => {
                Err(format!("disk {name}: engine is for raw images, not for {format}"))
            }
            None if is_layered || self.extents.is_some() || self.secret.is_some() => Err(format!(
                "disk {name}: backing, data-file, extents and secret need a format other than raw"
            )),
            _ => Ok(()),
        }
    }

    /// The format, if it is not raw.
    pub fn image_format(&self) -> Option<ImageFormat> {
        self.format.map(|given| given.0).filter(|format| *format != ImageFormat::Raw)
    }
}

impl DiskSpec {
    /// Whether NBD is the only way to it.
    pub fn is_only_nbd(&self) -> bool {
        self.nbd.is_some() && self.socket.is_none() && self.fd.is_none()
    }

    fn check_nbd(&self) -> Result<(), String> {
        let name = &self.name;
        let tls = [&self.nbd_tls_cert, &self.nbd_tls_key, &self.nbd_tls_ca];
        let has_tls = tls.iter().any(|file| file.is_some()) || self.nbd_tls.is_some();
        let has_others = self.nbd_export.is_some()
            || self.nbd_readonly.is_some()
            || self.nbd_connections.is_some();
        if self.nbd.is_none() && (has_tls || has_others) {
            return Err(format!("disk {name}: nbd-... is for disks with nbd=ADDRESS"));
        }
        if has_tls && (self.nbd_tls_cert.is_none() || self.nbd_tls_key.is_none()) {
            return Err(format!("disk {name}: TLS takes both nbd-tls-cert and nbd-tls-key"));
        }
        if self.nbd_tls_ca.is_some() && self.nbd_tls == Some(Given(NbdTlsUse::Optional)) {
            return Err(format!(
                "disk {name}: with nbd-tls-ca clients need a certificate, so TLS cannot be optional"
            ));
        }
        if self.nbd_connections == Some(Given(0)) {
            return Err(format!("disk {name}: nbd-connections must be at least 1"));
        }
        if self.is_only_nbd() && (self.queue_size.is_some() || self.serial.is_some()) {
            return Err(format!("disk {name}: queue-size and serial are for vhost-user, not NBD"));
        }
        Ok(())
    }
}

/// A filter that is asked for.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FilterSpec {
    pub file: PathBuf,
    pub name: Option<String>,
    pub order: Option<Given<i32>>,
    pub placement: Option<Given<Placement>>,
    pub deadline_ms: Option<Given<u32>>,
    pub on_failure: Option<Given<OnFailure>>,
    pub memory: Option<Given<Size>>,
    #[serde(default, deserialize_with = "one_or_several")]
    pub grant: Vec<String>,
    #[serde(default, deserialize_with = "in_order")]
    pub params: Vec<Word>,
}

impl FilterSpec {
    /// With less, no filter host starts.
    const MEMORY_MIN: Size = Size(16 << 20);

    fn check(&self) -> Result<(), String> {
        let file = self.file.display();
        match (self.memory, self.placement) {
            (Some(_), Some(Given(Placement::Inline))) => {
                Err(format!("filter {file}: memory is for filters in a process of their own"))
            }
            (Some(Given(size)), _) if size.0 < FilterSpec::MEMORY_MIN.0 => {
                Err(format!("filter {file}: memory must be at least 16M"))
            }
            _ => Ok(()),
        }
    }
}

/// A filter and the name of the disk it is for: one `--filter`.
#[derive(Clone, Debug)]
pub struct FilterOnDisk {
    disk: String,
    filter: FilterSpec,
}

impl FilterOnDisk {
    /// From the words of `--filter`.
    pub fn from_words(text: &str) -> Result<FilterOnDisk, String> {
        let (mut disk, mut grants, mut params, mut rest) = (None, vec![], vec![], vec![]);
        for (key, value) in words::split(text)? {
            match key.strip_prefix("param.") {
                Some("") => return Err("param. needs a name: param.NAME=VALUE".into()),
                Some(name) => params.push((name.to_owned(), value)),
                None if key == "params" => return Err("write param.NAME=VALUE".into()),
                None if key == "grant" => grants.push(value),
                None if key == "disk" && disk.is_some() => return Err("disk is given twice".into()),
                None if key == "disk" => disk = Some(value),
                None => rest.push((key, value)),
            }
        }
        let disk = disk.ok_or("disk=NAME is missing: which disk is it for?")?;
        let filter = FilterSpec { grant: grants, params, ..from_words(rest)? };
        filter.check()?;
        Ok(FilterOnDisk { disk, filter })
    }

    /// Puts it on its disk.
    pub fn join(self, disks: &mut [DiskSpec]) -> Result<(), Failure> {
        let FilterOnDisk { disk: name, filter } = self;
        if let Some(disk) = disks.iter_mut().find(|disk| disk.name == name) {
            disk.filter.push(filter);
            return Ok(());
        }
        let known: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
        Err(Failure::new(format_args!(
            "filter {}: there is no disk {name:?}; the disks are: {}",
            filter.file.display(),
            known.join(", ")
        )))
    }
}

fn from_words<'de, T: Deserialize<'de>>(words: Vec<Word>) -> Result<T, String> {
    let fields = words.into_iter().map(|(key, value)| {
        let field = Field { key: key.clone(), value };
        (key, field)
    });
    T::deserialize(MapDeserializer::new(fields)).map_err(|error: WordError| error.to_string())
}

/// The value of a word; errors name the word.
struct Field {
    key: String,
    value: String,
}

impl IntoDeserializer<'_> for Field {
    type Deserializer = Field;

    fn into_deserializer(self) -> Field {
        self
    }
}

impl<'de> Deserializer<'de> for Field {
    type Error = WordError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, WordError> {
        let key = self.key;
        let named = |error: WordError| WordError::custom(format!("{key}: {error}"));
        visitor.visit_string(self.value).map_err(named)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, WordError> {
        visitor.visit_some(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// `"x"` or `["x", "y"]`.
fn one_or_several<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Visit<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Visit<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text or a list of texts")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Vec<T>, E> {
            Ok(vec![T::deserialize(text.into_deserializer())?])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut values = Vec::new();
            while let Some(value) = seq.next_element()? {
                values.push(value);
            }
            Ok(values)
        }
    }
    deserializer.deserialize_any(Visit(PhantomData))
}

/// A table of parameters, in its order.
fn in_order<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Word>, D::Error> {
    struct Visit;
    impl<'de> Visitor<'de> for Visit {
        type Value = Vec<Word>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table of parameters")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vec<Word>, A::Error> {
            let mut params = Vec::new();
            while let Some((name, Given(Text(value)))) = map.next_entry()? {
                params.push((name, value));
            }
            Ok(params)
        }
    }
    deserializer.deserialize_map(Visit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_a_disk_is_read() {
        let disk = DiskSpec::from_words(
            "name=root,file=/a,,b.img,format=raw,socket=s,mode=0600,queues=2,queue-size=128,\
             direct=off,readonly=on,engine=threads,serial=x,write-cache=off,state=/s",
        )
        .unwrap();
        assert_eq!(disk.file, Some(PathBuf::from("/a,b.img")));
        assert_eq!(disk.mode, Some(Given(Mode(0o600))));
        assert_eq!((disk.queues, disk.queue_size), (Some(Given(2)), Some(Given(128))));
        assert_eq!((disk.direct, disk.readonly), (Some(Given(false)), Some(Given(true))));
        assert_eq!(disk.engine, Some(Given(Engine::Threads)));
        assert_eq!(disk.write_cache, Some(Given(false)));
        assert_eq!(disk.state, Some(PathBuf::from("/s")));
        let disk = DiskSpec::from_words(
            "name=n,memory=1G,nbd=[::1]:10809,nbd-export=x,nbd-readonly=on,nbd-connections=9,\
             nbd-tls-cert=c,nbd-tls-key=k,nbd-tls=optional",
        )
        .unwrap();
        assert_eq!(disk.nbd, Some(Given(NbdPlace::Tcp("[::1]:10809".into()))));
        assert_eq!(disk.nbd_tls, Some(Given(NbdTlsUse::Optional)));
        assert!(disk.is_only_nbd());
        let disk = DiskSpec::from_words("name=n,memory=1G,nbd=systemd:backup").unwrap();
        assert_eq!(disk.nbd, Some(Given(NbdPlace::Systemd("backup".into()))));
        let disk = DiskSpec::from_words("name=f,remote=[::1]:10809,remote-export=x").unwrap();
        assert_eq!(disk.remote, Some(Given(upcall_worker::NbdPlace::Tcp("[::1]:10809".into()))));
        assert_eq!(disk.remote_export.as_deref(), Some("x"));
        let disk = DiskSpec::from_words("name=m,memory=1G,fd=3").unwrap();
        assert_eq!((disk.memory, disk.fd), (Some(Given(Size(1 << 30))), Some(Given(3))));
    }

    #[test]
    fn images_below_are_read_in_their_order() {
        let disk = DiskSpec::from_words(
            "name=r,file=a,format=qcow2,backing=qcow2:b,backing=raw:/c:d,data-file=e,secret=s",
        )
        .unwrap();
        let layers: Vec<_> = disk.backing.iter().map(|given| &given.0).collect();
        assert_eq!(layers[0], &Layer { format: ImageFormat::Qcow2, path: "b".into() });
        assert_eq!(layers[1], &Layer { format: ImageFormat::Raw, path: "/c:d".into() });
        assert_eq!(disk.image_format(), Some(ImageFormat::Qcow2));
        let raw = DiskSpec::from_words("name=r,file=a,format=raw").unwrap();
        assert_eq!(raw.image_format(), None);
    }

    #[test]
    fn a_wrong_word_of_a_disk_is_named() {
        for (words, says) in [
            ("file=a", "name"),
            ("name=r", "disk r has no data"),
            ("name=r,file=a,memory=1G", "only one of file, memory, null and remote"),
            ("name=r,file=a,colour=blue", "colour"),
            ("name=r,file=a,queues=many", "queues: \"many\""),
            ("name=r,file=a,queues=1,queues=2", "duplicate field `queues`"),
            ("name=r,file=a,direct=maybe", "direct: \"maybe\" is neither on nor off"),
            ("name=r,file=a,engine=aio", "engine: \"aio\""),
            ("name=r,file=a,mode=rw", "mode: \"rw\""),
            ("name=r,file=a,format=qcow3", "format: \"qcow3\""),
            ("name=r,memory=1G,format=qcow2", "for a disk with file"),
            ("name=r,file=a,format=qcow2,engine=threads", "engine is for raw images"),
            ("name=r,file=a,backing=raw:b", "need a format other than raw"),
            ("name=r,file=a,format=raw,extents=.", "need a format other than raw"),
            ("name=r,file=a,format=qcow2,backing=b", "backing: \"b\""),
            ("name=r,file=a,format=qcow2,backing=foo:b", "backing: \"foo\""),
            ("name=r,memory=1X", "memory: \"1X\""),
            ("name=r,memory=1G,direct=on", "for disks with file"),
            ("name=r,file=a,socket=s,fd=3", "only one of socket and fd"),
            ("name=r,file=a,fd=3,mode=0600", "mode of an inherited socket"),
            ("name=r,file=a,filter=x", "filter"),
            ("name=r,,file=a", "has no data"),
            ("name=r,remote=fd:3", "remote: \"fd:3\""),
            ("name=r,remote=unix:s,format=qcow2", "for a disk with file"),
            ("name=r,file=a,remote=unix:s", "only one of"),
            ("name=r,file=a,remote-export=x", "for disks with remote=ADDRESS"),
            ("name=r,file=a,nbd=nowhere", "nbd: \"nowhere\""),
            ("name=r,file=a,nbd=host:port", "nbd: \"host:port\""),
            ("name=r,file=a,nbd=fd:x", "nbd: \"fd:x\""),
            ("name=r,file=a,nbd=systemd:", "nbd: \"systemd:\""),
            ("name=r,file=a,nbd-export=x", "for disks with nbd=ADDRESS"),
            ("name=r,file=a,nbd=unix:s,nbd-tls-cert=c", "both nbd-tls-cert and nbd-tls-key"),
            ("name=r,file=a,nbd=unix:s,nbd-tls=optional", "both nbd-tls-cert and nbd-tls-key"),
            (
                "name=r,file=a,nbd=unix:s,nbd-tls-cert=c,nbd-tls-key=k,nbd-tls-ca=a,nbd-tls=optional",
                "cannot be optional",
            ),
            ("name=r,file=a,nbd=unix:s,nbd-connections=0", "at least 1"),
            ("name=r,file=a,nbd=unix:s,serial=x", "for vhost-user"),
        ] {
            let said = DiskSpec::from_words(words).unwrap_err();
            assert!(said.contains(says), "{words}: {said}");
        }
    }

    #[test]
    fn every_word_of_a_filter_is_read() {
        let filter = FilterOnDisk::from_words(
            "disk=root,file=/f.so,name=x-1,order=-3,placement=inline,deadline-ms=250,on-failure=bypass,\
             grant=a,grant=b,param.x=1,,2,param.y=",
        )
        .unwrap();
        assert_eq!(filter.disk, "root");
        let filter = filter.filter;
        assert_eq!((filter.order, filter.name.as_deref()), (Some(Given(-3)), Some("x-1")));
        assert_eq!(filter.placement, Some(Given(Placement::Inline)));
        assert_eq!(filter.deadline_ms, Some(Given(250)));
        assert_eq!(filter.on_failure, Some(Given(OnFailure::Bypass)));
        assert_eq!(filter.memory, None);
        assert_eq!(filter.grant, ["a", "b"]);
        assert_eq!(filter.params, [("x".into(), "1,2".into()), ("y".into(), String::new())]);
        let filter = FilterOnDisk::from_words("disk=root,file=/f.so,memory=64M").unwrap().filter;
        assert_eq!(filter.memory, Some(Given(Size(64 << 20))));
    }

    #[test]
    fn a_wrong_word_of_a_filter_is_named() {
        for (words, says) in [
            ("file=/f.so", "disk=NAME"),
            ("disk=root", "file"),
            ("disk=a,disk=b,file=f", "disk is given twice"),
            ("disk=a,file=f,order=first", "order: \"first\""),
            ("disk=a,file=f,placement=outside", "placement: \"outside\""),
            ("disk=a,file=f,deadline-ms=soon", "deadline-ms: \"soon\""),
            ("disk=a,file=f,on-failure=ignore", "on-failure: \"ignore\""),
            ("disk=a,file=f,memory=much", "memory: \"much\""),
            ("disk=a,file=f,memory=64K", "at least 16M"),
            ("disk=a,file=f,memory=64M,placement=inline", "process of their own"),
            ("disk=a,file=f,param.=1", "param.NAME"),
            ("disk=a,file=f,params=1", "param.NAME"),
            ("disk=a,file=f,prio=1", "prio"),
        ] {
            let said = FilterOnDisk::from_words(words).unwrap_err();
            assert!(said.contains(says), "{words}: {said}");
        }
    }
}
