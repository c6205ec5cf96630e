"""Layers in pieces on real processes: FSDP2's DTensors and flat partitions, equal to the same layers in one piece."""

from __future__ import annotations

import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from bigbatch.optim import LAMB, LARS
from optim.problems import parameters, problem, rates, shard_like, train
from ranks import run_ranks

STEPS = 20
SHAPES = ((5, 3), (7,), (1,), (4, 2, 3), (2, 2))
VARIANTS = [
    (LARS, {"weight_decay": 0.05, "denominator": "joint", "trust_coefficient": 0.02}),
    (LARS, {"weight_decay": 0.05, "nesterov": True, "clip_ratio": True, "lr_placement": "outside"}),
    (LAMB, {"weight_decay": 0.05, "clamp_weight_norm": 1.5}),
    (LAMB, {"weight_decay": 0.05, "prenormalize": True}),
]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
CASES = [(kind, options, dtype) for kind, options in VARIANTS for dtype in TOLERANCE]


class Net(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = nn.ParameterList(w.clone() for w in weights)


def whole(kind, options, dtype, shapes=SHAPES):
    weights, gradients = problem(STEPS, shapes=shapes, dtype=dtype)
    params = parameters(weights)
    groups = [{"params": params[:-1]}, {"params": params[-1:], "adapt": False}]
    return [p.detach() for p in train(kind(groups, 1.0, **options), params, gradients, rates(STEPS, 0.05))]


def collectives(step):
    """The collectives that ``step`` starts, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    return sum(e.count for e in seen.key_averages() if e.key.startswith(("c10d::", "_c10d_functional::")))


def apart(ours, theirs):
    """The largest relative distance of two lists of tensors, by norm."""
    return max(((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in zip(ours, theirs, strict=True))


def on_a_mesh(rank, mesh_shape, kind, options, dtype):
    """Parameters after all steps, collectives of the last, and how far off a state that was saved halfway ends."""
    names = ("replicate", "shard")[-len(mesh_shape) :]
    weights, gradients = problem(STEPS, shapes=SHAPES, dtype=dtype)
    nets = [fully_shard(Net(weights), mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)) for _ in range(2)]

    def optimizer_of(net):
        params = list(net.parameters())
        return kind([{"params": params[:-1]}, {"params": params[-1:], "adapt": False}], 1.0, **options)

    def load(net, t):
        for p, g in zip(net.parameters(), gradients[t], strict=True):
            p.grad = shard_like(p, g)

    first, second = (optimizer_of(net) for net in nets)
    lrs, counted = rates(STEPS, 0.05), 0
    for t in range(STEPS):
        if t == STEPS // 2:
            file = io.BytesIO()
            torch.save(get_optimizer_state_dict(nets[0], first), file)
            file.seek(0)
            set_optimizer_state_dict(nets[1], second, torch.load(file, weights_only=False))
            with torch.no_grad():
                for a, b in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
                    a.copy_(b)
        for net, optimizer in ((nets[0], first), (nets[1], second)) if t >= STEPS // 2 else ((nets[0], first),):
            load(net, t)
            for group in optimizer.param_groups:
                group["lr"] = lrs[t]
            if t < STEPS - 1:
                optimizer.step()
            else:
                counted = collectives(optimizer.step)
    assert all(isinstance(s, DTensor) for p in nets[0].parameters() for k, s in first.state[p].items() if k != "step")
    ends = [[p.full_tensor().detach() for p in net.parameters()] for net in nets]
    return ends[0], counted, apart(*ends)


def on_every_mesh(rank, mesh_shape):
    return [on_a_mesh(rank, mesh_shape, *case) for case in CASES]


@pytest.mark.parametrize("mesh_shape", [(2,), (4,), (2, 2)], ids=str)
def test_fully_shard_equals_whole_layers_in_one_collective(mesh_shape):
    """On 4 processes most have no part of the layers of 1 and 2 rows; on the 2 × 2 mesh two replicate two shards."""
    for results in run_ranks(torch.Size(mesh_shape).numel(), on_every_mesh, mesh_shape):
        for (kind, options, dtype), (ours, counted, resumed) in zip(CASES, results, strict=True):
            assert apart(ours, whole(kind, options, dtype)) <= TOLERANCE[dtype], (kind, options)
            assert counted == 1 + options.get("prenormalize", False)
            assert resumed == 0


# Layers of 6, 4, 1 and 5 elements, cut so that the first lies on three processes, one process has nothing but padding,
# and the second is in two segments of one partition. Per process: its size, (layer, start, stop, offset in the layer).
LAYERS = ((6,), (4,), (1,), (5,))
CUTS = (
    (8, [(1, 0, 1, 0), (0, 1, 3, 0), (1, 4, 7, 1)]),
    (3, []),
    (4, [(0, 0, 1, 2), (2, 1, 2, 0), (3, 2, 4, 0)]),
    (7, [(3, 0, 3, 2), (0, 4, 7, 3)]),
)


def flat_of(tensors, size, segments, fill=0.0):
    flat = torch.full((size,), fill, dtype=tensors[0].dtype)
    for layer, start, stop, offset in segments:
        flat[start:stop] = tensors[layer][offset : offset + stop - start]
    return flat


def on_partitions(rank, adapt):
    return [on_a_partition(rank, *case, adapt) for case in CASES]


def on_a_partition(rank, kind, options, dtype, adapt):
    weights, gradients = problem(STEPS, shapes=LAYERS, dtype=dtype)
    size, segments = CUTS[rank]
    partition = nn.Parameter(flat_of(weights, size, segments, fill=7.0))
    optimizer = kind([partition], 1.0, adapt=adapt, **options)
    optimizer.set_segments(partition, [segment[:3] for segment in segments], layers=len(LAYERS))
    flat = [[flat_of(gradient, size, segments, fill=3.0)] for gradient in gradients]
    train(optimizer, [partition], flat[:-1], rates(STEPS, 0.05)[:-1])
    counted = collectives(lambda: train(optimizer, [partition], flat[-1:], rates(STEPS, 0.05)[-1:]))
    return partition.detach(), counted


@pytest.mark.parametrize("adapt", [True, False])
def test_flat_partitions_equal_whole_layers_in_one_collective(adapt):
    results = run_ranks(len(CUTS), on_partitions, adapt)
    for i, (kind, options, dtype) in enumerate(CASES):
        weights, gradients = problem(STEPS, shapes=LAYERS, dtype=dtype)
        params = parameters(weights)
        train(kind(params, 1.0, adapt=adapt, **options), params, gradients, rates(STEPS, 0.05))
        for (size, segments), (ours, counted) in zip(CUTS, (result[i] for result in results), strict=True):
            expected = flat_of([p.detach() for p in params], size, segments, fill=7.0)
            assert apart([ours], [expected]) <= TOLERANCE[dtype], (kind, options)
            assert counted == adapt + options.get("prenormalize", False)


@pytest.mark.parametrize(
    "segments, named",
    [
        ([(2, 0, 3)], r"segment \(2, 0, 3\).*layer < 2"),
        ([(0, 0, 11)], r"segment \(0, 0, 11\).*10 elements"),
        ([(0, 3, 2)], r"segment \(0, 3, 2\)"),
        ([(0, 2, 5), (1, 0, 3)], r"segment \(0, 2, 5\).*apart"),
        ([(-1, 0, 3)], r"segment \(-1, 0, 3\)"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments, named):
    p = nn.Parameter(torch.ones(10))
    with pytest.raises(ValueError, match=named):
        LARS([p], 0.1).set_segments(p, segments, layers=2)
    with pytest.raises(ValueError, match=r"partition of shape \(5, 2\)"):
        LARS([p], 0.1).set_segments(torch.ones(5, 2), [], layers=2)


def test_pieces_have_no_fused_kernel():
    p = nn.Parameter(torch.ones(10))
    optimizer = LAMB([p], 0.1, kernel="fused")
    optimizer.set_segments(p, [(0, 0, 10)], layers=1)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"kernel = 'fused': .*in pieces on several processes"):
        optimizer.step()


def group_without_default(rank):
    """Partitions of two of four processes, each pair a group of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    p = nn.Parameter(torch.full((2,), 1.0 + rank))
    optimizer = LAMB([p], 0.1)
    optimizer.set_segments(p, [(0, 0, 2)], layers=1, group=groups[rank // 2])
    p.grad = torch.ones_like(p)
    optimizer.step()
    return 1.0 + rank - p.detach()


def test_norms_stay_within_the_group():
    """The first LAMB update is γ‖w‖/‖u‖ · u, and u has equal elements: each moves by γ√(mean w² of the group)."""
    moved = run_ranks(4, group_without_default)
    for rank, step in enumerate(moved):
        mean_square = torch.tensor([1.0, 4.0] if rank < 2 else [9.0, 16.0]).mean()
        torch.testing.assert_close(step, 0.1 * mean_square.sqrt().expand(2), rtol=1e-5, atol=0)
