//! Each bug that can be planted makes a test fail: so the test would have caught it.

use std::process::{Command, Stdio};

/// Bugs, and who catches them.
const PLANTS: [(&str, &str); 10] = [
    (
        "error-into-success",
        "lives::a_new_instance_sees_completions_marked_and_without_the_context_of_the_old_one",
    ),
    (
        "retry-twice",
        "lives::what_had_no_verdict_is_delivered_again_marked_and_in_the_order_of_its_submission",
    ),
    ("retry-without-image", "lives::a_page_that_was_half_changed_is_delivered_again_as_it_was"),
    ("verdict-of-the-dead", "lives::an_answer_to_what_an_earlier_life_was_asked_is_none"),
    (
        "bypass-without-mark",
        "lives::what_a_bypassed_filter_misses_is_recorded_before_it_goes_on_and_what_it_saw_is_not",
    ),
    (
        "report-to-the-next",
        "lives::an_issued_request_that_outlives_its_issuer_is_reported_to_nobody",
    ),
    (
        "bypass-before-mark",
        "lives::what_a_bypassed_filter_misses_is_recorded_before_it_goes_on_and_what_it_saw_is_not",
    ),
    // Bytes that nobody has filled in, in the data of a read (CVE-2024-8612).
    (
        "uninitialised-page",
        "data::a_read_that_a_filter_answers_without_filling_it_shows_nothing_of_earlier_requests",
    ),
    ("failed-read-copied", "data::a_read_that_fails_leaves_the_guests_memory_as_it_was"),
    (
        "retry-out-of-order",
        "lives::what_had_no_verdict_is_delivered_again_marked_and_in_the_order_of_its_submission",
    ),
];

fn passes(test: &str, plant: Option<&str>) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("engine::tests::{test}")]);
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
