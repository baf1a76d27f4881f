//! Messages of a worker and its supervisor: one line each on standard error, for people (its level
//! in front) or for programs (JSON).

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use upcall_control::{Events, Said};
use upcall_worker::LogLevel;

use crate::cli::{Level, LogFormat, ServeArgs};

/// From here on what is said is shown as `args` say, and kept in `events`. Called once.
pub fn begin(args: &ServeArgs, events: Events) {
    let lines = Lines { least: threshold(args.log_level), format: args.log_format };
    let listening = tracing_subscriber::registry().with(events).with(lines);
    // Only a second one is refused.
    let _ = tracing::subscriber::set_global_default(listening);
}

/// Shows messages of `least` importance and more.
struct Lines {
    least: LogLevel,
    format: LogFormat,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let Some(said) = Said::of(event).filter(|said| said.level <= self.least) else { return };
        let line = match self.format {
            LogFormat::Text => text(&said),
            LogFormat::Json => json(said),
        };
        // A line at once, so that lines of two threads do not mix. There is nobody to
        // tell when standard error is gone.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

fn threshold(least: Level) -> LogLevel {
    match least {
        Level::Error => LogLevel::Error,
        Level::Warn => LogLevel::Warn,
        Level::Info => LogLevel::Info,
        Level::Debug => LogLevel::Debug,
    }
}

fn text(said: &Said) -> String {
    let text: String = said.text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("upcall: {}: {text}\n", said.level_name())
}

fn json(said: Said) -> String {
    let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |at| at.as_millis());
    let mut line = Map::new();
    line.insert("at_ms".to_owned(), (at_ms as u64).into());
    line.insert("process_id".to_owned(), std::process::id().into());
    line.insert("level".to_owned(), said.level_name().into());
    line.insert("text".to_owned(), said.text.into());
    line.extend(said.fields);
    format!("{}\n", Value::Object(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Said {
        let fields = Map::from_iter([("user".to_owned(), 7.into())]);
        Said { level: LogLevel::Warn, text: text.to_owned(), fields }
    }

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(text(&said("a\nb\x1b[1m")), "upcall: warning: a b [1m\n");
        let line = json(said("a\nb"));
        assert_eq!(line.matches('\n').count(), 1);
        let line: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&line["level"], &line["user"]), (&"warning".into(), &7.into()));
        assert_eq!(line["text"], "a\nb");
    }
}
