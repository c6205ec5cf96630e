"""The parallel section: what goes together, and what the plan says of it."""

from __future__ import annotations

from typing import Any

import pytest

from bigbatch.config import ConfigError, RunConfig, merge
from bigbatch.plan import Plan, resolve

BASE: dict[str, Any] = {
    "duration": "2ep",
    "batch": {"global": 64},
    "optim": {"name": "lars", "lr": 1.0, "weight_decay": 1e-4},
    "task": {"name": "classification", "model": "bigbatch/resnet_small"},
    "data": {"name": "digits"},
}


def planned(**sections: Any) -> Plan:
    return resolve(RunConfig.model_validate(merge(BASE, sections)), world_size=2, dataset_size=1085)


@pytest.mark.parametrize(
    ("parallel", "value"),
    [
        ({}, "ddp"),
        ({"strategy": "zero1"}, "zero1"),
        ({"strategy": "fsdp2"}, "fsdp2"),
        ({"strategy": "deepspeed"}, "deepspeed, ZeRO 1"),
        ({"strategy": "deepspeed", "zero_stage": 0}, "deepspeed, ZeRO 0"),
        ({"strategy": "deepspeed", "zero_stage": 2}, "deepspeed, ZeRO 2"),
    ],
)
def test_the_plan_names_the_strategy(parallel: dict[str, Any], value: str) -> None:
    chosen = {decision.what: decision for decision in planned(parallel=parallel).decisions}
    assert chosen["strategy"].value == value and "arXiv" in chosen["strategy"].source
    assert "compression" not in chosen


@pytest.mark.parametrize(
    ("parallel", "value"),
    [
        ({"compression": "bf16"}, "bf16"),
        ({"compression": "fp16", "strategy": "fsdp2"}, "fp16"),
        ({"compression": "powersgd", "powersgd_rank": 2}, "powersgd, rank 2"),
    ],
)
def test_the_plan_names_the_compression_and_warns_of_it(parallel: dict[str, Any], value: str) -> None:
    plan = planned(parallel=parallel)
    assert next(decision.value for decision in plan.decisions if decision.what == "compression") == value
    assert "compressed_exchange" in {warning.code for warning in plan.warnings}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"zero_stage": 1}}, r"parallel\.zero_stage = 1: .*strategy=deepspeed.*remove it"),
        ({"parallel": {"strategy": "deepspeed", "zero_stage": 3}}, r"parallel\.zero_stage = 3: .*fsdp2"),
        ({"parallel": {"strategy": "fsdp2", "compression": "powersgd"}}, r"compression = powersgd: fsdp2.*use bf16"),
        (
            {"parallel": {"strategy": "zero1"}, "optim": {"name": "lamb", "lr": 1.0, "prenormalize": True}},
            r"optim\.prenormalize = True: .*ddp or fsdp2",
        ),
        ({"parallel": {"powersgd_rank": 2}}, r"powersgd_rank = 2: .*remove it"),
        ({"parallel": {"compression": "powersgd"}, "precision": "fp16"}, r"compression = powersgd: .*loss scale"),
        ({"parallel": {"strategy": "deepspeed"}, "precision": "fp64"}, "precision = fp64: .*zero1 or fsdp2"),
        (
            {"parallel": {"strategy": "deepspeed"}, "clip": {"kind": "adaptive", "max": 0.01}},
            "clip.kind = adaptive: .*fsdp2",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(**sections)


def test_one_process_exchanges_nothing_and_is_not_told_otherwise() -> None:
    config = RunConfig.model_validate(merge(BASE, {"parallel": {"strategy": "fsdp2", "compression": "bf16"}}))
    plan = resolve(config, world_size=1, dataset_size=1085)
    chosen = {decision.what: decision.why for decision in plan.decisions}
    assert "one process holds everything" in chosen["strategy"] and "compression" not in chosen
    assert "compressed_exchange" not in {warning.code for warning in plan.warnings}
