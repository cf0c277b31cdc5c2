"""The one error tree. Each class carries its HTTP status, type and code.

    ErrataError                       500 server_error
    ├── InvalidRequest                400 invalid_request_error
    │   ├── UnprocessableRequest      422
    │   ├── UnsupportedParameter      400 unsupported_parameter
    │   └── UnsupportedModel          400 unsupported_model
    ├── Unauthorized                  401 invalid_api_key
    ├── Forbidden                     403 permission_denied
    ├── NotFound                      404 not_found
    ├── Conflict                      409 conflict          (never worth a retry)
    │   └── Untrusted                 409 version_untrusted
    ├── Gone                          410 gone
    ├── PreconditionFailed            412 precondition_failed
    ├── TooLarge                      413 request_too_large
    ├── PreconditionRequired          428 precondition_required
    ├── TooManyRequests               429 rate_limit_exceeded
    ├── DeadlineExceeded              504 deadline_exceeded
    ├── Unavailable                   503 service_unavailable
    │   ├── VersionUnavailable        503 version_unavailable
    │   └── StoreUnavailable          503 store_unavailable (of artifacts: it is away)
    │       └── StoreRefused          503 store_refused     (it answers, and says no)
    ├── ArtifactCorrupt               500 artifact_corrupt
    ├── JobFailed                     500 job_failed        (a job's own, clear end)
    │   └── GuardRejected             422 guard_rejected
    └── LeaseLost                     500 lease_lost        (an attempt was superseded)

A message names the thing, the place and the cure.
"""

from __future__ import annotations

from typing import ClassVar


class ErrataError(Exception):
    """Base of all errors this service raises on purpose.

    Args:
        message: what was wrong, where, and what would be right.
        param: the request field at fault, in dotted form (``edits.0.subject``).
        code: overrides the class's machine-readable code.
        retry_after: seconds after which a retry is worth it.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after = retry_after

    def body(self) -> dict[str, object]:
        """The error as REST answers and job rows carry it."""
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }


class InvalidRequest(ErrataError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class UnprocessableRequest(InvalidRequest):
    status = 422
    default_code = "unprocessable_request"


class UnsupportedParameter(InvalidRequest):
    default_code = "unsupported_parameter"


class UnsupportedModel(InvalidRequest):
    default_code = "unsupported_model"


class Unauthorized(ErrataError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class Forbidden(ErrataError):
    status = 403
    type = "permission_error"
    default_code = "permission_denied"


class NotFound(ErrataError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class Conflict(ErrataError):
    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class Untrusted(Conflict):
    default_code = "version_untrusted"


class Gone(ErrataError):
    status = 410
    type = "invalid_request_error"
    default_code = "gone"


class PreconditionFailed(ErrataError):
    status = 412
    type = "invalid_request_error"
    default_code = "precondition_failed"


class TooLarge(ErrataError):
    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class PreconditionRequired(ErrataError):
    status = 428
    type = "invalid_request_error"
    default_code = "precondition_required"


class TooManyRequests(ErrataError):
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class DeadlineExceeded(ErrataError):
    status = 504
    default_code = "deadline_exceeded"


class Unavailable(ErrataError):
    status = 503
    default_code = "service_unavailable"


class VersionUnavailable(Unavailable):
    default_code = "version_unavailable"


class StoreUnavailable(Unavailable):
    default_code = "store_unavailable"


class StoreRefused(StoreUnavailable):
    default_code = "store_refused"


class ArtifactCorrupt(ErrataError):
    default_code = "artifact_corrupt"


class JobFailed(ErrataError):
    type = "job_error"
    default_code = "job_failed"


class GuardRejected(JobFailed):
    status = 422
    default_code = "guard_rejected"


class LeaseLost(ErrataError):
    default_code = "lease_lost"
