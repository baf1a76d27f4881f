//! What happened in a worker, the latest of it, for whoever asks and whoever follows.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::broadcast;
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use upcall_worker::LogLevel;

use crate::resource::Event;
use crate::said::Said;

/// As many as are kept.
const KEPT: usize = 1024;

/// The latest events of a worker: what it says in its log, to which it listens as a layer of
/// `tracing`. Never blocks whoever says something.
#[derive(Clone)]
pub struct Events(Arc<Inner>);

struct Inner {
    kept: Mutex<Kept>,
    news: broadcast::Sender<Event>,
}

#[derive(Default)]
struct Kept {
    next: u64,
    events: VecDeque<Event>,
}

impl Default for Events {
    fn default() -> Events {
        let (news, _) = broadcast::channel(KEPT);
        Events(Arc::new(Inner { kept: Mutex::default(), news }))
    }
}

impl Events {
    fn add(&self, said: Said) {
        if said.level == LogLevel::Debug {
            return;
        }
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |at| at.as_millis());
        let mut kept = self.kept();
        let (level, text) = (said.level_name().to_owned(), said.text);
        let event = Event { number: kept.next, at_ms: at_ms as u64, level, text };
        kept.next += 1;
        if kept.events.len() == KEPT {
            kept.events.pop_front();
        }
        kept.events.push_back(event.clone());
        // Under the lock, so that who follows misses none. Nobody may be following.
        let _ = self.0.news.send(event);
    }

    /// Those that are kept, the oldest first; and those that are still to come.
    pub(crate) fn all(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let kept = self.kept();
        (kept.events.iter().cloned().collect(), self.0.news.subscribe())
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Subscriber> Layer<S> for Events {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        Said::of(event).into_iter().for_each(|said| self.add(said));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn the_latest_are_kept_and_numbered_and_debugging_is_not() {
        let events = Events::default();
        let listening = tracing_subscriber::registry().with(events.clone());
        let _listening = tracing::subscriber::set_default(listening);
        let log = sink();
        for number in 0..KEPT + 5 {
            log(LogLevel::Debug, "noise");
            log(LogLevel::Warn, &number.to_string());
        }
        let (kept, mut news) = events.all();
        assert_eq!(kept.len(), KEPT);
        assert!(kept.iter().all(|event| event.text == event.number.to_string()));
        assert_eq!(kept[0].number, 5);
        log(LogLevel::Error, "last");
        assert_eq!(news.try_recv().unwrap().number, (KEPT + 5) as u64);
    }
}
