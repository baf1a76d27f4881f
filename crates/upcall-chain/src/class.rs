//! Classes of filters: what decides the order in a chain.

use std::fmt;

/// What a filter is for. The order is that of the chain, from the guest to the store; the
/// numbers are those of `upcall/filter.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    /// Looks at what the guest wrote, before anybody changed it.
    Inspection = 1,
    /// Makes data smaller; before encryption, after which nothing can.
    Compression = 2,
    /// Makes data unreadable for all below.
    Encryption = 3,
    /// Brings data to another place.
    Replication = 4,
    /// Answers from nearer media.
    Cache = 5,
    /// Brings data from somewhere else than the store.
    Provider = 6,
    /// Decides when a request goes on.
    Qos = 7,
    /// Records what reaches the store.
    Capture = 8,
}

impl Class {
    /// All classes, from the guest to the store.
    pub const ALL: [Class; 8] = [
        Class::Inspection,
        Class::Compression,
        Class::Encryption,
        Class::Replication,
        Class::Cache,
        Class::Provider,
        Class::Qos,
        Class::Capture,
    ];

    /// The class of a number of `upcall/filter.h`.
    pub fn from_number(number: u32) -> Option<Class> {
        Class::ALL.into_iter().find(|class| *class as u32 == number)
    }

    /// The name in messages and files.
    pub const fn name(self) -> &'static str {
        match self {
            Class::Inspection => "inspection",
            Class::Compression => "compression",
            Class::Encryption => "encryption",
            Class::Replication => "replication",
            Class::Cache => "cache",
            Class::Provider => "provider",
            Class::Qos => "qos",
            Class::Capture => "capture",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_header_and_in_the_order_of_the_chain() {
        let header = include_str!("../../../sdk/c/include/upcall/filter.h");
        for class in Class::ALL {
            let line = format!("UPCALL_CLASS_{} = {}", class.name().to_uppercase(), class as u32);
            assert!(header.contains(&line), "{line}");
            assert_eq!(Class::from_number(class as u32), Some(class));
        }
        assert!(Class::ALL.is_sorted());
        assert_eq!((Class::from_number(0), Class::from_number(9)), (None, None));
    }
}
