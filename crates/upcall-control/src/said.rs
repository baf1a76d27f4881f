//! What the parts of a worker say, as events of `tracing`: what is said for people, and fields for
//! programs. Nothing on the path of a request says anything.

use std::sync::Arc;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level};
use upcall_worker::{LogLevel, LogSink};

/// One message.
#[derive(Debug)]
pub struct Said {
    /// How much it matters.
    pub level: LogLevel,
    /// For people.
    pub text: String,
    /// For programs, such as who asked for something: each by its name.
    pub fields: Map<String, Value>,
}

impl Said {
    /// None: libraries say it, not we.
    pub fn of(event: &Event<'_>) -> Option<Said> {
        let of_us = event.metadata().target().starts_with("upcall");
        of_us.then(|| {
            let level = match *event.metadata().level() {
                Level::ERROR => LogLevel::Error,
                Level::WARN => LogLevel::Warn,
                Level::INFO => LogLevel::Info,
                Level::DEBUG | Level::TRACE => LogLevel::Debug,
            };
            let mut said = Said { level, text: String::new(), fields: Map::new() };
            event.record(&mut said);
            said
        })
    }

    /// The name of its level.
    pub fn level_name(&self) -> &'static str {
        match self.level {
            LogLevel::Error => "error",
            LogLevel::Warn => "warning",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
        }
    }

    fn set(&mut self, field: &Field, value: Value) {
        self.fields.insert(field.name().to_owned(), value);
    }
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        match field.name() {
            "message" => self.text = format!("{value:?}"),
            _ => self.set(field, format!("{value:?}").into()),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.text),
            _ => self.set(field, value.into()),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value.into());
    }
}

/// Where a worker says what it has to say: as events, to whoever listens to them.
pub fn sink() -> LogSink {
    Arc::new(|level, text| match level {
        LogLevel::Error => tracing::error!("{text}"),
        LogLevel::Warn => tracing::warn!("{text}"),
        LogLevel::Info => tracing::info!("{text}"),
        LogLevel::Debug => tracing::debug!("{text}"),
    })
}
