//! Reads parameters as the framework does, so that a test's typing error is a failed test.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};

use crate::{Param, sys};

/// The values of all declared parameters: as a number where there is one, and as text.
///
/// Panics, with the parameter's name, where the framework would refuse.
pub(crate) fn read(
    declared: &[Param],
    given: &BTreeMap<CString, CString>,
) -> BTreeMap<CString, (i64, CString)> {
    for name in given.keys() {
        let is_known = declared.iter().any(|param| param.name() == name.as_c_str());
        assert!(is_known, "the filter has no parameter {name:?}");
    }
    let mut values = BTreeMap::new();
    for param in declared {
        let default = param.default_value();
        let Some(text) = given.get(param.name()).map(CString::as_c_str).or(default) else {
            let is_optional = param.0.r#type >= sys::PARAM_FILE_READ;
            assert!(is_optional, "parameter {:?} must be given", param.name());
            continue;
        };
        let Some(number) = number(param, text) else {
            panic!("parameter {:?} cannot be {text:?}", param.name());
        };
        values.insert(param.name().to_owned(), (number, text.to_owned()));
    }
    values
}

fn number(param: &Param, text: &CStr) -> Option<i64> {
    let text = text.to_str().ok()?;
    let (min, max) = (param.0.min.0, param.0.max);
    let in_bounds = |value: &i64| (min, max) == (0, 0) || (min..=max).contains(value);
    match param.0.r#type {
        sys::PARAM_INT => text.parse().ok().filter(in_bounds),
        sys::PARAM_BOOL => match text {
            "true" | "yes" | "on" | "1" => Some(1),
            "false" | "no" | "off" | "0" => Some(0),
            _ => None,
        },
        sys::PARAM_STRING => Some(text.len() as i64).filter(in_bounds).map(|_| 0),
        sys::PARAM_SIZE => {
            scaled(text, &[("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30), ("T", 1 << 40)])
                .filter(in_bounds)
        }
        sys::PARAM_MILLIS => {
            scaled(text, &[("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)])
                .filter(in_bounds)
        }
        sys::PARAM_CHOICE => {
            let choices = param.choices()?.to_str().ok()?;
            choices.split('|').any(|choice| choice == text).then_some(0)
        }
        sys::PARAM_FRACTION => {
            text.parse::<f64>().ok().filter(|value| (0.0..=1.0).contains(value)).map(|_| 0)
        }
        _ => None, // files are given as descriptors
    }
}

fn scaled(text: &str, units: &[(&str, i64)]) -> Option<i64> {
    for (unit, factor) in units {
        if let Some(value) = text.strip_suffix(unit) {
            return value.parse::<i64>().ok()?.checked_mul(*factor);
        }
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_bounds_count() {
        let size = Param::size(c"s", c"", Some(c"1"), 0, 1 << 30);
        assert_eq!(number(&size, c"4K"), Some(4096));
        assert_eq!(number(&size, c"2G"), None);
        let any = Param::size(c"a", c"", Some(c"1"), 0, 0);
        assert_eq!(number(&any, c"7T"), Some(7 << 40), "both bounds 0: any value");
        let time = Param::millis(c"t", c"", Some(c"1"), 0, 100_000);
        assert_eq!(number(&time, c"20ms"), Some(20));
        assert_eq!(number(&time, c"2s"), Some(2000));
        assert_eq!(number(&time, c"1m"), Some(60_000));
        assert_eq!(number(&time, c"1h"), None);
        let choice = Param::choice(c"c", c"", None, c"one|two");
        assert_eq!((number(&choice, c"two"), number(&choice, c"tw")), (Some(0), None));
    }
}
