//! `key=value,key=value`, as QEMU writes it: a comma inside a value is doubled.

/// One `key=value`.
pub type Word = (String, String);

/// Splits `text` into its words, in their order. A word without `=` or key is an error.
pub fn split(text: &str) -> Result<Vec<Word>, String> {
    pieces(text).into_iter().map(|piece| pair(&piece)).collect()
}

/// Doubles commas, so that [`split`] gives `value` back.
pub fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// Splits at the first `=`.
pub fn pair(piece: &str) -> Result<Word, String> {
    match piece.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ if piece.is_empty() => {
            Err("an empty word: write KEY=VALUE, and commas in values twice".to_owned())
        }
        _ => Err(format!("{piece:?} is not of the form KEY=VALUE (write commas in values twice)")),
    }
}

fn pieces(text: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        match (char, pieces.last_mut()) {
            (',', Some(last)) if chars.next_if_eq(&',').is_some() => last.push(','),
            (',', _) => pieces.push(String::new()),
            (char, Some(last)) => last.push(char),
            (_, None) => unreachable!("there is always a piece"),
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_at_single_commas_and_first_equals_signs() {
        for (text, expected) in [
            ("a=1", vec![("a", "1")]),
            ("a=1,b=", vec![("a", "1"), ("b", "")]),
            ("a=1,,2,b=x=y", vec![("a", "1,2"), ("b", "x=y")]),
            ("a=1,,,b=2", vec![("a", "1,"), ("b", "2")]),
            ("a=,,,,", vec![("a", ",,")]),
        ] {
            let expected: Vec<Word> =
                expected.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
            assert_eq!(split(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_word_is_named() {
        for (text, says) in [("", "empty"), ("a=1,", "empty"), ("a", "\"a\""), ("=1", "\"=1\"")] {
            let said = split(text).unwrap_err();
            assert!(said.contains(says), "{text:?}: {said}");
        }
    }

    #[test]
    fn an_escaped_value_is_given_back() {
        for value in ["", "a", ",", "a,b,,c", ",,,"] {
            let text = format!("k={},z=1", escape(value));
            assert_eq!(split(&text).unwrap()[0].1, value);
        }
    }
}
