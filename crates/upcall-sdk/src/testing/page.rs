//! A manual page and the parameters it describes, compared.

use crate::Filter;

/// Compares the section PARAMETERS of a manual page, in the man format, with
/// [`Filter::PARAMS`]: the same names in the same order, each with its default. A
/// parameter is written as
///
/// ```text
/// .TP
/// .BR name " (type, default 10)"
/// ```
///
/// or `(type, required)`, or `(type, optional)` for what may be absent.
///
/// # Panics
///
/// If they differ; the message says where.
pub fn check_manual_page<F: Filter>(page: &str) {
    let section = page.split("\n.SH PARAMETERS\n").nth(1).expect("a section PARAMETERS");
    let section = section.split("\n.SH ").next().unwrap_or(section);
    let lines: Vec<&str> = section.lines().filter(|line| line.starts_with(".BR ")).collect();
    let names: Vec<&str> = lines.iter().filter_map(|line| line.split(' ').nth(1)).collect();
    let declared: Vec<&str> =
        F::PARAMS.iter().map(|param| param.name().to_str().unwrap_or("?")).collect();
    assert_eq!(names, declared, "the page's parameters and the filter's");
    for (line, param) in lines.iter().zip(F::PARAMS) {
        let default = match param.default_value() {
            Some(text) => format!("default {})", text.to_string_lossy()),
            None if param.0.r#type >= crate::sys::PARAM_FILE_READ => "optional)".to_owned(),
            None => "required)".to_owned(),
        };
        assert!(line.contains(&default), "the page says {line:?}, the filter {default:?}");
    }
}
