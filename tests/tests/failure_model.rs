//! docs/failure-model.md promises nothing without a proof: each promise names tests, and they
//! are there.

use upcall_tests::root;

/// A promise: a list item, its lines put together.
fn items(text: &str) -> Vec<(String, bool)> {
    let mut items: Vec<(String, bool)> = Vec::new();
    let (mut promised, mut open) = (true, false);
    for line in text.lines() {
        if line.starts_with('#') {
            promised = true;
        } else if line.starts_with("Not promised") {
            promised = false;
        }
        if let Some(item) = line.strip_prefix("- ") {
            items.push((item.to_owned(), promised));
            open = true;
        } else if open && line.starts_with("  ") {
            let (item, _) = items.last_mut().unwrap();
            item.push(' ');
            item.push_str(line.trim());
        } else {
            open = false;
        }
    }
    items
}

/// What stands between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The tests that a text names: a file, and, in a file of Rust, a function.
fn proofs(text: &str) -> Vec<(String, Option<String>)> {
    let mut proofs: Vec<(String, Option<String>)> = Vec::new();
    for word in quoted(text) {
        if word.contains('/') && (word.ends_with(".rs") || word.ends_with(".sh")) {
            proofs.push((word.to_owned(), None));
        } else if let Some((file, name @ None)) = proofs.last_mut()
            && file.ends_with(".rs")
        {
            *name = Some(word.to_owned());
        }
    }
    proofs
}

#[test]
fn each_promise_of_the_failure_model_names_tests_that_are_there() {
    let text = std::fs::read_to_string(root().join("docs/failure-model.md")).unwrap();
    let promises: Vec<String> =
        items(&text).into_iter().filter(|(_, promised)| *promised).map(|(item, _)| item).collect();
    assert!(promises.len() > 20, "hardly a promise was found");
    for promise in &promises {
        assert!(!proofs(promise).is_empty(), "no test is named: {promise}");
    }
    for (file, name) in proofs(&text) {
        let content = std::fs::read_to_string(root().join(&file))
            .unwrap_or_else(|error| panic!("{file}: {error}"));
        if file.ends_with(".rs") {
            let name = name.unwrap_or_else(|| panic!("{file}: which test?"));
            let test = format!("fn {name}()");
            let at = content.find(&test).unwrap_or_else(|| panic!("{file} has no test {name}"));
            let before = &content[..at];
            let attribute = before.rfind("#[test]").map_or("", |at| &before[at..]);
            assert!(
                !attribute.is_empty() && !attribute.contains("fn "),
                "{name} in {file} is no test"
            );
        }
    }
}

#[test]
fn a_promise_without_a_proof_would_be_seen() {
    let all = items("# A\n- One\n  `a/b.rs`: `c`\n\nNot promised:\n\n- Two\n# B\n- Three\n");
    let promised: Vec<&str> =
        all.iter().filter(|(_, promised)| *promised).map(|(item, _)| item.as_str()).collect();
    assert_eq!(promised, ["One `a/b.rs`: `c`", "Three"]);
    assert_eq!(proofs(promised[0]), [("a/b.rs".to_owned(), Some("c".to_owned()))]);
    assert!(proofs(promised[1]).is_empty());
}
