//! Messages of a worker: one line each on standard error, its level in front.

use std::io::Write;
use std::sync::Arc;

use upcall_worker::{LogLevel, LogSink};

use crate::cli::Level;

/// Shows messages of `least` importance and more.
pub fn sink(least: Level) -> LogSink {
    Arc::new(move |level, text| {
        if level <= threshold(least) {
            // A line at once, so that lines of two threads do not mix. There is nobody to
            // tell when standard error is gone.
            let _ = std::io::stderr().write_all(line(level, text).as_bytes());
        }
    })
}

fn threshold(least: Level) -> LogLevel {
    match least {
        Level::Error => LogLevel::Error,
        Level::Warn => LogLevel::Warn,
        Level::Info => LogLevel::Info,
        Level::Debug => LogLevel::Debug,
    }
}

fn line(level: LogLevel, text: &str) -> String {
    let level = match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warning",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
    };
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("upcall: {level}: {text}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(line(LogLevel::Warn, "a\nb\x1b[1m"), "upcall: warning: a b [1m\n");
    }
}
