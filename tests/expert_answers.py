"""What a worker's experts answer, from a process of its own: python -m tests.expert_answers FOLDER ORDER.json ANSWER.pt

HostedExperts owns its process' vLLM state, and tests ask for it with different devices. The order: {"dtype", "experts":
[first, end], "tokens", "in_host_memory", "gpu_build": pretend to be vLLM's build for GPUs}.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from model.expert_weights import expert_of, hosted_weights, layer_of
from model.moe_spec import inspect_checkpoint, weight_files
from tests.nurseries import run_module

SEED = 7


def answers(folder: Path, scratch: Path, **order: Any) -> dict[str, Any]:
    """{"answers": {layer: [T, D]}, "device", "memory_bytes"} of the experts asked for."""
    asked, answered = scratch / "order.json", scratch / "answer.pt"
    asked.write_text(json.dumps(order))
    answered.unlink(missing_ok=True)
    run_module("tests.expert_answers", folder, asked, answered)
    found: dict[str, Any] = torch.load(answered, weights_only=True)
    return found


def inputs(folder: Path, dtype: str, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], weights [T, K] and global expert ids [T, K], the same in every process."""
    spec = inspect_checkpoint(str(folder), dtype)
    assert spec is not None
    generator = torch.Generator().manual_seed(SEED)
    x_TD = torch.randn(num_tokens, spec.hidden_size, generator=generator).to(spec.dtype)
    scores_TE = torch.rand(num_tokens, spec.num_experts, generator=generator)
    weights_TK, ids_TK = scores_TE.topk(spec.top_k)
    return x_TD, weights_TK.contiguous(), ids_TK.int().contiguous()


def expected(folder: Path, dtype: str, num_tokens: int, experts: range) -> dict[int, Tensor]:
    """The same sums in float64, from the checkpoint's weights as such; for SiLU experts named w1, w2, w3."""
    x_TD, weights_TK, ids_TK = inputs(folder, dtype, num_tokens)
    spec = inspect_checkpoint(str(folder), dtype)
    assert spec is not None
    found: dict[int, Tensor] = {layer: torch.zeros(x_TD.shape, dtype=torch.float64) for layer in range(spec.num_layers)}
    matrices = dict(hosted_weights(weight_files(folder), tuple(experts), spec.num_experts))
    for name in [name for name in matrices if name.endswith(".w1.weight")]:
        w1, w2, w3 = (matrices[name.replace(".w1.", f".{w}.")].double() for w in ("w1", "w2", "w3"))
        local = expert_of(name)
        assert local is not None
        layer, expert = layer_of(name), experts[local]
        rows, columns = (ids_TK == expert).nonzero(as_tuple=True)
        x_ND = x_TD[rows].double()
        y_ND = (silu(x_ND @ w1.T) * (x_ND @ w3.T)) @ w2.T
        found[layer].index_add_(0, rows, y_ND * weights_TK[rows, columns, None].double())
    return found


def main() -> None:
    folder, order_file, answer_file = map(Path, sys.argv[1:])
    order = json.loads(order_file.read_text())
    from cluster.routing import Shard
    from model import hosted_experts

    if order.get("gpu_build"):
        real = hosted_experts.current_platform
        hosted_experts.current_platform = SimpleNamespace(  # type: ignore[assignment]
            is_cpu=lambda: False, import_kernels=real.import_kernels, device_type="none"
        )
    x_TD, weights_TK, ids_TK = inputs(folder, order["dtype"], order["tokens"])
    experts = range(*order["experts"])
    spec = inspect_checkpoint(str(folder), order["dtype"])
    assert spec is not None
    hosted = hosted_experts.HostedExperts.load(
        str(folder),
        order["dtype"],
        Shard(0, tuple(experts), 0, spec.num_layers),
        num_threads=1,
        max_tokens=256,
        progress=lambda _: None,
        in_host_memory=order["in_host_memory"],
    )
    here_TK = (ids_TK >= experts.start) & (ids_TK < experts.stop)
    local_TK = torch.where(here_TK, ids_TK - experts.start, -1)
    found = {}
    with torch.inference_mode():
        for layer in range(spec.num_layers):
            found[layer] = torch.empty_like(x_TD)
            hosted.compute(layer, x_TD, weights_TK, local_TK, found[layer], bool(here_TK.all()))
    torch.save({"answers": found, "device": hosted.device, "memory_bytes": hosted.memory_bytes}, answer_file)


if __name__ == "__main__":
    main()
