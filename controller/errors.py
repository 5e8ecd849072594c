"""The few errors that callers can act on, sorted by what the reader does next.

Each class has a stable ``code`` (JSON, logs), a stable ``exit_code`` (``drctl``) and an ``http_status`` (API). Every
instance carries a ``hint``: the one thing to do or to type next. Codes are a contract: they are added to, never reused.

| exit | code              | what the reader does                                   |
| ---- | ----------------- | ------------------------------------------------------ |
| 0    |                   | nothing                                                |
| 1    | `bug`             | report it: an error that we did not foresee            |
| 2    | `usage`           | correct the command line                               |
| 3    | `unavailable`     | wait or try elsewhere: something did not answer        |
| 4    | `fence_lost`      | stop: somebody else holds the authority                |
| 5    | `refused`         | read the reason: a rule said no                        |
| 6    | `approval_required` | get people to approve                                |
| 7    | `misconfigured`   | correct the settings                                   |
| 8    | `corrupt`         | do not trust these bytes; repair from another region   |
| 9    | `unauthenticated` | show a token or certificate that is valid here         |

`forbidden` is a refusal (5): the caller is known and may not do this.
"""

from __future__ import annotations


class DrError(Exception):
    """Base of all errors that a caller may act on."""

    code = "bug"
    exit_code = 1
    http_status = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, object]:
        """The form in which the API and ``--output json`` show this error."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "exit_code": self.exit_code}


class Unavailable(DrError):
    """Something did not answer in time, or said that it cannot now. Waiting or another endpoint may help.

    ``retry_after_seconds``: how long to wait before asking again, where it is known; 0: it is not.
    """

    code = "unavailable"
    exit_code = 3
    http_status = 503

    def __init__(self, message: str, *, hint: str = "", retry_after_seconds: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_seconds = retry_after_seconds

    def to_dict(self) -> dict[str, object]:
        told = DrError.to_dict(self)
        return {**told, "retry_after_seconds": self.retry_after_seconds} if self.retry_after_seconds else told


class Throttled(Unavailable):
    """More came than a limit allows. Nothing of it was taken; after ``retry_after_seconds`` the same may be sent again."""

    code = "throttled"
    http_status = 429


class OutcomeUnknown(Unavailable):
    """A mutating call was sent and its answer was lost: it may or may not have been applied. Re-read, never repeat blindly."""

    code = "outcome_unknown"


class NotActive(Unavailable):
    """This controller is not the active one. ``active`` is the address to try, where it is known."""

    code = "not_active"
    http_status = 503

    def __init__(self, message: str, *, hint: str = "", active: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.active = active

    def to_dict(self) -> dict[str, object]:
        return {**DrError.to_dict(self), "active": self.active}


class FenceLost(DrError):
    """A newer epoch exists: whoever sees this must stop acting, at once and without retry."""

    code = "fence_lost"
    exit_code = 4
    http_status = 409

    def __init__(self, message: str, *, hint: str = "stop; a newer epoch has the authority", epoch: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.epoch = epoch


class Refused(DrError):
    """A rule said no. Repeating the same request gives the same answer."""

    code = "refused"
    exit_code = 5
    http_status = 422


class NotFound(Refused):
    """The thing asked for does not exist."""

    code = "not_found"
    http_status = 404


class Conflict(Refused):
    """The thing was changed by somebody else since it was read (a compare-and-set that did not match).

    Re-read and decide again.
    """

    code = "conflict"
    http_status = 409


class Forbidden(Refused):
    """The caller is known, and this is not theirs to do or to see."""

    code = "forbidden"
    http_status = 403


class Unauthenticated(DrError):
    """The caller did not show who they are, or not with something that is valid here. Nothing was looked at or done."""

    code = "unauthenticated"
    exit_code = 9
    http_status = 401


class ApprovalRequired(DrError):
    """People must approve before this may run."""

    code = "approval_required"
    exit_code = 6
    http_status = 403


class Misconfigured(DrError):
    """A setting, or the outside world that a setting names, is wrong."""

    code = "misconfigured"
    exit_code = 7
    http_status = 500


class WrongGroup(Misconfigured):
    """These settings describe another group than the one in etcd: waiting mends nothing, the process must end."""


class Corrupt(DrError):
    """Bytes do not match their checksum, hash, chain or format."""

    code = "corrupt"
    exit_code = 8
    http_status = 500
