//! Each bug that can be planted makes a test fail: so the test would have caught it.

use std::process::{Command, Stdio};

/// Bugs, and who catches them.
const PLANTS: [(&str, &str); 7] = [
    (
        "error-into-success",
        "a_new_instance_sees_completions_marked_and_without_the_context_of_the_old_one",
    ),
    (
        "retry-twice",
        "what_had_no_verdict_is_delivered_again_marked_and_in_the_order_of_its_submission",
    ),
    ("retry-without-image", "a_page_that_was_half_changed_is_delivered_again_as_it_was"),
    ("verdict-of-the-dead", "an_answer_to_what_an_earlier_life_was_asked_is_none"),
    (
        "bypass-without-mark",
        "what_a_bypassed_filter_misses_is_recorded_before_it_goes_on_and_what_it_saw_is_not",
    ),
    ("report-to-the-next", "an_issued_request_that_outlives_its_issuer_is_reported_to_nobody"),
    (
        "retry-out-of-order",
        "what_had_no_verdict_is_delivered_again_marked_and_in_the_order_of_its_submission",
    ),
];

fn passes(test: &str, plant: Option<&str>) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("engine::tests::lives::{test}")]);
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
