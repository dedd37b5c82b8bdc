"""The memory that calls lie in: an arena of slots, shared through a memfd on one host, private for a TCP connection.

Layout of an arena for an Agreement with S slots (all sizes in bytes; offsets from the arena's start):

       0  4096  control page. Slot i: request word u64 at 128*i, reply word u64 at 128*i + 64 (a cache line each)
    4096     .  slot 0: request region, then reply region; slot 1; ... every region starts on a multiple of 4096

A request region holds one Request frame, a reply region one Reply frame (cluster/wire.py), each from its offset 0 on.

Shared arenas: the client writes a whole Request, then sets the request word to its previous value + 1, then rings the
request doorbell. The server answers in the same slot's reply region, sets the reply word to the value of the request
word, and rings the reply doorbell. A slot is idle when both words are equal. Doorbells are eventfds watched edge
triggered and never read: every ring is news, and one ring may announce several slots. The words are written with single
aligned 8-byte stores after the data; x86 keeps that order, elsewhere the doorbell's system call does.

The memfd is created by the client, sealed against resizing before it is passed (else a peer could make the other die of
SIGBUS), and vanishes with the last process that maps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.errors import BadDescriptors
from cluster.wire import HEADER_BYTES, MAX_TEXT_BYTES, Agreement, numpy_dtype

PAGE_BYTES = 4096
_WORDS_PER_SLOT = 16
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def arena_bytes(a: Agreement) -> int:
    """Size of an arena for this agreement."""
    return PAGE_BYTES + a.num_slots * (_request_region(a) + _reply_region(a))


def _request_region(a: Agreement) -> int:
    return _pages(a.request_bytes(a.max_tokens))


def _reply_region(a: Agreement) -> int:
    return _pages(max(a.reply_bytes(a.max_tokens), HEADER_BYTES + MAX_TEXT_BYTES))


class Arena:
    """Mapped memory with the layout above, and views into it."""

    __slots__ = ("__weakref__", "address", "agreement", "buffer", "bytes_", "words")

    def __init__(self, agreement: Agreement, mapping: mmap.mmap) -> None:
        self.agreement = agreement
        self.buffer = mapping
        self.bytes_ = np.frombuffer(mapping, dtype=np.uint8)
        self.address: int = self.bytes_.ctypes.data
        self.words = memoryview(mapping)[:PAGE_BYTES].cast("Q")

    @classmethod
    def private(cls, agreement: Agreement) -> Arena:
        """Memory of this process only. Untouched pages cost nothing."""
        return cls(agreement, mmap.mmap(-1, arena_bytes(agreement)))

    @classmethod
    def create(cls, agreement: Agreement) -> tuple[Arena, int]:
        """A new shared arena and its sealed memfd, which the caller passes on and closes."""
        fd = os.memfd_create("switchyard", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, arena_bytes(agreement))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(agreement, mmap.mmap(fd, arena_bytes(agreement))), fd
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def adopt(cls, agreement: Agreement, fd: int) -> Arena:
        """Map a peer's memfd. Raises BadDescriptors unless its size and seals are right; does not close `fd`."""
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if seals & _SEALS != _SEALS or seals & fcntl.F_SEAL_WRITE:
                raise BadDescriptors(f"memfd with seals {seals:#x}")
            if os.fstat(fd).st_size != arena_bytes(agreement):
                raise BadDescriptors(f"memfd of {os.fstat(fd).st_size} bytes, {arena_bytes(agreement)} agreed")
            return cls(agreement, mmap.mmap(fd, arena_bytes(agreement)))
        except (OSError, ValueError) as e:
            raise BadDescriptors(f"memfd: {e}") from e

    def close(self) -> None:
        """Drop this object's views; the memory goes when the last view of others is gone."""
        if self.buffer is None:
            return
        self.words.release()
        mapping, self.buffer, self.bytes_ = self.buffer, None, None  # type: ignore[assignment]
        with contextlib.suppress(BufferError):  # somebody still looks at a slot: the mapping goes with that view
            mapping.close()


class SlotMemory:
    """One slot's two regions, with cached views per number of tokens."""

    __slots__ = (
        "_frames", "_numpy", "_torch", "arena", "index", "reply_address", "reply_offset", "request_address",
        "request_offset", "word",
    )  # fmt: skip

    def __init__(self, arena: Arena, index: int) -> None:
        a = arena.agreement
        self.arena = arena
        self.index = index
        self.word = index * _WORDS_PER_SLOT  # of the request; the reply word is 8 further
        self.request_offset = PAGE_BYTES + index * (_request_region(a) + _reply_region(a))
        self.reply_offset = self.request_offset + _request_region(a)
        self.request_address = arena.address + self.request_offset
        self.reply_address = arena.address + self.reply_offset
        self._numpy: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
        self._torch: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._frames: dict[int, tuple[int, int, np.ndarray]] = {}

    def frame(self, num_tokens: int) -> tuple[int, int, np.ndarray]:
        """(length of the request frame, address of its weights, its ids_TK)."""
        frame = self._frames.get(num_tokens)
        if frame is None:
            a = self.arena.agreement
            weights_address = self.request_address + a.weights_offset(num_tokens)
            frame = (a.request_bytes(num_tokens), weights_address, self.arrays(num_tokens)[2])
            if len(self._frames) >= 128:
                self._frames.clear()
            self._frames[num_tokens] = frame
        return frame

    def arrays(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(x_TD, weights_TK f32, ids_TK i32, partial_TD) over this slot; bfloat16 appears as uint16."""
        views = self._numpy.get(num_tokens)
        if views is None:
            views = self._make_arrays(num_tokens)
            if len(self._numpy) >= 128:
                self._numpy.clear()
            self._numpy[num_tokens] = views
        return views

    def tensors(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_TD, weights_TK f32, partial_TD) over this slot, in the agreed dtype."""
        views = self._torch.get(num_tokens)
        if views is None:
            a = self.arena.agreement
            x, w, _, out = self.arrays(num_tokens)
            views = (_as_tensor(x, a.dtype), torch.from_numpy(w), _as_tensor(out, a.dtype))
            if len(self._torch) >= 128:
                self._torch.clear()
            self._torch[num_tokens] = views
        return views

    def _make_arrays(self, t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        a, base = self.arena.agreement, self.request_offset

        def view(dtype: Any, offset: int, columns: int) -> np.ndarray:
            return np.frombuffer(self.arena.buffer, dtype, t * columns, offset).reshape(t, columns)

        return (
            view(numpy_dtype(a.dtype), base + HEADER_BYTES, a.hidden),
            view(np.float32, base + a.weights_offset(t), a.top_k),
            view(np.int32, base + a.ids_offset(t), a.top_k),
            view(numpy_dtype(a.dtype), self.reply_offset + HEADER_BYTES, a.hidden),
        )

    def close(self) -> None:
        self._frames.clear()
        self._numpy.clear()
        self._torch.clear()


def _as_tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def new_doorbell() -> int:
    """An eventfd to be watched edge triggered and never read."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def check_doorbell(fd: int) -> None:
    """Raise BadDescriptors unless `fd` is an eventfd that cannot block us."""
    if str(Path(f"/proc/self/fd/{fd}").readlink()) != "anon_inode:[eventfd]":
        raise BadDescriptors("a doorbell is not an eventfd")
    if os.get_blocking(fd):
        raise BadDescriptors("a doorbell is a blocking eventfd")


def copy(target_address: int, source_address: int, num_bytes: int) -> None:
    """memcpy between addresses that the caller vouches for."""
    ctypes.memmove(target_address, source_address, num_bytes)
