"""The wire format, byte by byte. All integers are little endian; all reserved bytes are zero and checked.

Version 1. Shape letters: T tokens, D hidden size, K top_k, b bytes per element of the agreed dtype.

Before the first frame both peers prove that they hold the cluster's secret (cluster/auth.py describes those bytes).
Then the client (an engine's dispatcher) sends one Hello and the server (an expert worker) answers Welcome or Refused.
After Welcome the client sends Requests and the server Replies, each call answered once, in any order.

On TCP, frames follow each other on the stream. On a unix socket, Hello carries three file descriptors (SCM_RIGHTS): a
sealed memfd, the request doorbell and the reply doorbell (eventfds); Requests and Replies then lie in slots of the
memfd (layout: cluster/shm.py) and nothing more is sent on the socket, whose end tells each peer that the other is gone.

Common prefix of every frame (12 bytes)
     0  4  magic "SWYD"
     4  1  version = 1
     5  1  type: 1 Hello, 2 Welcome, 3 Refused, 4 Request, 5 Reply
     6  2  flags = 0
     8  4  frame_bytes: length of the whole frame, prefix included

Hello (256 bytes)
    12  4  hidden D
    16  4  max_tokens: the largest T this client will send, 1..65536
    20  2  top_k K
    22  1  dtype of x and of the partial sums: 1 float32, 2 bfloat16, 3 float16
    23  1  num_slots: calls that may be open at once on this connection, 1..16
    24  8  arena_bytes: size of the memfd; 0 on TCP
    32 64  engine id, UTF-8, padded with NUL
    96 128 model fingerprint, UTF-8, padded with NUL
   224 32  reserved

Welcome (64 bytes)
    12  4  first_layer        16  4  end_layer (half open)        20  4  num_local_experts
    24  4  max_tokens of the server                               28 36  reserved

Refused (64 bytes + text)
    12  4  text_bytes, 1..512 16 48  reserved                     64  .  UTF-8 text: why

Request (header 64 bytes)
    12  4  layer: MoE-layer ordinal
    16  8  call_id: not zero, not open on this connection
    24  4  num_tokens T, 1..max_tokens
    28  4  budget_us: microseconds left for this call; relative, since clocks differ between hosts
    32  4  hidden D           36  2  top_k K        38  1  dtype        39  1  reserved
    40  8  sent_ns: CLOCK_MONOTONIC of the sender; read only by a peer on the same host (the budget runs from here)
    48 16  reserved
    64  .  x        T*D*b bytes, row major
     .  .  padding  up to the next multiple of 64 from the frame's start; not read
     .  .  weights  T*K*4 bytes, float32
     .  .  ids      T*K*4 bytes, int32: index into the shard's experts, -1 where that choice lives elsewhere

Reply (header 64 bytes)
    12  1  status: 0 OK, 1 ERROR (the kernel raised), 2 EXPIRED (budget spent before computing), 3 DRAINING
    13  3  reserved
    16  8  call_id of the request
    24  4  num_tokens T of the request
    28  4  text_bytes: 0 if OK, else 1..512
    32  8  compute_ns: time in the kernel (of the whole batch this call was part of)
    40  8  queue_ns: time from sent_ns (same host) or arrival until the kernel began
    48 16  reserved
    64  .  OK: partial sums, T*D*b bytes, row major; otherwise UTF-8 text

Nothing is ever unpickled. Every field that breaks these rules has its own error class below cluster.errors.Malformed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cluster import errors

VERSION = 1
HELLO, WELCOME, REFUSED, REQUEST, REPLY = 1, 2, 3, 4, 5
OK, ERROR, EXPIRED, DRAINING = 0, 1, 2, 3
STATUS_NAMES = {OK: "ok", ERROR: "error", EXPIRED: "expired", DRAINING: "draining"}
HEADER_BYTES, HELLO_BYTES = 64, 256
MAX_TOKENS, MAX_SLOTS, MAX_TEXT_BYTES, MAX_BUDGET_US = 65536, 16, 512, 2**32 - 1
MAX_FRAME_BYTES = 2**31 - 1
MAX_HIDDEN, MAX_TOP_K = 65536, 1024

_MAGIC = b"SWYD"
_PREFIX = struct.Struct("<4sBBHI")
_HELLO = struct.Struct("<QIIIHBBQ64s128s32s")
_WELCOME = struct.Struct("<QIIIII36s")
_REFUSED = struct.Struct("<QII48s")
_REQUEST = struct.Struct("<QIIQIIIHBBQQQ")
_REPLY = struct.Struct("<QIIQIIQQQQ")  # status and its three reserved bytes are read as one u32
pack_request_into = _REQUEST.pack_into
pack_reply_into = _REPLY.pack_into
_unpack_request = _REQUEST.unpack_from
_unpack_reply = _REPLY.unpack_from

_DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_DTYPES = {code: dtype for dtype, code in _DTYPE_CODES.items()}
_NUMPY_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.float16: np.float16,
}


def _first_word(frame_type: int) -> int:
    """Magic, version, type and zero flags as the u64 that a correct frame begins with."""
    return int.from_bytes(_MAGIC + bytes((VERSION, frame_type, 0, 0)), "little")


HELLO_WORD, WELCOME_WORD, REFUSED_WORD = _first_word(HELLO), _first_word(WELCOME), _first_word(REFUSED)
REQUEST_WORD, REPLY_WORD = _first_word(REQUEST), _first_word(REPLY)


def dtype_code(dtype: torch.dtype) -> int:
    """Code of a dtype on the wire. Raises InvalidCall for one that the format does not carry."""
    if dtype not in _DTYPE_CODES:
        raise errors.InvalidCall(f"the wire carries float32, bfloat16 and float16, not {dtype}")
    return _DTYPE_CODES[dtype]


def numpy_dtype(dtype: torch.dtype) -> Any:
    """The numpy dtype used to look at elements of `dtype`; bfloat16 is looked at as raw uint16."""
    return _NUMPY_DTYPES[dtype]


def check_prefix(buffer: Any, offset: int, expected_type: int) -> None:
    """Raise the right Malformed class unless magic, version, type and flags are those of `expected_type`."""
    magic, version, frame_type, flags, _ = _PREFIX.unpack_from(buffer, offset)
    if magic != _MAGIC:
        raise errors.BadMagic(f"magic {magic!r}")
    if version != VERSION:
        raise errors.BadVersion(f"version {version}, this side speaks {VERSION}")
    if frame_type != expected_type:
        raise errors.BadType(f"frame type {frame_type} where {expected_type} was expected")
    if flags:
        raise errors.BadFlags(f"flags {flags:#x}")


@dataclass(frozen=True)
class Agreement:
    """What one connection carries: fixed by Hello, known to both peers. Raises BadLimits or BadDtype if impossible."""

    hidden: int
    top_k: int
    dtype: torch.dtype
    max_tokens: int
    num_slots: int

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPE_CODES:
            raise errors.BadDtype(f"dtype {self.dtype}")
        for name, high in (
            ("hidden", MAX_HIDDEN),
            ("top_k", MAX_TOP_K),
            ("max_tokens", MAX_TOKENS),
            ("num_slots", MAX_SLOTS),
        ):
            if not 1 <= getattr(self, name) <= high:
                raise errors.BadLimits(f"{name} = {getattr(self, name)} is outside 1..{high}")
        if self.request_bytes(self.max_tokens) > MAX_FRAME_BYTES:
            raise errors.BadLimits(f"{self.max_tokens} tokens of {self.hidden} elements exceed {MAX_FRAME_BYTES} bytes")

    @cached_property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize

    @cached_property
    def code(self) -> int:
        return _DTYPE_CODES[self.dtype]

    def weights_offset(self, num_tokens: int) -> int:
        """Offset of the weights from the frame's start."""
        return (HEADER_BYTES + num_tokens * self.row_bytes + 63) & ~63

    def ids_offset(self, num_tokens: int) -> int:
        """Offset of the local expert ids from the frame's start."""
        return self.weights_offset(num_tokens) + num_tokens * self.top_k * 4

    def request_bytes(self, num_tokens: int) -> int:
        return self.weights_offset(num_tokens) + num_tokens * self.top_k * 8

    def reply_bytes(self, num_tokens: int) -> int:
        return HEADER_BYTES + num_tokens * self.row_bytes


@dataclass(frozen=True)
class Hello:
    engine_id: str
    fingerprint: str
    agreement: Agreement
    arena_bytes: int

    def encode(self) -> bytes:
        """The 256 bytes. Raises InvalidCall if a name does not fit."""
        a = self.agreement
        names = (_name_bytes(self.engine_id, 64, "engine id"), _name_bytes(self.fingerprint, 128, "fingerprint"))
        return _HELLO.pack(
            HELLO_WORD,
            HELLO_BYTES,
            a.hidden,
            a.max_tokens,
            a.top_k,
            a.code,
            a.num_slots,
            self.arena_bytes,
            *names,
            bytes(32),
        )

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """Inverse of `encode`; raises a Malformed class for anything else."""
        word, length, hidden, max_tokens, top_k, code, slots, arena, engine, fingerprint, rest = _HELLO.unpack(data)
        if word != HELLO_WORD:
            check_prefix(data, 0, HELLO)
        if length != HELLO_BYTES:
            raise errors.BadLength(f"Hello of {length} bytes")
        if any(rest):
            raise errors.BadReserved("Hello")
        if code not in _DTYPES:
            raise errors.BadDtype(f"dtype code {code}")
        agreement = Agreement(hidden, top_k, _DTYPES[code], max_tokens, slots)
        return cls(_name(engine, "engine id"), _name(fingerprint, "fingerprint"), agreement, arena)


@dataclass(frozen=True)
class Welcome:
    first_layer: int
    end_layer: int
    num_local_experts: int
    max_tokens: int

    def encode(self) -> bytes:
        fields = (self.first_layer, self.end_layer, self.num_local_experts, self.max_tokens)
        return _WELCOME.pack(WELCOME_WORD, HEADER_BYTES, *fields, bytes(36))

    @classmethod
    def decode(cls, data: bytes) -> Welcome:
        """Inverse of `encode`; raises a Malformed class for anything else."""
        word, length, first_layer, end_layer, num_local_experts, max_tokens, rest = _WELCOME.unpack(data)
        if word != WELCOME_WORD:
            check_prefix(data, 0, WELCOME)
        if length != HEADER_BYTES:
            raise errors.BadLength(f"Welcome of {length} bytes")
        if any(rest):
            raise errors.BadReserved("Welcome")
        return cls(first_layer, end_layer, num_local_experts, max_tokens)


def encode_refused(text: str) -> bytes:
    """A Refused frame saying why; the text is cut at 512 bytes."""
    data = clip_text(text)
    return _REFUSED.pack(REFUSED_WORD, HEADER_BYTES + len(data), len(data), bytes(48)) + data


def refused_text_bytes(header: bytes) -> int:
    """Length of the text that follows a Refused header; raises a Malformed class if the header is wrong."""
    word, length, text_bytes, rest = _REFUSED.unpack(header)
    if word != REFUSED_WORD:
        check_prefix(header, 0, REFUSED)
    if not 1 <= text_bytes <= MAX_TEXT_BYTES or length != HEADER_BYTES + text_bytes:
        raise errors.BadLength(f"Refused of {length} bytes with {text_bytes} of text")
    if any(rest):
        raise errors.BadReserved("Refused")
    return int(text_bytes)


def read_request(buffer: Any, offset: int, a: Agreement, layers: range) -> tuple[int, int, int, int, int]:
    """Check a request header and return (call_id, layer, num_tokens, budget_us, sent_ns).

    Every field is read from `buffer` exactly once, so a peer that changes shared memory meanwhile gains nothing.
    """
    fields = _unpack_request(buffer, offset)
    word, length, layer, call_id, num_tokens, budget_us, hidden, top_k, code, r0, sent_ns, r1, r2 = fields
    if word != REQUEST_WORD:
        check_prefix(_REQUEST.pack(*fields), 0, REQUEST)
    if hidden != a.hidden:
        raise errors.BadHidden(f"hidden {hidden}, agreed {a.hidden}")
    if top_k != a.top_k:
        raise errors.BadTopK(f"top_k {top_k}, agreed {a.top_k}")
    if code != a.code:
        raise errors.BadDtype(f"dtype code {code}, agreed {a.code}")
    if not 0 < num_tokens <= a.max_tokens:
        raise errors.BadTokenCount(f"{num_tokens} tokens, agreed at most {a.max_tokens}")
    if length != a.request_bytes(num_tokens):
        raise errors.BadLength(f"request of {length} bytes; {num_tokens} tokens make {a.request_bytes(num_tokens)}")
    if layer not in layers:
        raise errors.BadLayer(f"layer {layer}, this worker holds [{layers.start}, {layers.stop})")
    if call_id == 0:
        raise errors.BadCallId("call id 0")
    if r0 or r1 or r2:
        raise errors.BadReserved("Request")
    return call_id, layer, num_tokens, budget_us, sent_ns


def write_request(
    buffer: Any, offset: int, a: Agreement, call_id: int, layer: int, num_tokens: int, budget_us: int, sent_ns: int
) -> None:
    """Write a request header at `offset` of a writable buffer."""
    length = a.request_bytes(num_tokens)
    pack_request_into(
        buffer,
        offset,
        REQUEST_WORD,
        length,
        layer,
        call_id,
        num_tokens,
        budget_us,
        a.hidden,
        a.top_k,
        a.code,
        0,
        sent_ns,
        0,
        0,
    )


def read_reply(buffer: Any, offset: int, a: Agreement) -> tuple[int, int, int, int, int, int]:
    """Check a reply header and return (call_id, status, num_tokens, text_bytes, compute_ns, queue_ns)."""
    fields = _unpack_reply(buffer, offset)
    word, length, status, call_id, num_tokens, text_bytes, compute_ns, queue_ns, r1, r2 = fields
    if word != REPLY_WORD:
        check_prefix(_REPLY.pack(*fields), 0, REPLY)
    if status > DRAINING:
        if status > 255:
            raise errors.BadReserved("Reply")
        raise errors.BadStatus(f"status {status}")
    if not 0 < num_tokens <= a.max_tokens:
        raise errors.BadTokenCount(f"{num_tokens} tokens, agreed at most {a.max_tokens}")
    if status == OK:
        if text_bytes or length != a.reply_bytes(num_tokens):
            raise errors.BadLength(f"reply of {length} bytes; {num_tokens} tokens make {a.reply_bytes(num_tokens)}")
    elif not 1 <= text_bytes <= MAX_TEXT_BYTES or length != HEADER_BYTES + text_bytes:
        raise errors.BadLength(f"reply of {length} bytes with {text_bytes} of text")
    if r1 or r2:
        raise errors.BadReserved("Reply")
    return call_id, status, num_tokens, text_bytes, compute_ns, queue_ns


def check_ids(ids: np.ndarray, num_local_experts: int) -> bool:
    """True if no id is -1. `ids` must be private memory, not shared.

    Raises BadExpertId unless every id is in [-1, num_local_experts).
    """
    low, high = ids.min(), ids.max()
    if low < -1 or high >= num_local_experts:
        raise errors.BadExpertId(f"ids span [{low}, {high}], this worker holds {num_local_experts} experts")
    return bool(low >= 0)


def clip_text(text: str) -> bytes:
    """`text` as UTF-8 without NUL, 1 to 512 bytes."""
    data = text.replace("\0", "?").encode("utf-8", "replace")[:MAX_TEXT_BYTES]
    return data.decode("utf-8", "ignore").encode() or b"?"


def read_text(data: bytes) -> str:
    """UTF-8 text without NUL; raises BadText otherwise."""
    try:
        text = bytes(data).decode("utf-8")
    except UnicodeDecodeError as e:
        raise errors.BadText("text is not UTF-8") from e
    if "\0" in text:
        raise errors.BadText("text contains NUL")
    return text


def _name_bytes(name: str, size: int, what: str) -> bytes:
    data = name.encode()
    if not 1 <= len(data) <= size or b"\0" in data:
        raise errors.InvalidCall(f"{what} must be 1..{size} UTF-8 bytes without NUL: {name!r}")
    return data.ljust(size, b"\0")


def _name(data: bytes, what: str) -> str:
    name = data.rstrip(b"\0")
    if not name:
        raise errors.BadText(f"empty {what}")
    return read_text(name)
