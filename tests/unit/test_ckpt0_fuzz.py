"""Hundreds of bad checkpoints: nothing in a file is run, nothing hangs, and the file is named."""

import hashlib
import os
import pickle
import pickletools
import random
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import CheckpointError
from model.ckpt0_pickle import ALLOWED_NAMES, inspect_file
from model.grok_checkpoint import convert_ckpt0
from tests import ckpt0

pytestmark = pytest.mark.timeout(120)

# One file of each kind: embeddings, norm, stacked experts with one and with many rows of scales, a matrix, the gate.
KINDS = (0, 1, 2, 3, 5, 13)
RUNS_CODE = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "exec",
    "compile",
)

_events: list[str] = []
_is_watching = False


def _watch(event: str, _: object) -> None:
    if _is_watching and event in RUNS_CODE:
        _events.append(event)


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def no_code_runs() -> Iterator[None]:
    """Python tells of every call that could run something; there shall be none."""
    global _is_watching
    _events.clear()
    _is_watching = True
    yield
    _is_watching = False
    assert not _events


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ckpt0.write(tmp_path_factory.mktemp("good") / "ckpt-0", ckpt0.random_files(1))


def refused(folder: Path, data: bytes) -> str | None:
    """Put `data` into a file of its own and inspect it: the error's text, or None when it is taken."""
    path = folder / "tensor00042_000"
    path.write_bytes(data)
    try:
        inspect_file(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return str(error)
    return None


def convert(source: Path, folder: Path) -> None:
    convert_ckpt0(source, folder, config=ckpt0.CONFIG)


def refuse_conversion(source: Path, folder: Path, *names: str) -> None:
    """The conversion stops with one of the files' names, and leaves no model behind."""
    with pytest.raises(CheckpointError) as caught:
        convert(source, folder / "out")
    assert any(str(source / name) in str(caught.value) for name in names), str(caught.value)
    assert not (folder / "out/config.json").exists()


def test_the_encoder_writes_what_python_can_name(good: Path) -> None:
    for path in good.iterdir():
        opcodes = list(pickletools.genops(path.read_bytes()))
        texts = [text for opcode, text, _ in opcodes if opcode.name == "SHORT_BINUNICODE"]
        names = {pair for pair in pairwise(texts) if pair in ALLOWED_NAMES}
        assert len(names) == (5 if "weight" in texts else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated(good: Path, tmp_path: Path, kind: int) -> None:
    data = (good / ckpt0.file_name(kind)).read_bytes()
    lengths = sorted({*range(0, len(data), max(1, len(data) // 60)), len(data) - 2, len(data) - 1})
    assert len(lengths) > 40
    assert all(refused(tmp_path, data[:length]) for length in lengths)
    assert refused(tmp_path, data) is None


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_change_numbers_or_are_refused(good: Path, tmp_path: Path, kind: int) -> None:
    path = good / ckpt0.file_name(kind)
    data, places = path.read_bytes(), inspect_file(path)
    arrays = [place for place in (places.values, places.scales) if place is not None]
    numbers = {at for place in arrays for at in range(place.offset, place.offset + place.num_bytes)}
    draw = random.Random(kind)
    structure = [at for at in range(len(data)) if at not in numbers]
    for at in draw.sample(structure, 60) + draw.sample(sorted(numbers), 10):
        flipped = bytearray(data)
        flipped[at] ^= 1 << draw.randrange(8)
        if refused(tmp_path, bytes(flipped)) is None:
            taken = inspect_file(tmp_path / "tensor00042_000")
            # Fortran order, the fourth byte of a dtype's state and the first argument of an empty array stay readable.
            assert (taken.values.shape, taken.values.offset) == (places.values.shape, places.values.offset)
        else:
            assert at not in numbers


def test_every_opcode_in_the_wrong_place_is_refused(good: Path, tmp_path: Path) -> None:
    data = (good / ckpt0.file_name(5)).read_bytes()
    starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    for at in (starts[1], starts[8], starts[20], starts[-12], starts[-1]):
        for opcode in range(256):
            for argument in (b"", b"\0", b"\x01" * 8):
                changed = data[:at] + bytes([opcode]) + argument + data[at:]
                assert refused(tmp_path, changed), (opcode, at)


def test_bytes_after_the_tensor_are_refused(good: Path, tmp_path: Path) -> None:
    data = (good / ckpt0.file_name(5)).read_bytes()
    for more in (b"\0", b".", data, data[:1]):
        assert refused(tmp_path, data + more)


class _Runs:
    def __init__(self, call: Callable[..., object], *arguments: object):
        self.call = (call, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def hostile_pickles(canary: Path) -> Iterator[bytes]:
    """Pickles that run something in Python's unpickler, in every protocol and by every opcode that calls."""
    command = f"touch {canary}"
    calls = [
        (os.system, command),
        (eval, f"open({str(canary)!r}, 'w')"),
        (os.mkdir, str(canary)),
    ]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for call, *arguments in calls:
            value = _Runs(call, *arguments)
            yield pickle.dumps(value, protocol)
            yield pickle.dumps({"weight": value, "scales": value}, protocol)
            yield pickle.dumps(np.array([value], dtype=object), protocol)
    argument = b"\x8c" + bytes([len(command)]) + command.encode()
    for call in (
        b"cos\nsystem\n(" + argument + b"tR",
        b"(" + argument + b"ios\nsystem\n",
        b"(cos\nsystem\n" + argument + b"o",
        b"\x8c\x02os\x8c\x06system\x93" + argument + b"\x85R",
        b"\x8c\x02os\x8c\x06system\x93" + argument + b"\x85\x81",
        b"\x8c\x02os\x8c\x06system\x93" + argument + b"\x85}\x92",
        b"\x82\x01" + argument + b"\x85R",
        b"Pos.system\n",
        argument + b"Q",
    ):
        for start in (b"\x80\x04", b"\x80\x02", b""):
            yield start + call + b"."


def test_code_is_refused_and_never_run(good: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickles = list(hostile_pickles(canary))
    assert len(pickles) > 75
    for number, data in enumerate(pickles):
        assert refused(tmp_path, data)
        if number % 10 == 0:
            source = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(1))
            (source / ckpt0.file_name(number % 14)).write_bytes(data)
            refuse_conversion(source, tmp_path, ckpt0.file_name(number % 14))
    assert not canary.exists()


def test_allowed_names_in_other_roles_are_refused(tmp_path: Path) -> None:
    names = [
        b"\x8c" + bytes([len(m)]) + m.encode() + b"\x8c" + bytes([len(n)]) + n.encode() + b"\x93"
        for m, n in ALLOWED_NAMES
    ]
    states = [b")", b"}", b"N", b"K\x01\x85", b"(K\x01K\x02t", *names]
    for name in names:
        for state in states:
            for call in (b"R", b"\x81", b"b"):
                assert refused(tmp_path, b"\x80\x04" + name + state + call + b"."), (name, state, call)


@pytest.mark.parametrize(
    "dtype", [b"f8", b"f2", b"i2", b"i4", b"i8", b"u1", b"b1", b"c8", b"O8", b"V1", b"S4", b"M8", b""]
)
def test_wrong_dtypes(tmp_path: Path, dtype: bytes) -> None:
    files = ckpt0.random_files(1)
    files[1].dtype = files[3].dtype = dtype
    files[5].scales_dtype = dtype
    for number in (1, 3, 5):
        assert refused(tmp_path, files[number].bytes())


def test_wrong_byte_order_and_swapped_dtypes(tmp_path: Path) -> None:
    for order in (b">", b"=", b"|", b""):
        file = ckpt0.random_files(1)[0]
        file.order = order
        assert refused(tmp_path, file.bytes())
    swapped = ckpt0.random_files(1)[5]
    swapped.scales_dtype = b"i1"
    assert refused(tmp_path, swapped.bytes())
    alone = ckpt0.random_files(1)[5]
    alone.scales_data = None  # int8 without scales
    assert "neither a float32 array nor" in (refused(tmp_path, alone.bytes()) or "")


def test_claims_of_memory_are_checked_against_the_file(tmp_path: Path) -> None:
    """100 GB are claimed by a shape, by a length and by a frame; none of it is allocated."""
    tracemalloc.start()
    for length in (100 << 30, 1 << 63, 0xFFFFFFFF):
        for shape in ((100 << 20, 1 << 10), (1 << 30,) * 3, (ckpt0.VOCAB, ckpt0.HIDDEN)):
            file = ckpt0.random_files(1)[0]
            file.shape, file.length = shape, length
            assert refused(tmp_path, file.bytes())
        frame = ckpt0.random_files(1)[0]
        frame.extra["start"] = b"\x95" + struct.pack("<Q", length)
        assert refused(tmp_path, frame.bytes())
    huge_shape = ckpt0.random_files(1)[0]
    huge_shape.shape = (2**31 - 1,) * 3
    assert refused(tmp_path, huge_shape.bytes())
    doubled = b")" + b"".join(b"h" + bytes([number]) + b"h" + bytes([number]) + b"\x86\x94" for number in range(200))
    assert refused(tmp_path, b"\x80\x04K\x01\x85\x94" + doubled + b".")
    assert refused(tmp_path, b"\x80\x04" + b"K\x01" * 100_000 + b".")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [(), (0, 16), (-1, 16), (10, 16, 1, 1), (16, 10, 2), (160, 2)])
def test_shapes_that_do_not_fit_their_bytes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = ckpt0.random_files(1)[0]
    file.shape = shape
    assert refused(tmp_path, file.bytes())


@pytest.mark.parametrize(
    ("shape", "rows"), [((2, 32, 16), (2, 5, 16)), ((2, 32, 16), (2, 8, 8)), ((2, 32, 16), (8, 16))]
)
def test_scales_that_do_not_fit_their_weight(tmp_path: Path, shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    bad = ckpt0.quantised_file(np.zeros(shape, np.int8), np.ones(rows))
    assert "do not fit" in (refused(tmp_path, bad.bytes()) or "")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("number", [2, 3, 6, 8])
def test_scales_that_are_no_numbers(tmp_path: Path, number: int, value: float) -> None:
    files = ckpt0.random_files(1)
    scales = bytearray(files[number].scales_data or b"")
    scales[-2:] = ckpt0.bfloat16_bytes(np.array([value]))
    files[number].scales_data = bytes(scales)
    refuse_conversion(ckpt0.write(tmp_path / "ckpt-0", files), tmp_path, ckpt0.file_name(number))


@pytest.mark.parametrize("number", [0, 1, 9, 13])
def test_values_that_are_no_numbers(tmp_path: Path, number: int) -> None:
    files = ckpt0.random_files(1)
    files[number].data = files[number].data[:-4] + struct.pack("<f", float("nan"))
    refuse_conversion(ckpt0.write(tmp_path / "ckpt-0", files), tmp_path, ckpt0.file_name(number))


def swap(folder: Path, one: int, other: int) -> None:
    first, second = (folder / ckpt0.file_name(number) for number in (one, other))
    first_data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_data)


def test_swapped_files_of_different_shapes(good: Path, tmp_path: Path) -> None:
    sizes = [(good / ckpt0.file_name(number)).stat().st_size for number in range(14)]
    for one, other in combinations(range(14), 2):
        if sizes[one] == sizes[other]:
            continue
        source = ckpt0.write(tmp_path / f"{one}-{other}", ckpt0.random_files(1))
        swap(source, one, other)
        refuse_conversion(source, tmp_path, ckpt0.file_name(one), ckpt0.file_name(other))


@pytest.mark.parametrize(("one", "other"), [(2, 4), (5, 8), (9, 21), (2, 14), (3, 27), (13, 25)])
def test_swapped_files_of_one_shape_are_known_by_checksum(tmp_path: Path, one: int, other: int) -> None:
    """gate and up, k and v, and the same tensor of two layers."""
    source = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(3))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.iterdir()}
    (source / "SHA256SUMS").write_text("".join(f"{checksum}  {name}\n" for name, checksum in sums.items()))
    swap(source, one, other)
    refuse_conversion(source, tmp_path, ckpt0.file_name(one), ckpt0.file_name(other))
    swap(source, one, other)
    convert(source, tmp_path / "out")


def test_checksums_of_a_download_are_used(tmp_path: Path) -> None:
    """Of `hf download --local-dir`, and of the cache, where a file is a link to a blob named by its checksum."""
    source = ckpt0.write(tmp_path / "local/ckpt-0", ckpt0.random_files(1))
    metadata = tmp_path / "local/.cache/huggingface/download/ckpt-0/tensor00004_000.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"{'a' * 40}\n{'b' * 64}\n1.0\n")
    refuse_conversion(source, tmp_path, "tensor00004_000")
    cached = ckpt0.write(tmp_path / "snapshot/ckpt-0", ckpt0.random_files(1))
    blob = tmp_path / ("c" * 64)
    (cached / "tensor00009_000").rename(blob)
    (cached / "tensor00009_000").symlink_to(blob)
    refuse_conversion(cached, tmp_path, "tensor00009_000")


def test_a_file_copied_over_another_is_known(tmp_path: Path) -> None:
    files = ckpt0.random_files(2)
    for number in (2, 14):  # large enough not to be equal by chance
        files[number] = ckpt0.quantised_file(np.zeros((2, 16, 512), np.int8), np.ones((2, 1, 512)))
    for number in (3, 15):
        files[number] = ckpt0.quantised_file(np.full((2, 512, 16), number, np.int8), np.ones((2, 8, 16)))
    for number in (4, 16):
        files[number] = ckpt0.quantised_file(np.full((2, 16, 512), number, np.int8), np.ones((2, 1, 512)))
    source = ckpt0.write(tmp_path / "ckpt-0", files)
    with pytest.raises(CheckpointError, match="tensor00002_000 and tensor00014_000 are the same file"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("number", [0, 1, 7, 13, 25, 37])
def test_a_missing_file_is_named(tmp_path: Path, number: int) -> None:
    source = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(3))
    (source / ckpt0.file_name(number)).unlink()
    refuse_conversion(source, tmp_path, ckpt0.file_name(number)) if number != 37 else None
    with pytest.raises(CheckpointError, match=ckpt0.file_name(number)):
        convert(source, tmp_path / "out")


def test_missing_layers_are_missed_when_their_number_is_known(tmp_path: Path) -> None:
    source = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(2))
    with pytest.raises(CheckpointError, match=r"2 layers, not 3: tensor00026_000"):
        convert_ckpt0(source, tmp_path / "out", config=ckpt0.CONFIG | {"num_layers": 3})


@pytest.mark.parametrize("name", ["tensor00003_001", "tensor00003_000.part", "tensor3_000"])
def test_files_that_do_not_belong_are_named(tmp_path: Path, name: str) -> None:
    source = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(1))
    (source / name).write_bytes(b"")
    refuse_conversion(source, tmp_path, name)


def test_what_is_no_regular_file_does_not_hang(tmp_path: Path) -> None:
    source = ckpt0.write(tmp_path / "ckpt-0", ckpt0.random_files(1))
    path = source / ckpt0.file_name(6)
    for replace in (lambda: os.mkfifo(path), lambda: path.symlink_to(path), path.mkdir, lambda: path.write_bytes(b"")):
        path.rmdir() if path.is_dir() else path.unlink()
        replace()
        refuse_conversion(source, tmp_path, path.name)


def test_a_folder_without_tensors(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="give the folder ckpt-0"):
            convert(folder, tmp_path / "out")
