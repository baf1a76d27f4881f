//! Bugs that can be planted, so that tests can be shown to catch them. Only in this crate's
//! tests and with the feature `plant`, and only the one that `UPCALL_PLANT` in the environment
//! names; never in a product.

/// Whether this bug is there.
#[cfg(not(any(test, feature = "plant")))]
pub(crate) const fn is_planted(_: &str) -> bool {
    false
}

/// Whether this bug is there.
#[cfg(any(test, feature = "plant"))]
pub(crate) fn is_planted(name: &str) -> bool {
    static PLANTED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    PLANTED.get_or_init(|| std::env::var("UPCALL_PLANT").ok()).as_deref() == Some(name)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    /// Bugs, and who catches them.
    const PLANTS: [(&str, &str); 1] = [
        // A write into what a discard in flight gives back (QEMU 2011): they race.
        ("write-against-discard", "image::ledger::tests::a_write_waits_for_a_discard_below_it"),
    ];

    fn passes(test: &str, plant: Option<&str>) -> bool {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test]);
        command.env_remove("UPCALL_PLANT").stdout(Stdio::piped()).stderr(Stdio::null());
        if let Some(plant) = plant {
            command.env("UPCALL_PLANT", plant);
        }
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("running 1 test"), "there is no test {test}");
        output.status.success()
    }

    #[test]
    fn each_planted_bug_is_caught() {
        for (plant, test) in PLANTS {
            assert!(passes(test, None), "{test} fails without a plant");
            assert!(!passes(test, Some(plant)), "{test} does not catch {plant}");
        }
    }
}
