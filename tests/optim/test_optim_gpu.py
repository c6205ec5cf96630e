"""LARS and LAMB on a CUDA GPU."""

from __future__ import annotations

import pytest
import torch

from bigbatch.optim import LAMB, LARS
from optim.problems import assert_equal, parameters, problem, rates, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
kernels = pytest.mark.parametrize("kernel", ["foreach", "triton"])
VARIANTS = [
    (LARS, {"weight_decay": 0.05, "nesterov": True}),
    (LARS, {"weight_decay": 0.05, "lr_placement": "outside", "clip_ratio": True, "denominator": "joint"}),
    (LAMB, {"weight_decay": 0.05, "prenormalize": True, "capturable": True}),
    (LAMB, {"weight_decay": 0.05}),
]


@kernels
@pytest.mark.parametrize("kind, options", VARIANTS)
def test_equals_the_cpu(kind, options, kernel):
    weights, gradients = problem(20)
    cpu, gpu = parameters(weights), parameters([w.cuda() for w in weights])
    train(kind(cpu, 1.0, **options), cpu, gradients, rates(20, 0.1))
    train(kind(gpu, 1.0, kernel=kernel, **options), gpu, [[g.cuda() for g in x] for x in gradients], rates(20, 0.1))
    assert_equal([p.cpu() for p in gpu], cpu, 1e-11)


@kernels
@pytest.mark.parametrize("kind, options", VARIANTS[:3])
def test_replays_in_a_cuda_graph(kind, options, kernel):
    weights, gradients = problem(6)
    eager, graphed = (parameters([w.cuda() for w in weights]) for _ in range(2))
    train(kind(eager, 0.1, kernel=kernel, **options), eager, [[g.cuda() for g in x] for x in gradients], [0.1] * 6)
    lr = torch.tensor(0.1, device="cuda", dtype=torch.float64)
    optimizer = kind(graphed, lr, kernel=kernel, **options)
    for p in graphed:
        p.grad = torch.zeros_like(p)

    def load(step):
        for p, g in zip(graphed, gradients[step], strict=True):
            p.grad.copy_(g)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        load(0)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, 6):
        load(step)
        graph.replay()
    assert_equal(graphed, eager, 1e-12)
