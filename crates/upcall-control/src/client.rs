//! Asking a worker.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use upcall_stats::HopSnapshot;

use crate::problem::Problem;
use crate::resource::*;
use crate::snapshot;

/// How long a worker may take to answer what it only has to look up.
const PATIENCE: Duration = Duration::from_secs(5);
/// More is no answer of a worker's.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why there is no answer, or which.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody answers there.
    #[error("{path}: no worker answers: {why}; upcall serve says where its control socket is")]
    NoAnswer {
        /// Where it was tried.
        path: PathBuf,
        /// What the system says.
        why: String,
    },
    /// The worker says no.
    #[error("{}", .0.detail)]
    Problem(Box<Problem>),
    /// What answers is no worker of this version.
    #[error("{path}: it does not answer as a worker of this version: {why}")]
    Nonsense {
        /// Who.
        path: PathBuf,
        /// How so.
        why: String,
    },
}

/// A worker's control socket, asked from a thread that may block.
pub struct Client {
    path: PathBuf,
    runtime: Runtime,
}

impl Client {
    /// For the socket at `path`. Nothing is asked yet.
    pub fn new(path: &Path) -> Result<Client, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| no_answer(path, error))?;
        Ok(Client { path: path.to_owned(), runtime })
    }

    /// Who answers.
    pub fn worker(&self) -> Result<Worker, ClientError> {
        self.get("/v1/worker")
    }

    /// What passed each hop of all disks, as the worker's page of counters has it.
    pub fn hops(&self) -> Result<Vec<HopSnapshot>, ClientError> {
        let hops = self.disks()?.iter().flat_map(snapshot::of).collect::<Result<_, String>>();
        hops.map_err(|why| self.nonsense(why))
    }

    /// All disks.
    pub fn disks(&self) -> Result<Vec<Disk>, ClientError> {
        self.get("/v1/disks")
    }

    /// What is in flight on a disk.
    pub fn in_flight(&self, disk: &str) -> Result<Vec<InFlight>, ClientError> {
        self.get(&format!("/v1/disks/{disk}/in-flight"))
    }

    /// Changes chains, and waits for the end of that.
    pub fn change(&self, change: &Change) -> Result<Changed, ClientError> {
        self.runtime.block_on(async {
            let response = self.ask(Method::POST, "/v1/changes", Some(change)).await?;
            self.parse(response).await
        })
    }

    /// The metrics, as text.
    pub fn metrics(&self) -> Result<String, ClientError> {
        self.runtime.block_on(async {
            let response = self.ask::<()>(Method::GET, "/metrics", None).await?;
            let bytes = self.body(response).await?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        })
    }

    /// What happened lately and, if `follow`, what happens from now on.
    pub fn events(&self, follow: bool) -> Result<Follow<'_>, ClientError> {
        let path = format!("/v1/events?follow={follow}");
        let response = self.runtime.block_on(self.ask::<()>(Method::GET, &path, None))?;
        Ok(Follow { client: self, body: response.into_body(), rest: Vec::new() })
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let answer = async {
            let response = self.ask::<()>(Method::GET, path, None).await?;
            self.parse(response).await
        };
        self.runtime.block_on(async {
            let late = |_| no_answer(&self.path, format!("nothing came in {PATIENCE:?}"));
            tokio::time::timeout(PATIENCE, answer).await.map_err(late)?
        })
    }

    async fn ask<T: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&T>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.path).await;
        let stream = stream.map_err(|error| no_answer(&self.path, error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| no_answer(&self.path, error))?;
        tokio::spawn(connection);
        let body = body.map(|body| serde_json::to_vec(body).unwrap_or_default());
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "upcall")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| self.nonsense(error))?;
        sender.send_request(request).await.map_err(|error| no_answer(&self.path, error))
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let status = response.status();
        let collected = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let bytes = collected.map_err(|error| no_answer(&self.path, error))?.to_bytes();
        if status.is_success() {
            return Ok(bytes);
        }
        Err(match serde_json::from_slice(&bytes) {
            Ok(problem) => ClientError::Problem(Box::new(problem)),
            Err(_) => self.nonsense(format!("status {status}")),
        })
    }

    async fn parse<T: DeserializeOwned>(
        &self,
        response: Response<Incoming>,
    ) -> Result<T, ClientError> {
        let bytes = self.body(response).await?;
        serde_json::from_slice(&bytes).map_err(|error| self.nonsense(error))
    }

    fn nonsense(&self, why: impl ToString) -> ClientError {
        ClientError::Nonsense { path: self.path.clone(), why: why.to_string() }
    }
}

fn no_answer(path: &Path, why: impl ToString) -> ClientError {
    ClientError::NoAnswer { path: path.to_owned(), why: why.to_string() }
}

/// Events as they come. Ends when the worker does.
pub struct Follow<'a> {
    client: &'a Client,
    body: Incoming,
    rest: Vec<u8>,
}

impl Iterator for Follow<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                match serde_json::from_slice(&line) {
                    Ok(event) => return Some(event),
                    Err(_) => continue,
                }
            }
            let frame = self.client.runtime.block_on(self.body.frame())?.ok()?;
            if let Ok(data) = frame.into_data() {
                self.rest.extend_from_slice(&data);
            }
        }
    }
}
