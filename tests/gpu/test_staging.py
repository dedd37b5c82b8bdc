"""Layer calls with tensors on a GPU: staged through pinned memory, equal to the same calls on the host."""

import pytest
import torch

from cluster.dispatcher import Dispatcher
from cluster.errors import InvalidCall
from cluster.fakes import LocalExperts, ThreadWorker, ToyExperts, ToyShape
from cluster.placement import partition

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_shards", [1, 2])
def test_gpu_tensors_give_the_same_answers(num_shards, dtype):
    shape = ToyShape(hidden=256, dtype=dtype)
    shards = partition(shape.num_layers, shape.num_experts, num_shards)
    workers = [ThreadWorker(shape, s) for s in shards]
    dispatcher = Dispatcher(
        engine_id="e",
        secret=shape.secret,
        hidden_size=shape.hidden,
        top_k=shape.top_k,
        dtype=dtype,
        max_tokens=shape.max_tokens,
    )
    dispatcher.update(shape.table(1, shards, [w.replica(f"r{i}") for i, w in enumerate(workers)]))
    local = LocalExperts([(s, ToyExperts(s.experts).compute) for s in shards], shape.num_experts)
    for num_tokens in (1, 7, 32, 100):
        x_TD = torch.randn(num_tokens, shape.hidden).to(dtype)
        weights_TK = torch.rand(num_tokens, shape.top_k)
        ids_TK = torch.randint(0, shape.num_experts, (num_tokens, shape.top_k))
        expected_TD, out_TD = torch.empty_like(x_TD), torch.empty_like(x_TD, device="cuda")
        local.finish(local.start(1, x_TD, weights_TK, ids_TK), expected_TD)
        ticket = dispatcher.start(1, x_TD.cuda(), weights_TK.cuda(), ids_TK.cuda())
        dispatcher.finish(ticket, out_TD)
        assert torch.equal(out_TD.cpu(), expected_TD)
    with pytest.raises(InvalidCall):
        dispatcher.start(1, x_TD.cuda(), weights_TK, ids_TK)
    dispatcher.check_integrity()
    dispatcher.close()
    for worker in workers:
        worker.close()
