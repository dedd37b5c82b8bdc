"""API keys of the HTTP server: how they look, how they are kept, and which request has one.

A key is `sy-ID-SECRET`: 12 hex digits that name it and 43 characters of base64url, 32 random bytes. Only its SHA-256
is kept: a secret of 256 random bits cannot be guessed from its hash, so a slow hash for passwords would protect nothing
and let strangers burn time. The file is JSON, {"format": 1, "keys": [KeyRecord ..]}.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster.errors import ConfigError

FORMAT = 1
MAX_FILE_BYTES = 16 << 20
MAX_KEY_BYTES = 128

_KEY = re.compile(r"sy-([0-9a-f]{12})-[A-Za-z0-9_-]{43}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_ADDED = {"log_prompts"}  # fields that files of format 1 may lack
_NOBODY = "0" * 64  # the hash of no known text: what an unknown id is compared with


@dataclass(frozen=True)
class KeyRecord:
    """What is kept of one key. Times in seconds since 1970."""

    id: str
    name: str
    sha256: str
    """Of the whole key, in hex."""
    created_s: float
    requests_per_minute: int | None = None
    """None is no limit."""
    concurrent: int | None = None
    """Requests at the same time, a count; None is no limit."""
    revoked_s: float | None = None
    former_sha256: str | None = None
    """Of the key before the last rotation, good until former_until_s."""
    former_until_s: float | None = None
    log_prompts: bool = False
    """Write what its requests ask and are answered to the engines' logs."""

    def accepts(self, digest: str, now_s: float) -> bool:
        """Whether a key with that SHA-256 is this one; takes as long for every answer."""
        is_current = hmac.compare_digest(self.sha256, digest)
        is_former = hmac.compare_digest(self.former_sha256 or _NOBODY, digest)
        return self.revoked_s is None and (is_current or (is_former and now_s < (self.former_until_s or 0.0)))

    @property
    def is_limited(self) -> bool:
        return self.requests_per_minute is not None or self.concurrent is not None


class KeyRing:
    """An immutable set of keys."""

    def __init__(self, records: Iterable[KeyRecord] = ()) -> None:
        self.records = tuple(records)
        self._by_id = {record.id: record for record in self.records}

    def find(self, key: str | None, now_s: float) -> KeyRecord | None:
        """The record of a valid key; None for every other text, after the same work."""
        match = _KEY.fullmatch(key or "")
        record = self._by_id.get(match[1], _STRANGER) if match else _STRANGER
        return record if record.accepts(_sha256(key or ""), now_s) and match else None

    @property
    def has_valid_keys(self) -> bool:
        return any(record.revoked_s is None for record in self.records)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "keys": [dataclasses.asdict(each) for each in self.records]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "KeyRing":
        """Strict inverse of to_json. Raises ConfigError, without repeating what is in the file."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise ConfigError("the file of API keys is not JSON.") from None
        if not isinstance(document, dict) or document.keys() != {"format", "keys"} or document["format"] != FORMAT:
            raise ConfigError(f"the file of API keys is not of format {FORMAT}.")
        if not isinstance(document["keys"], list):
            raise ConfigError("the file of API keys has no list of keys.")
        ring = cls(_record(number, each) for number, each in enumerate(document["keys"]))
        if len(ring._by_id) != len(ring.records):
            raise ConfigError("the file of API keys has the same id twice.")
        return ring


_STRANGER = KeyRecord("", "", _NOBODY, 0.0)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _record(number: int, values: Any) -> KeyRecord:
    hints = typing.get_type_hints(KeyRecord)
    if not isinstance(values, Mapping) or not hints.keys() - _ADDED <= values.keys() <= hints.keys():
        raise ConfigError(f"API key {number}: its fields must be {', '.join(hints)}.")
    for name, value in values.items():
        kinds, is_number = _kinds(hints[name]), isinstance(value, int | float)
        fits = isinstance(value, hints[name]) or (is_number and float in kinds)
        if not fits or isinstance(value, bool) != (bool in kinds):
            raise ConfigError(f"API key {number}: {name} has the wrong type.")
    record = KeyRecord(**values)
    digests = [record.sha256, *filter(None, [record.former_sha256])]
    limits = [record.requests_per_minute, record.concurrent]
    if not all(_SHA256.fullmatch(each) for each in digests) or not re.fullmatch(r"[0-9a-f]{12}", record.id):
        raise ConfigError(f"API key {number}: its id or hash is not one.")
    if any(limit is not None and limit < 1 for limit in limits):
        raise ConfigError(f"API key {number}: a limit must be 1 or more.")
    return record


def _kinds(hint: Any) -> Sequence[Any]:
    return typing.get_args(hint) or (hint,)


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key of a request with these ASGI headers: `Authorization: Bearer KEY`, or Anthropic's `x-api-key: KEY`.

    None for none, for several, and for what cannot be one.
    """
    found = [(name.lower(), value) for name, value in headers if name.lower() in CREDENTIAL_HEADERS]
    if len(found) != 1 or len(found[0][1]) > MAX_KEY_BYTES:
        return None
    name, value = found[0]
    if name == b"authorization":
        scheme, _, value = value.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
    try:
        return value.strip(b" ").decode("ascii")
    except UnicodeDecodeError:
        return None


CREDENTIAL_HEADERS = (b"authorization", b"x-api-key")


# -- changes: each returns the new ring and, where there is one, the key, which is never seen again --------------------


def _new_key(key_id: str) -> str:
    return f"sy-{key_id}-{secrets.token_urlsafe(32)}"


def with_new_key(
    ring: KeyRing,
    name: str,
    now_s: float,
    requests_per_minute: int | None,
    concurrent: int | None,
    log_prompts: bool = False,
) -> tuple[KeyRing, KeyRecord, str]:
    """Add a key. Raises ConfigError for a name that is taken or unfit, or a limit below 1."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r}: a name has 1 to 64 letters, digits and . _ @ -")
    if any(record.name == name and record.revoked_s is None for record in ring.records):
        raise ConfigError(f"there is a key {name} already. Choose another name, or `switchyard keys rotate {name}`.")
    for option, limit in (("--requests-per-minute", requests_per_minute), ("--concurrent", concurrent)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{option}: is {limit}, must be 1 or more.")
    key_id = secrets.token_hex(6)
    key = _new_key(key_id)
    limits = (requests_per_minute, concurrent)
    record = KeyRecord(key_id, name, _sha256(key), now_s, *limits, log_prompts=log_prompts)
    return KeyRing((*ring.records, record)), record, key


def with_rotated_key(ring: KeyRing, which: str, now_s: float, keep_s: float) -> tuple[KeyRing, KeyRecord, str]:
    """Replace a key's secret; the former one is good for `keep_s` more seconds."""
    old = chosen(ring, which)
    key = _new_key(old.id)
    record = dataclasses.replace(
        old, sha256=_sha256(key), former_sha256=old.sha256, former_until_s=now_s + max(keep_s, 0.0)
    )
    return _replaced(ring, record), record, key


def with_revoked_key(ring: KeyRing, which: str, now_s: float) -> tuple[KeyRing, KeyRecord]:
    """Make a key worthless from now on; its record stays."""
    record = dataclasses.replace(chosen(ring, which), revoked_s=now_s)
    return _replaced(ring, record), record


def with_prompt_log(ring: KeyRing, which: str, is_on: bool) -> tuple[KeyRing, KeyRecord]:
    """Have a key's prompts and answers logged from now on, or not any more."""
    record = dataclasses.replace(chosen(ring, which), log_prompts=is_on)
    return _replaced(ring, record), record


def chosen(ring: KeyRing, which: str) -> KeyRecord:
    """The key of that id or name that is not revoked. Raises ConfigError."""
    for record in ring.records:
        if record.revoked_s is None and which in (record.id, record.name):
            return record
    raise ConfigError(f"there is no valid key {which}. `switchyard keys list` shows them.")


def _replaced(ring: KeyRing, record: KeyRecord) -> KeyRing:
    return KeyRing(record if each.id == record.id else each for each in ring.records)


# -- the file ---------------------------------------------------------------------------------------------------------


def read_ring(path: Path) -> KeyRing:
    """Raises ConfigError when the file is missing, damaged, or writable by others."""
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o022:
                raise ConfigError(f"{path} can be written by others. Run: chmod go-w {path}")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the API keys in {path}: {error.strerror}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes.")
    try:
        return KeyRing.from_json(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the file of API keys is not JSON.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[KeyRing]]:
    """A list with the file's ring; what its only element is at the end is written in one step, mode 0600.

    Two changes at the same time come one after the other. A file that does not exist is an empty ring.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _private(path.with_name(path.name + ".lock"), os.O_WRONLY | os.O_CREAT) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rings = [read_ring(path) if path.exists() else KeyRing()]
        before = rings[0]
        yield rings
        if rings[0] is not before:
            fresh = path.with_name(path.name + ".new")
            fresh.unlink(missing_ok=True)
            with _private(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
                file.write(rings[0].to_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)


def _private(path: Path, flags: int) -> IO[str]:
    return os.fdopen(os.open(path, flags, 0o600), "w")
