//! A running worker: what it serves, and how it is taken apart in the right order.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use upcall_abi::filter::EVENT_MIGRATE_OUT;
use upcall_block::{DiskInfo, RequestQueue, Store};
use upcall_filterhost::{FilterError, HostProcess};
use upcall_nbd::Server;
use upcall_state::Handover;

use crate::chains::Chains;
use crate::config::{LogLevel, LogSink, StoreFailures, WorkerConfig};
use crate::engine::Command;
use crate::error::StartError;
use crate::frontend::Frontend;
use crate::hosts::{EngineHandle, Supervisor};

/// A running worker: serves its disks until it is shut down. Dropping it instead ends it too,
/// but filters are not closed, and nothing is said about the stores.
pub struct Worker {
    pub(crate) disks: Vec<ServedDisk>,
    pub(crate) nbd: Vec<Server>,
    pub(crate) supervisor: Supervisor,
    pub(crate) drain_ms: u64,
    pub(crate) log: LogSink,
    /// Also what the disks' filters keep, locked until the end, and the page of counters.
    pub(crate) chains: Chains,
}

/// One disk of a running worker.
pub(crate) struct ServedDisk {
    pub(crate) name: Arc<str>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) info: DiskInfo,
    pub(crate) queues: u16,
    pub(crate) summary: String,
    /// Dropped before the queue threads that it needs.
    pub(crate) frontend: Option<Frontend>,
    pub(crate) engines: Vec<RunningEngine>,
    /// Where NBD clients find it, if they do; empty if that is not known.
    pub(crate) nbd: Option<String>,
}

/// A queue thread. Dropping it ends it.
pub(crate) struct RunningEngine {
    pub(crate) handle: EngineHandle,
    pub(crate) thread: Option<JoinHandle<()>>,
}

impl RunningEngine {
    /// Ends the thread, once nothing is in flight; false if it had died.
    fn quit(&mut self) -> bool {
        self.handle.send(Command::Quit);
        self.thread.take().is_none_or(|thread| thread.join().is_ok())
    }
}

impl Drop for RunningEngine {
    fn drop(&mut self) {
        self.quit();
    }
}

/// What is served, for people and for who starts QEMU.
#[derive(Clone, Debug)]
pub struct DiskSummary {
    /// The disk's name.
    pub name: String,
    /// What the guest is offered.
    pub info: DiskInfo,
    /// What the store is.
    pub store: String,
    /// Its filters, from the guest to the store.
    pub chain: Vec<String>,
    /// Queues: of the frontend, or where there is none, of NBD clients.
    pub queues: u16,
    /// The URI for NBD clients, if they are served; empty if it is not known.
    pub nbd: Option<String>,
    /// Where QEMU connects, if it is a path.
    pub socket: Option<PathBuf>,
}

/// What [`wait`] came back for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Wake {
    Shutdown,
    News,
}

/// How a worker ended.
#[derive(Debug, Default)]
pub struct ExitReport {
    /// What could not be done in good order; empty: everything is on the disks.
    pub failures: Vec<String>,
}

/// Waits until one of them is readable; `shutdown` counts more.
pub fn wait(shutdown: BorrowedFd<'_>, news: BorrowedFd<'_>) -> Wake {
    let watch = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
    let mut fds = [watch(shutdown), watch(news)];
    while !matches!(poll(&mut fds, None), Ok(1..)) {}
    if fds[0].revents().is_empty() { Wake::News } else { Wake::Shutdown }
}

impl Worker {
    /// Checks everything, starts everything, and serves. On an error nothing is left: no
    /// socket, no process, no page; files that a filter's parameters name are opened (and
    /// created) only after everything that can be checked without them is right.
    pub fn start(config: WorkerConfig) -> Result<Worker, StartError> {
        crate::start::start(config, &StoreFailures::default())
    }

    /// As [`start`](Self::start), after workers that may have seen stores fail.
    pub fn start_after(
        config: WorkerConfig,
        failures: &StoreFailures,
    ) -> Result<Worker, StartError> {
        crate::start::start(config, failures)
    }

    /// What is served.
    pub fn disks(&self) -> Vec<DiskSummary> {
        let chains = self.chains.chains();
        let filters = |number: usize| -> Vec<String> {
            chains[number].slots.iter().map(|slot| slot.filter.clone()).collect()
        };
        let summary = |(number, disk): (usize, &ServedDisk)| DiskSummary {
            name: disk.name.to_string(),
            info: disk.info.clone(),
            store: disk.summary.clone(),
            chain: filters(number),
            queues: disk.queues,
            nbd: disk.nbd.clone(),
            socket: disk.frontend.as_ref().and_then(|frontend| frontend.socket().map(Into::into)),
        };
        self.disks.iter().enumerate().map(summary).collect()
    }

    /// Serves a queue that is not one of a frontend of ours. For disks without a frontend:
    /// tools and tests. Panics if there is no such disk or queue.
    pub fn start_queue(&self, disk: usize, queue: u16, requests: Box<dyn RequestQueue>) {
        self.disks[disk].engines[usize::from(queue)].handle.send(Command::Start(requests));
    }

    /// Stops serving such a queue and gives it back; waits for what it took to end, and
    /// cancels what filters still hold after the worker's `drain_ms`.
    pub fn stop_queue(&self, disk: usize, queue: u16) -> Option<Box<dyn RequestQueue>> {
        let engine = &self.disks[disk].engines[usize::from(queue)].handle;
        StoppingQueue::begin(engine, self.drain_ms).wait()
    }

    /// Looks again how large each disk's store is. Where it has grown, the disk grows and its
    /// guest is told; what stands against it, or a store that has shrunk, is said in the log.
    /// From any thread; does not wait for the guest.
    pub fn look_again(&self) {
        for (number, disk) in self.disks.iter().enumerate() {
            let has_filters = self.chains.has_filters(number);
            if let Some((level, text)) = crate::grow::look_again(disk, has_filters) {
                (self.log)(level, &format!("disk {}: {text}", disk.name));
            }
        }
    }

    /// The disks' chains, to be shown and changed from any thread.
    pub fn chains(&self) -> Chains {
        self.chains.clone()
    }

    /// Ends in good order: a chain change that is on its way, frontends, requests, filter instances, stores, filter hosts.
    pub fn shutdown(self) -> ExitReport {
        self.end(None)
    }

    /// As [`shutdown`](Self::shutdown), and hands over to the worker that takes the disks up
    /// next, on this host or another: `of_disks` says what it has to know of each, to which
    /// filters add what they save.
    pub(crate) fn hand_over(self, of_disks: Vec<Handover>) -> ExitReport {
        self.end(Some(of_disks))
    }

    fn end(self, mut handovers: Option<Vec<Handover>>) -> ExitReport {
        let mut report = ExitReport::default();
        self.chains.end();
        let mut disks = self.disks;
        // All begin to end before the first is waited for.
        self.nbd.iter().for_each(Server::end);
        disks.iter().filter_map(|disk| disk.frontend.as_ref()).for_each(Frontend::end);
        disks.iter_mut().for_each(|disk| drop(disk.frontend.take()));
        let engines = disks.iter().flat_map(|disk| &disk.engines);
        let stopping: Vec<StoppingQueue> =
            engines.map(|engine| StoppingQueue::begin(&engine.handle, self.drain_ms)).collect();
        stopping.into_iter().for_each(|stopping| drop(stopping.wait()));
        // By now everything is answered; clients get it, and are disconnected.
        drop(self.nbd);
        for engine in disks.iter().flat_map(|disk| &disk.engines) {
            engine.handle.send(Command::WindDown { drain_ms: self.drain_ms });
        }
        // Instances close while the queue threads still run: what they have issued must end.
        let mut hosts = self.supervisor.stop();
        for (host, instances) in &mut hosts {
            for instance in instances {
                if let (Some(handovers), Some((disk, name))) =
                    (&mut handovers, self.chains.place_of(*instance))
                    && host.exit_description().is_none()
                {
                    match leave(host, *instance) {
                        Ok(Some(state)) => handovers[disk].states.push((name, state)),
                        Ok(None) => {}
                        Err(error) => (self.log)(LogLevel::Error, &error.to_string()),
                    }
                }
                if host.exit_description().is_none()
                    && let Err(error) = host.close(*instance)
                {
                    (self.log)(LogLevel::Warn, &error.to_string());
                }
            }
        }
        for (index, disk) in disks.into_iter().enumerate() {
            for mut engine in disk.engines {
                if !engine.quit() {
                    report
                        .failures
                        .push(format!("disk {}: a queue thread ended by a bug of ours", disk.name));
                }
            }
            let synced = disk.store.sync();
            if let Some(handover) = handovers.as_mut().map(|handovers| &mut handovers[index]) {
                if let Err(errno) = synced {
                    let text = format!("the last writes failed on another host ({errno})");
                    handover.failed.get_or_insert(text);
                }
                if let Err(error) = self.chains.hand_over(index, handover) {
                    report.failures.push(format!(
                        "disk {}: nothing is handed over to where its guest goes: {error}",
                        disk.name
                    ));
                }
            }
            if let Err(errno) = synced {
                report.failures.push(format!(
                    "disk {}: the last writes may not be on {} ({errno}): check the device and the guest's file systems",
                    disk.name, disk.summary
                ));
            }
        }
        for (mut host, _) in hosts {
            if host.exit_description().is_none()
                && let Err(error) = host.quit()
            {
                (self.log)(LogLevel::Warn, &error.to_string());
            }
        }
        self.chains.release();
        report
    }
}

/// Tells an instance that its guest leaves this host, and asks what it saves.
fn leave(host: &mut HostProcess, instance: u32) -> Result<Option<Vec<u8>>, FilterError> {
    host.event(instance, EVENT_MIGRATE_OUT)?;
    host.save_state(instance)
}

/// A queue that was told to stop, by another thread than its own.
pub(crate) struct StoppingQueue(Receiver<Option<Box<dyn RequestQueue>>>);

impl StoppingQueue {
    pub(crate) fn begin(engine: &EngineHandle, drain_ms: u64) -> StoppingQueue {
        let (reply, stopped) = sync_channel(1);
        engine.send(Command::Stop { drain_ms, reply });
        StoppingQueue(stopped)
    }

    /// The queue, once all that was taken from it has ended; None if none was served.
    pub(crate) fn wait(self) -> Option<Box<dyn RequestQueue>> {
        self.0.recv().ok().flatten()
    }
}
