//! Errors as they go over the socket: problem details (RFC 9457).

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use upcall_worker::{ChangeError, FailedAt};
use utoipa::ToSchema;

/// What went wrong, with which disk or filter, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Which kind of problem: `busy`, `not-found`, `refused`, ...; stable, for programs.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind, for people.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened, to which disk or filter, and what to do.
    pub detail: String,
    /// The disk, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// The filter's slot, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// The step at which a change was given up: `prepare`, `drain`, `close`, `open`, `commit`
    /// or `trial`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
}

impl Problem {
    pub(crate) fn new(kind: &str, status: StatusCode, detail: impl Into<String>) -> Problem {
        let title = match kind {
            "busy" => "Another change is on its way",
            "ending" => "The worker is ending",
            "leaving" => "The guest is being migrated",
            "waiting" => "The guest is not on this host",
            "not-found" => "There is no such thing",
            "refused" => "The change is not possible",
            "rolled-back" => "The change was given up, and everything is as it was",
            "trial-failed" => "The change was taken back",
            "stuck" => "The change was made, and its filter fails",
            "forbidden" => "Only root and the worker's own user may change something",
            _ => "The request makes no sense",
        };
        Problem {
            kind: kind.to_owned(),
            title: title.to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            disk: None,
            filter: None,
            step: None,
        }
    }

    pub(crate) fn of_change(error: &ChangeError) -> Problem {
        let new = |kind, status| Problem::new(kind, status, error.to_string());
        let step = |at: &FailedAt| match at {
            FailedAt::Prepare => "prepare",
            FailedAt::Stun => "drain",
            FailedAt::Leave => "close",
            FailedAt::Enter => "open",
            FailedAt::Commit => "commit",
        };
        match error {
            ChangeError::Busy => new("busy", StatusCode::CONFLICT),
            ChangeError::Ending => new("ending", StatusCode::SERVICE_UNAVAILABLE),
            ChangeError::NoDisk { disk, .. } => {
                Problem { disk: Some(disk.clone()), ..new("not-found", StatusCode::NOT_FOUND) }
            }
            ChangeError::NoSlot { disk, slot, .. } => Problem {
                disk: Some(disk.clone()),
                filter: Some(slot.clone()),
                ..new("not-found", StatusCode::NOT_FOUND)
            },
            ChangeError::Refused { disk, .. } => Problem {
                disk: Some(disk.clone()),
                ..new("refused", StatusCode::UNPROCESSABLE_ENTITY)
            },
            ChangeError::RolledBack { at, .. } => Problem {
                step: Some(step(at).to_owned()),
                ..new("rolled-back", StatusCode::CONFLICT)
            },
            ChangeError::TrialFailed { filter, .. } => Problem {
                filter: Some(filter.clone()),
                step: Some("trial".to_owned()),
                ..new("trial-failed", StatusCode::CONFLICT)
            },
            ChangeError::Stuck { filter, .. } => Problem {
                filter: Some(filter.clone()),
                step: Some("trial".to_owned()),
                ..new("stuck", StatusCode::INTERNAL_SERVER_ERROR)
            },
            _ => new("refused", StatusCode::CONFLICT),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::BAD_REQUEST);
        let headers = [("content-type", "application/problem+json")];
        (status, headers, serde_json::to_string(&self).unwrap_or_default()).into_response()
    }
}
