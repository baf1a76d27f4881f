//! `upcall filter new` and `upcall filter info`.

mod common;

use std::process::Command;

use common::{Folder, ROOT, upcall};

#[test]
fn a_new_filter_in_c_builds_and_passes_its_check_at_once() {
    let folder = Folder::new("new-c");
    let project = folder.text("my-filter");
    let ended = upcall(&["filter", "new", "--lang", "c", "my-filter", "--dir", &project]);
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    let made = Command::new("make")
        .args(["-C", &project, "test", "CFLAGS=-O2 -Wall -Wextra -Werror"])
        .arg(format!("UPCALL={}", env!("CARGO_BIN_EXE_upcall")))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&made.stdout);
    assert!(made.status.success(), "{said}\n{}", String::from_utf8_lossy(&made.stderr));
    assert!(said.contains("test: all right") && said.contains("checks passed"), "{said}");
    let header = std::fs::read(folder.0.join("my-filter/include/upcall/filter.h")).unwrap();
    assert_eq!(header, std::fs::read(format!("{ROOT}/sdk/c/include/upcall/filter.h")).unwrap());
    assert_eq!(folder.names(), ["my-filter"], "nothing is left beside it");
}

#[test]
fn a_new_filter_in_rust_builds_and_passes_its_check_at_once() {
    let folder = Folder::new("new-rust");
    let project = folder.text("my-filter");
    let ended = upcall(&["filter", "new", "--lang", "rust", "my-filter", "--dir", &project]);
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    for step in ["test", "build"] {
        let built = Command::new(env!("CARGO"))
            .args([step, "--quiet"])
            .current_dir(&project)
            .env("CARGO_TARGET_DIR", folder.0.join("target"))
            .output()
            .unwrap();
        assert!(built.status.success(), "{step}: {}", String::from_utf8_lossy(&built.stderr));
    }
    let ended = upcall(&["filter", "check", &folder.text("target/debug/libmy_filter.so")]);
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    assert!(ended.stdout.ends_with("checks passed\n"), "{}", ended.stdout);
}

#[test]
fn a_new_filter_in_rust_may_use_an_sdk_elsewhere() {
    let folder = Folder::new("new-sdk");
    let (project, sdk) = (folder.text("a"), format!("{ROOT}/crates/upcall-sdk"));
    let args = ["filter", "new", "--lang", "rust", "a", "--dir", &project, "--sdk"];
    let with = |sdk: &str| upcall(&[&args[..], &[sdk]].concat());
    for (sdk, says) in [("/nowhere", "Cargo.toml"), (&format!("{ROOT}/crates/upcall"), "another")] {
        let ended = with(sdk);
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        assert!(ended.stderr.contains(sdk) && ended.stderr.contains(says), "{}", ended.stderr);
        assert!(folder.names().is_empty());
    }
    assert_eq!(with(&sdk).code, Some(0));
    let manifest = std::fs::read_to_string(folder.0.join("a/Cargo.toml")).unwrap();
    assert!(manifest.contains("crates/upcall-sdk\""), "{manifest}");
    assert!(!folder.0.join("a/upcall-sdk").exists());
}

#[test]
fn nothing_is_made_where_something_is_or_cannot_be() {
    let folder = Folder::new("new-refused");
    std::fs::write(folder.0.join("mine"), "precious").unwrap();
    std::fs::create_dir_all(folder.0.join("full/of")).unwrap();
    for (dir, says) in [("full", "not empty; choose"), ("mine", ""), ("no/such/folder", "")] {
        let dir = folder.text(dir);
        let ended = upcall(&["filter", "new", "--lang", "c", "x", "--dir", &dir]);
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        assert!(ended.stderr.contains(&dir) && ended.stderr.contains(says), "{}", ended.stderr);
        assert_eq!(folder.names(), ["full", "mine"]);
    }
    for args in [["--lang", "c", "My_Filter"], ["--lang", "cobol", "x"]] {
        assert_eq!(upcall(&[&["filter", "new"], &args[..]].concat()).code, Some(2), "{args:?}");
    }
}

#[test]
fn info_says_what_a_filter_declares() {
    let folder = Folder::new("info");
    let project = folder.text("my-filter");
    assert_eq!(
        upcall(&["filter", "new", "--lang", "c", "my-filter", "--dir", &project]).code,
        Some(0)
    );
    assert!(Command::new("make").args(["-s", "-C", &project]).status().unwrap().success());
    let filter = folder.text("my-filter/my-filter.so");
    let ended = upcall(&["filter", "info", &filter]);
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    for part in ["my-filter", "inspection", "write-zeroes", "protect (size; default \"0\")"] {
        assert!(ended.stdout.contains(part), "no {part:?} in:\n{}", ended.stdout);
    }
    let ended = upcall(&["filter", "info", &filter, "--json"]);
    let value: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(value["name"], "my-filter");
    assert_eq!(value["ops"].as_array().unwrap().len(), 5);
    assert_eq!(value["params"][0]["default"], "0");

    let ended = upcall(&["filter", "info", "/nowhere/x.so"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("/nowhere/x.so"), "{}", ended.stderr);
}
