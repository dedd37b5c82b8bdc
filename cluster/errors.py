"""Every error of the project, in one tree.

    SwitchyardError               fault    retry  http
    |- ConfigError                client   no     400   a setting is wrong; the message names it
    |  |- CheckpointError         client   no     400   the model folder cannot be served; says why
    |  |- LicenceNotAccepted      client   no     400   the weights' terms have to be accepted first; says how
    |- InvalidTable               server   no     500   a routing table contradicts itself or its format
    |- IntegrityError             server   no     500   an account of tokens or slots does not balance
    |- DataPlaneError             server   no     500
       |- InvalidCall             server   no     500   the caller's tensors do not fit what was agreed
       |- Closed                  server   no     500   used after close()
       |- ExpertsUnavailable      server   yes    503   no replica answered in time (carries Retry-After)
       |- ExpertsFailed           server   no     500   every replica's kernel raised for this call
       |- ConnectionLost          server   yes    503   a peer closed, reset or cannot be reached
       |- HandshakeError          server   yes    503
       |  |- HandshakeTimeout     server   yes    503   the peer was silent for too long
       |  |- TlsFailed            server   no     503   the peer speaks no TLS, or not this one
       |  |- WrongSecret          server   no     503   the peer does not hold the cluster's secret
       |  |- Refused              server   no     503   the peer holds the secret but will not serve us; says why
       |- Malformed               server   no     500   bytes that break the wire format; one class per way
          |- BadMagic BadVersion BadType BadFlags BadReserved BadLength BadDtype BadHidden BadTopK BadTokenCount
          |- BadLayer BadExpertId BadCallId BadSequence BadStatus BadText BadLimits BadDescriptors Truncated

`fault` says whose mistake it is, `retryable` whether the same request may succeed later, `http_status` what a user of
the HTTP API sees. All survive pickling with their details. `reason` is the short name used as a counter label.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

Fault = Literal["client", "server"]


class SwitchyardError(Exception):
    """Base of the tree. Keyword arguments become attributes and survive pickling."""

    fault: ClassVar[Fault] = "server"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.details)

    @property
    def reason(self) -> str:
        """Counter label: the class name in snake_case."""
        name = type(self).__name__
        return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


def _rebuild(cls: type[SwitchyardError], message: str, details: dict[str, Any]) -> SwitchyardError:
    return cls(message, **details)


class ConfigError(SwitchyardError):
    """A setting that is missing, unknown or out of range."""

    fault = "client"
    http_status = 400


class CheckpointError(ConfigError):
    """The model folder is missing, incomplete or of a kind that cannot be served; the message says what to do."""


class LicenceNotAccepted(ConfigError):
    """The weights come under terms that have to be accepted; the message gives them and says how."""


class InvalidTable(SwitchyardError):
    """A routing table that contradicts itself, or JSON that is not one."""


class IntegrityError(SwitchyardError):
    """Raised by check_integrity() only: something was lost, doubled or leaked."""


class DataPlaneError(SwitchyardError):
    """Base of everything that can go wrong between an engine and its workers."""


class InvalidCall(DataPlaneError):
    """Shapes, dtypes or expert ids that do not fit the table or the constructor's arguments."""


class Closed(DataPlaneError):
    """The object was closed; nothing more can be asked of it."""


class ExpertsUnavailable(DataPlaneError):
    """No replica of a shard answered within expert_timeout_s. Becomes 503 with Retry-After."""

    retryable = True
    http_status = 503

    @property
    def retry_after_s(self) -> float:
        """Seconds after which trying again makes sense."""
        return float(self.details.get("retry_after_s", 5.0))


class ExpertsFailed(DataPlaneError):
    """The kernel raised on every replica that was tried; the message carries the workers' words."""


class ConnectionLost(DataPlaneError):
    """The other side is gone, or was never there."""

    retryable = True
    http_status = 503


class HandshakeError(DataPlaneError):
    """A connection that never came to its first frame."""

    retryable = True
    http_status = 503


class HandshakeTimeout(HandshakeError):
    """The peer did not finish the handshake in time."""


class TlsFailed(HandshakeError):
    """The peer does not speak TLS 1.3 where it is asked for."""

    retryable = False


class WrongSecret(HandshakeError):
    """The peer's proof does not match the cluster's secret."""

    retryable = False


class Refused(HandshakeError):
    """The peer knows the secret and still says no: wrong model, wrong shape, too many tokens."""

    retryable = False


class Malformed(DataPlaneError):
    """Bytes that break the wire format. The connection they came on is closed and the reason counted."""


class BadMagic(Malformed):
    """The first four bytes are not the format's."""


class BadVersion(Malformed):
    """Another version of the format."""


class BadType(Malformed):
    """A frame type that does not exist, or not in this direction or state."""


class BadFlags(Malformed):
    """Flags that this version does not define."""


class BadReserved(Malformed):
    """Reserved bytes that are not zero."""


class BadLength(Malformed):
    """The frame's length is not what its other fields imply, or above the limit."""


class BadDtype(Malformed):
    """An unknown dtype code, or not the one agreed in Hello."""


class BadHidden(Malformed):
    """hidden is not the one agreed in Hello."""


class BadTopK(Malformed):
    """top_k is not the one agreed in Hello."""


class BadTokenCount(Malformed):
    """num_tokens is zero, above max_tokens, or not what was asked for."""


class BadLayer(Malformed):
    """A layer that this worker does not hold."""


class BadExpertId(Malformed):
    """A local expert id outside [-1, num_local_experts)."""


class BadCallId(Malformed):
    """A call id that is zero, already open, or not the one that was asked."""


class BadSequence(Malformed):
    """A shared-memory sequence word that did not advance by one on an idle slot."""


class BadStatus(Malformed):
    """An unknown reply status."""


class BadText(Malformed):
    """Text that is not UTF-8, contains NUL, or is empty where a name is needed."""


class BadLimits(Malformed):
    """num_slots or max_tokens outside what the format allows."""


class BadDescriptors(Malformed):
    """The file descriptors passed with Hello are missing, of the wrong kind, size or seals."""


class Truncated(Malformed):
    """The connection ended inside a frame."""
