//! The values of words: each knows how it is written, in flags and in TOML alike.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde::de::{Deserialize, Deserializer, Error, Visitor};
use upcall_worker::OnFailure;

/// Something that an operator writes.
pub trait Value: Sized {
    /// From text; the error says what to write.
    fn from_text(text: &str) -> Result<Self, String>;

    /// From a number in TOML.
    fn from_integer(number: i64) -> Result<Self, String> {
        Self::from_text(&number.to_string())
    }
}

/// A [`Value`] in a table or list of words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given<T>(pub T);

impl<'de, T: Value> Deserialize<'de> for Given<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit<T>(PhantomData<T>);
        impl<T: Value> Visitor<'_> for Visit<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a number, true or false")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
                T::from_text(text).map_err(E::custom)
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
                T::from_integer(number).map_err(E::custom)
            }

            fn visit_f64<E: Error>(self, number: f64) -> Result<T, E> {
                T::from_text(&number.to_string()).map_err(E::custom)
            }

            fn visit_bool<E: Error>(self, yes: bool) -> Result<T, E> {
                T::from_text(if yes { "on" } else { "off" }).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visit(PhantomData)).map(Given)
    }
}

impl Value for bool {
    fn from_text(text: &str) -> Result<bool, String> {
        match text {
            "on" | "yes" | "true" => Ok(true),
            "off" | "no" | "false" => Ok(false),
            _ => Err(format!("{text:?} is neither on nor off")),
        }
    }
}

macro_rules! numbers {
    ($($number:ty),*) => { $(
        impl Value for $number {
            fn from_text(text: &str) -> Result<$number, String> {
                text.parse().map_err(|_| {
                    let (min, max) = (<$number>::MIN, <$number>::MAX);
                    format!("{text:?} is not a whole number from {min} to {max}")
                })
            }
        }
    )* };
}
numbers!(u16, u32, i32);

impl Value for OnFailure {
    fn from_text(text: &str) -> Result<OnFailure, String> {
        OnFailure::from_name(text)
            .ok_or_else(|| format!("{text:?} is none of hold, bypass, fail and detach"))
    }
}

/// Bytes, or with K, M, G or T (of 1024) behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl Value for Size {
    fn from_text(text: &str) -> Result<Size, String> {
        let wrong = || format!("{text:?} is no size: write bytes, or with K, M, G or T behind");
        let shift = match text.chars().last() {
            Some('K' | 'k') => 10,
            Some('M' | 'm') => 20,
            Some('G' | 'g') => 30,
            Some('T' | 't') => 40,
            _ => 0,
        };
        let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(wrong)
    }
}

/// Permissions of a socket, in octal as chmod takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(pub u32);

impl Value for Mode {
    fn from_text(text: &str) -> Result<Mode, String> {
        match u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8) {
            Ok(mode) if mode <= 0o777 => Ok(Mode(mode)),
            _ => Err(format!("{text:?} is no mode: write it in octal, as 0660")),
        }
    }

    fn from_integer(number: i64) -> Result<Mode, String> {
        match u32::try_from(number) {
            Ok(mode) if mode <= 0o777 => Ok(Mode(mode)),
            _ => Err(format!("{number:#o} is no mode: write 0o660, or \"0660\"")),
        }
    }
}

impl Value for upcall_worker::ImageFormat {
    fn from_text(text: &str) -> Result<Self, String> {
        Self::from_name(text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!(
                "{text:?} images are not served: only {names}; convert it with qemu-img convert"
            )
        })
    }
}

impl Value for upcall_worker::Layer {
    fn from_text(text: &str) -> Result<Self, String> {
        let (format, path) = text
            .split_once(':')
            .filter(|(_, path)| !path.is_empty())
            .ok_or_else(|| format!("{text:?} has no format: write FORMAT:PATH"))?;
        Ok(Self { format: Value::from_text(format)?, path: path.into() })
    }
}

impl Value for upcall_worker::Engine {
    fn from_text(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "io_uring" => Ok(Self::IoUring),
            "threads" => Ok(Self::Threads),
            _ => Err(format!("{text:?} is none of auto, io_uring and threads")),
        }
    }
}

impl Value for upcall_worker::Placement {
    fn from_text(text: &str) -> Result<Self, String> {
        match text {
            "isolated" => Ok(Self::Isolated),
            "inline" => Ok(Self::Inline),
            _ => Err(format!("{text:?} is neither isolated nor inline")),
        }
    }
}

/// Where NBD clients connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdPlace {
    Unix(PathBuf),
    Tcp(String),
    /// An inherited socket.
    Fd(u16),
    /// One that systemd hands over by this name.
    Systemd(String),
}

impl Value for NbdPlace {
    fn from_text(text: &str) -> Result<NbdPlace, String> {
        let wrong = || {
            format!(
                "{text:?} is no address for NBD: write unix:PATH, HOST:PORT, fd:NUMBER or \
                 systemd:NAME"
            )
        };
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(wrong()) } else { Ok(NbdPlace::Unix(path.into())) };
        }
        if let Some(number) = text.strip_prefix("fd:") {
            return number.parse().map(NbdPlace::Fd).map_err(|_| wrong());
        }
        if let Some(name) = text.strip_prefix("systemd:") {
            return if name.is_empty() { Err(wrong()) } else { Ok(NbdPlace::Systemd(name.into())) };
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(NbdPlace::Tcp(text.to_owned()))
            }
            _ => Err(wrong()),
        }
    }
}

/// Where an NBD server listens that has a disk.
impl Value for upcall_worker::NbdPlace {
    fn from_text(text: &str) -> Result<upcall_worker::NbdPlace, String> {
        match NbdPlace::from_text(text) {
            Ok(NbdPlace::Unix(path)) => Ok(upcall_worker::NbdPlace::Unix(path)),
            Ok(NbdPlace::Tcp(address)) => Ok(upcall_worker::NbdPlace::Tcp(address)),
            Ok(NbdPlace::Fd(_) | NbdPlace::Systemd(_)) | Err(_) => Err(format!(
                "{text:?} is no address of an NBD server: write unix:PATH or HOST:PORT"
            )),
        }
    }
}

/// Whether NBD clients must use TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NbdTlsUse {
    Required,
    Optional,
}

impl Value for NbdTlsUse {
    fn from_text(text: &str) -> Result<NbdTlsUse, String> {
        match text {
            "required" => Ok(NbdTlsUse::Required),
            "optional" => Ok(NbdTlsUse::Optional),
            _ => Err(format!("{text:?} is neither required nor optional")),
        }
    }
}

/// The value of a filter's parameter, whose type only the filter knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text(pub String);

impl Value for Text {
    fn from_text(text: &str) -> Result<Text, String> {
        Ok(Text(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        for (text, expected) in [
            ("0", Some(0)),
            ("1000", Some(1000)),
            ("4K", Some(4096)),
            ("2m", Some(2 << 20)),
            ("1G", Some(1 << 30)),
            ("16T", Some(16 << 40)),
            ("", None),
            ("G", None),
            ("-1", None),
            ("1.5G", None),
            ("1GB", None),
            ("99999999999T", None),
        ] {
            assert_eq!(Size::from_text(text).ok(), expected.map(Size), "{text:?}");
        }
    }

    #[test]
    fn modes_are_octal_however_they_are_written() {
        for text in ["660", "0660", "0o660"] {
            assert_eq!(Mode::from_text(text), Ok(Mode(0o660)));
        }
        assert_eq!(Mode::from_integer(0o660), Ok(Mode(0o660)));
        for text in ["rw", "888", "01777", ""] {
            assert!(Mode::from_text(text).is_err(), "{text}");
        }
    }

    #[test]
    fn other_formats_are_refused_with_the_way_out() {
        let said = upcall_worker::ImageFormat::from_text("qcow").unwrap_err();
        assert!(said.contains("\"qcow\"") && said.contains("convert"), "{said}");
    }
}
