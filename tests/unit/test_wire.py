"""The wire format: round trips, byte positions, and one error for each way of being malformed."""

import pickle
import struct

import numpy as np
import pytest
import torch

from cluster import errors, wire

AGREED = wire.Agreement(hidden=24, top_k=2, dtype=torch.bfloat16, max_tokens=8, num_slots=2)
LAYERS = range(2, 5)


def request_frame(num_tokens: int = 3) -> bytearray:
    frame = bytearray(AGREED.request_bytes(num_tokens))
    wire.write_request(frame, 0, AGREED, 77, 4, num_tokens, 1500, 123456789)
    return frame


def reply_frame(status: int = wire.OK, num_tokens: int = 3, text: bytes = b"") -> bytearray:
    frame = bytearray(wire.HEADER_BYTES + (len(text) or num_tokens * AGREED.row_bytes))
    wire.pack_reply_into(frame, 0, wire.REPLY_WORD, len(frame), status, 77, num_tokens, len(text), 11, 22, 0, 0)
    frame[wire.HEADER_BYTES : wire.HEADER_BYTES + len(text)] = text
    return frame


def poke(frame: bytes, offset: int, layout: str, value: object) -> bytes:
    changed = bytearray(frame)
    struct.pack_into("<" + layout, changed, offset, value)
    return bytes(changed)


def test_request_is_laid_out_as_documented():
    frame = request_frame()
    assert frame[:4] == b"SWYD" and frame[4] == 1 and frame[5] == 4 and frame[6:8] == b"\0\0"
    assert struct.unpack_from("<IIQIIIHBBQQQ", frame, 8) == (len(frame), 4, 77, 3, 1500, 24, 2, 2, 0, 123456789, 0, 0)
    assert AGREED.weights_offset(3) == 256 and AGREED.ids_offset(3) == 256 + 24 and len(frame) == 256 + 48
    assert wire.read_request(frame, 0, AGREED, LAYERS) == (77, 4, 3, 1500, 123456789)


def test_reply_is_laid_out_as_documented():
    frame = reply_frame()
    assert struct.unpack_from("<4sBBHIB3xQIIQQ16s", frame) == (
        b"SWYD", 1, 5, 0, 64 + 3 * 48, 0, 77, 3, 0, 11, 22, bytes(16)
    )  # fmt: skip
    assert wire.read_reply(frame, 0, AGREED) == (77, wire.OK, 3, 0, 11, 22)
    assert wire.read_reply(reply_frame(wire.ERROR, text=b"why"), 0, AGREED) == (77, wire.ERROR, 3, 3, 11, 22)


REQUEST_CASES = [
    (0, "4s", b"GET ", errors.BadMagic),
    (4, "B", 2, errors.BadVersion),
    (5, "B", wire.REPLY, errors.BadType),
    (5, "B", 99, errors.BadType),
    (6, "H", 1, errors.BadFlags),
    (8, "I", 0, errors.BadLength),
    (8, "I", 2**32 - 1, errors.BadLength),
    (12, "I", 1, errors.BadLayer),
    (12, "I", 5, errors.BadLayer),
    (16, "Q", 0, errors.BadCallId),
    (24, "I", 0, errors.BadTokenCount),
    (24, "I", 9, errors.BadTokenCount),
    (24, "I", 4, errors.BadLength),
    (32, "I", 25, errors.BadHidden),
    (36, "H", 3, errors.BadTopK),
    (38, "B", 1, errors.BadDtype),
    (39, "B", 1, errors.BadReserved),
    (48, "B", 1, errors.BadReserved),
    (63, "B", 1, errors.BadReserved),
]


@pytest.mark.parametrize(("offset", "layout", "value", "error"), REQUEST_CASES)
def test_every_malformed_request_has_its_error(offset, layout, value, error):
    with pytest.raises(error) as caught:
        wire.read_request(poke(request_frame(), offset, layout, value), 0, AGREED, LAYERS)
    assert type(caught.value) is error


REPLY_CASES = [
    (0, "4s", b"\0\0\0\0", errors.BadMagic),
    (4, "B", 0, errors.BadVersion),
    (5, "B", wire.REQUEST, errors.BadType),
    (6, "H", 256, errors.BadFlags),
    (8, "I", 63, errors.BadLength),
    (12, "B", 4, errors.BadStatus),
    (12, "B", wire.ERROR, errors.BadLength),
    (13, "B", 1, errors.BadReserved),
    (24, "I", 0, errors.BadTokenCount),
    (24, "I", 9, errors.BadTokenCount),
    (24, "I", 2, errors.BadLength),
    (28, "I", 1, errors.BadLength),
    (50, "B", 1, errors.BadReserved),
]


@pytest.mark.parametrize(("offset", "layout", "value", "error"), REPLY_CASES)
def test_every_malformed_reply_has_its_error(offset, layout, value, error):
    with pytest.raises(error) as caught:
        wire.read_reply(poke(reply_frame(), offset, layout, value), 0, AGREED)
    assert type(caught.value) is error


HELLO = wire.Hello("engine-0", "model-ä", AGREED, 123)
HELLO_CASES = [
    (0, "4s", b"SWYX", errors.BadMagic),
    (4, "B", 7, errors.BadVersion),
    (5, "B", wire.REQUEST, errors.BadType),
    (6, "H", 1, errors.BadFlags),
    (8, "I", 255, errors.BadLength),
    (12, "I", 0, errors.BadLimits),
    (12, "I", 2**32 - 1, errors.BadLimits),
    (16, "I", 0, errors.BadLimits),
    (16, "I", 65537, errors.BadLimits),
    (20, "H", 0, errors.BadLimits),
    (22, "B", 0, errors.BadDtype),
    (22, "B", 4, errors.BadDtype),
    (23, "B", 0, errors.BadLimits),
    (23, "B", 17, errors.BadLimits),
    (32, "64s", b"", errors.BadText),
    (32, "64s", b"\xff\xfe", errors.BadText),
    (32, "64s", b"a\0b", errors.BadText),
    (96, "128s", b"", errors.BadText),
    (255, "B", 1, errors.BadReserved),
]


def test_handshake_messages_round_trip():
    assert wire.Hello.decode(HELLO.encode()) == HELLO and len(HELLO.encode()) == wire.HELLO_BYTES
    welcome = wire.Welcome(1, 9, 4, 512)
    assert wire.Welcome.decode(welcome.encode()) == welcome
    refused = wire.encode_refused("no " + "ä" * 600)
    assert wire.refused_text_bytes(refused[:64]) == len(refused) - 64 <= wire.MAX_TEXT_BYTES
    assert wire.read_text(refused[64:]).startswith("no ää")


@pytest.mark.parametrize(("offset", "layout", "value", "error"), HELLO_CASES)
def test_every_malformed_hello_has_its_error(offset, layout, value, error):
    with pytest.raises(error) as caught:
        wire.Hello.decode(poke(HELLO.encode(), offset, layout, value))
    assert type(caught.value) is error


def test_malformed_welcome_and_refused():
    welcome = wire.Welcome(0, 1, 1, 1).encode()
    for offset, layout, value, error in [
        (5, "B", 3, errors.BadType),
        (8, "I", 1, errors.BadLength),
        (60, "B", 1, errors.BadReserved),
    ]:
        with pytest.raises(error):
            wire.Welcome.decode(poke(welcome, offset, layout, value))
    refused = wire.encode_refused("why")[:64]
    for offset, layout, value, error in [
        (12, "I", 513, errors.BadLength),
        (0, "B", 0, errors.BadMagic),
        (16, "B", 1, errors.BadReserved),
    ]:
        with pytest.raises(error):
            wire.refused_text_bytes(poke(refused, offset, layout, value))


def test_frames_that_would_overflow_are_refused():
    with pytest.raises(errors.BadLimits):
        wire.Agreement(65536, 1, torch.float32, 65536, 1)
    with pytest.raises(errors.BadDtype):
        wire.Agreement(8, 1, torch.float64, 1, 1)


def test_ids_and_texts():
    wire.check_ids(np.array([[-1, 3]], np.int32), 4)
    for bad in (-2, 4, 2**31 - 1, -(2**31)):
        with pytest.raises(errors.BadExpertId):
            wire.check_ids(np.array([[0, bad]], np.int32), 4)
    with pytest.raises(errors.BadText):
        wire.read_text(b"\xff")
    assert wire.clip_text("") == b"?" and wire.clip_text("a\0b") == b"a?b"
    with pytest.raises(errors.InvalidCall):
        wire.Hello("e" * 65, "m", AGREED, 0).encode()


def all_errors(cls: type = errors.SwitchyardError) -> list[type]:
    """The tree in cluster/errors.py, without what other packages that happen to be imported hang below it."""
    own = [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]
    return [cls, *(e for sub in own for e in all_errors(sub))]


@pytest.mark.parametrize("cls", all_errors(), ids=lambda c: c.__name__)
def test_errors_survive_pickling_and_are_in_the_drawing(cls):
    error = pickle.loads(pickle.dumps(cls("what", retry_after_s=2.5)))
    assert type(error) is cls and str(error) == "what" and error.details == {"retry_after_s": 2.5}
    assert cls.__name__ in (errors.__doc__ or "") and error.reason == error.reason.lower()
    assert cls.fault in ("client", "server") and 400 <= cls.http_status < 600
