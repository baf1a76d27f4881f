//! Bugs that can be planted, so that tests can be shown to catch them. Only with the feature
//! `plant`, and only the one that `UPCALL_PLANT` in the environment names; never in a product.

/// Whether this bug is there.
#[cfg(not(feature = "plant"))]
pub(crate) const fn is_planted(_: &str) -> bool {
    false
}

/// Whether this bug is there.
#[cfg(feature = "plant")]
pub(crate) fn is_planted(name: &str) -> bool {
    static PLANTED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    PLANTED.get_or_init(|| std::env::var("UPCALL_PLANT").ok()).as_deref() == Some(name)
}
