//! `upcall bench`: what filters cost here. That it measures, not what.

use upcall_tests::{c_filter, upcall};

#[test]
fn a_filter_is_measured_beside_the_same_without_it() {
    let filter = c_filter("trace", 64);
    let filter = filter.to_str().unwrap();
    let ended = upcall(&["bench", filter, "--seconds", "0.5"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for case in ["write, 1 in flight", "write, 32 in flight", "read, 1 in flight", "read, 32"] {
        assert!(ended.stdout.contains(case), "{case}: {}", ended.stdout);
    }
    assert_eq!(ended.stdout.matches("of it are left").count(), 4, "{}", ended.stdout);
    let ended = upcall(&["bench", filter, filter, "--seconds", "0.5", "--json"]);
    let section: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    let rows = section["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8, "four cases, two sides");
    for row in rows {
        let metric = |name| {
            let metrics = row["metrics"].as_array().unwrap();
            metrics.iter().find(|metric| metric["name"] == name).unwrap_or_else(|| panic!("{row}"))
        };
        assert!(metric("rate")["samples"][6].as_f64().unwrap() > 0.0, "{row}");
        let hosts = row["metrics"].as_array().unwrap().iter();
        let has_hosts = hosts.clone().any(|metric| metric["name"] == "cpu filter hosts");
        assert_eq!(has_hosts, row["side"] == "with the filters", "{row}");
    }
}

#[test]
fn what_cannot_be_measured_is_named() {
    let ended = upcall(&["bench", "/nonexistent/filter.so"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("/nonexistent/filter.so"), "{}", ended.stderr);
    let filter = c_filter("trace", 64);
    let ended = upcall(&["bench", filter.to_str().unwrap(), "--param", "no-such=1"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("no-such"), "{}", ended.stderr);
    assert_eq!(upcall(&["bench"]).code, Some(2), "no filter");
}
