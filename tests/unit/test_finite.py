"""Whether answers are finite, in C and in numpy."""

import numpy as np
import pytest
import torch

from cluster import finite, native


@pytest.fixture(params=["c", "numpy"])
def all_finite_of(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(finite, "library", lambda: None)
    else:
        assert native.library() is not None, "the C library was not built"
    return finite.all_finite_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_bad_value_anywhere_is_found(all_finite_of, dtype):
    all_finite = all_finite_of(dtype)
    rng = np.random.default_rng(0)
    for count in (1, 7, 64, 1000):
        values = torch.from_numpy(rng.standard_normal(count) * 1e4).to(dtype)
        values[0] = torch.finfo(dtype).max
        assert all_finite(values.data_ptr(), count)
        for bad in (float("nan"), float("inf"), float("-inf")):
            at = int(rng.integers(count))
            spoilt = values.clone()
            spoilt[at] = bad
            assert not all_finite(spoilt.data_ptr(), count), (at, bad)
            assert all_finite(spoilt.data_ptr(), at), "only what was asked for is read"
    assert all_finite(0, 0)
