"""zero1 and fsdp2 take the steps of replicas, whatever the optimiser, and load what any strategy has saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import profile

from bigbatch.dist.fsdp2 import units
from bigbatch.dist.zero1 import Zero1, _lay_out, owners, row_lengths
from dist.models import Block, Odd, accumulate, chain, odd, prepared
from ranks import Ranks

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "lars": {"trust_coefficient": 0.02},
    "lamb": {},
    "adagrad": {"initial_accumulator_value": 0.1},
    "rmsprop": {"momentum": 0.9, "centered": True},
    "adadelta": {},
    "adamw": {"amsgrad": True},
    "radam": {},
    "nadam": {},
}
# How the same arithmetic is computed is no part of a checkpoint.
KERNEL = ("foreach", "fused", "kernel")


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def groups(state: dict[str, Any]) -> list[list[tuple[str, Any]]]:
    return [[item for item in group.items() if item[0] not in KERNEL] for group in state["param_groups"]]


@pytest.mark.parametrize("strategy", ["zero1", "fsdp2"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_and_states_are_those_of_replicas(three: Ranks, name: str, strategy: str) -> None:
    """Six steps on three processes, the last two after the way through another strategy's states."""
    optim = {"name": name, **OPTIMIZERS[name]}
    model, optimizer, total = chain(0, optim, ["ddp", "ddp", "ddp"])
    other = {"zero1": "fsdp2", "fsdp2": "zero1"}[strategy]
    found = three(chain, optim, [strategy, other, strategy])
    ours = found[0]
    torch.testing.assert_close(ours[0], dict(model), rtol=1e-12, atol=1e-12)
    assert list(ours[0]) == list(model)
    torch.testing.assert_close(ours[1]["state"], optimizer["state"], rtol=1e-11, atol=1e-13)
    assert list(ours[1]["state"]) == list(optimizer["state"]) and groups(ours[1]) == groups(optimizer)
    assert sum(held for *_, held in found) <= 1.3 * total, "some state is held twice"
    assert max(held for *_, held in found) <= 0.5 * total


# ---------------------------------------------------------------------------------------------- zero1


@given(sizes=st.lists(st.integers(0, 1000), max_size=40), world=st.integers(1, 9))
def test_owners_are_balanced(sizes: list[int], world: int) -> None:
    found = owners(sizes, world)
    loads = [sum(size for size, owner in zip(sizes, found, strict=True) if owner == rank) for rank in range(world)]
    assert sum(loads) == sum(sizes)
    # Whoever is fullest was the emptiest before its last one.
    assert max(loads) * world <= sum(sizes) + max(sizes, default=0) * (world - 1)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("name", ["resnet50", "vit_small_patch16_224", "convnext_tiny"])
def test_no_process_holds_a_tenth_more_than_its_share(name: str, world: int) -> None:
    with torch.device("meta"):
        sizes = [p.numel() for p in timm.create_model(name).parameters()]
    loads = [0] * world
    for size, owner in zip(sizes, owners(sizes, world), strict=True):
        loads[owner] += size
    assert max(loads) <= max(1.1 * sum(sizes) / world, max(sizes))


@given(filled=st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_rows_hold_what_fills_them_and_are_padded_by_a_quarter_at_most(filled: list[int]) -> None:
    found = row_lengths(filled)
    assert all(map(int.__ge__, found, filled)) and 4 * sum(found) <= 5 * sum(filled)
    assert found == filled or len(set(found)) == 1
    if 4 * max(filled) * len(filled) <= 5 * sum(filled):
        assert len(set(found)) == 1, "one all-gather would do"


@pytest.mark.parametrize(("world", "even"), [(8, True), (64, False), (256, False)])
def test_buffers_do_not_grow_with_the_processes(world: int, even: bool) -> None:
    with torch.device("meta"):
        params = [*timm.create_model("resnet50").parameters()]
    owner = dict(zip(params, owners([p.nbytes for p in params], world), strict=True))
    total = sum(p.nbytes for p in params)
    [(buffer, rows)] = _lay_out(owner, world)
    assert total <= buffer.nbytes <= (1.25 if even else 1) * total + 64 * len(params)
    assert len(rows) == world and (len({len(row) for row in rows}) == 1) == even
    for p, rank in owner.items():
        start, end = rows[rank].storage_offset(), rows[rank].storage_offset() + len(rows[rank])
        assert start <= p.storage_offset() <= end - p.numel() and p.storage_offset() % 16 == 0


def layers(rank: int, strategy: str, widths: list[int]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Three steps of layers of these widths; the parameters, and the collectives of the last update."""
    torch.manual_seed(2)
    sizes = zip([4, *widths], [*widths, 2], strict=True)
    model = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes)).double()
    made = prepared(model, {"name": "adamw"}, strategy=strategy)
    for number in range(3):
        made.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(6 * number + rank), dtype=torch.float64)
        made.backward(made.wrapped(x).square().sum())
        with profile() as profiler:
            made.step()
    names = [event.name.removeprefix("c10d::") for event in profiler.events() if "c10d" in event.name]
    return dict(made.model.state_dict()), {name: names.count(name) for name in names}


@pytest.mark.parametrize(
    ("widths", "sent"),
    [([24, 24, 8], {"broadcast_": 3}), ([24, 24, 24, 24], {"_allgather_base_": 1}), ([90], {"broadcast_": 2})],
)
def test_unequal_layers_are_broadcast_and_equal_ones_gathered(
    three: Ranks, widths: list[int], sent: dict[str, int]
) -> None:
    """The same steps on three processes; one without a layer has nothing to send."""
    wanted, _ = three(layers, "ddp", widths)[0]
    found = three(layers, "zero1", widths)
    torch.testing.assert_close(found[0][0], wanted, rtol=1e-12, atol=1e-12)
    for parameters, calls in found:
        torch.testing.assert_close(parameters, found[0][0], rtol=0, atol=0)
        assert calls == sent


class Mixed(nn.Module):
    """Weights of two dtypes, one of them channels last, one a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
        self.head = nn.Linear(6, 4).double()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.conv(x) * self.gain).mean((2, 3)).double())


def mixed(rank: int, strategy: str) -> tuple[dict[str, Tensor], list[bool]]:
    torch.manual_seed(1)
    made = prepared(Mixed(), {"name": "adamw"}, torch.float32, strategy=strategy)
    strides = [p.stride() for p in made.model.parameters()]
    for number in range(3):
        made.zero_grad()
        x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(number))
        made.backward(made.wrapped(x).square().sum())
        made.step()
    if isinstance(made, Zero1):
        memory = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b, _ in made._buffers]
        assert all(any(low <= p.data_ptr() < high for low, high in memory) for p in made.model.parameters())
        assert len(memory) == 2 and all(p.data_ptr() % 64 == memory[0][0] % 64 for p in made.model.parameters())
    return dict(made.model.state_dict()), [p.stride() for p in made.model.parameters()] == strides


def test_zero1_keeps_dtypes_and_memory_formats(three: Ranks) -> None:
    wanted, _ = mixed(0, "ddp")
    for found, same_strides in three(mixed, "zero1"):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert same_strides


# ---------------------------------------------------------------------------------------------- fsdp2


class Twice(nn.Module):
    """A block inside a list that shares a weight with one outside, and lists in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
        self.stages = nn.ModuleList([nn.ModuleList([Block(3), Block(3)]), nn.Sequential(Block(3), nn.ReLU())])
        self.extra = Block(3)
        self.extra.up.weight = self.stages[0][1].up.weight


def test_units_are_blocks_that_share_nothing_with_what_is_outside() -> None:
    model = Twice()
    assert units(model) == [model.stages[0][0], model.stages[1]]
    assert len(units(Odd())) == 2
    with torch.device("meta"):
        assert len(units(timm.create_model("resnet50"))) == 16
        assert len(units(timm.create_model("vit_small_patch16_224"))) == 12


def refused(rank: int, what: str) -> str:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(memory_format=torch.channels_last)
    if what == "scalar":
        model.register_parameter("gain", nn.Parameter(torch.tensor(1.0)))
    try:
        prepared(model, {"name": "sgd"}, strategy="fsdp2")
    except ValueError as error:
        return str(error)
    return ""


def test_what_cannot_be_cut_is_named(three: Ranks) -> None:
    assert "gain is a scalar" in three(refused, "scalar")[0]
    assert three(refused, "nothing")[0] == ""


def rounded(rank: int, compression: str) -> list[Tensor]:
    made = prepared(odd(torch.float32), {"name": "sgd"}, torch.float32, strategy="fsdp2", compression=compression)
    accumulate(made, 0, rank=rank, world=3, pieces=4)
    return [p.grad.full_tensor() for p in made.model.parameters() if p.grad is not None]


def test_compression_rounds_what_travels_and_no_sum_before(three: Ranks) -> None:
    exact = torch.cat([g.flatten() for g in three(rounded, "none")[0]])
    for compression, digits in (("bf16", 8), ("fp16", 11)):
        found = torch.cat([g.flatten() for g in three(rounded, compression)[0]])
        away = ((found - exact).norm() / exact.norm()).item()
        assert 2**-digits / 10 < away < 2**-digits, (compression, away)
