"""verify tells a recipe that is the same run in every layout from one that is not, and finds planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import planted
from bigbatch.analysis import Layout, Trace, Verdict, verify
from bigbatch.cli import main
from bigbatch.config import ConfigError, RunConfig, merge

BASE: dict[str, Any] = {
    "duration": "4ep",
    "batch": {"global": 48},
    "optim": {"name": "lars", "lr": 1.0, "weight_decay": 5e-4, "trust_coefficient": 0.02},
    "warmup": {"kind": "gradual", "duration": "20%", "start": "base"},
    "clip": {"kind": "norm", "max": 1.0},
    "norm": {"kind": "batch", "span": 6},
    "task": {"name": "classification", "model": "bigbatch/resnet_small"},
    "data": {"name": "digits", "augment": {"shift": 1, "erase": 0.5}},
    "precision": "fp64",
}


def judge(
    layouts: str = "1x1,2x2", *, steps: int = 4, worker: Callable[..., Trace] | None = None, **sections: Any
) -> Verdict:
    return verify(
        RunConfig.model_validate(merge(BASE, sections)),
        layouts=[Layout.parse(text) for text in layouts.split(",")],
        steps=steps,
        dataset_size=1085,
        say=lambda text: None,
        **({"worker": worker} if worker else {}),  # type: ignore[arg-type]
    )


def last_of(verdict: Verdict) -> str:
    return [layout for layout in verdict.layouts if layout != "jolted"][-1]


def differing(verdict: Verdict) -> dict[str, str]:
    """What differs in the last layout, the earliest first, and where."""
    found = [f for f in verdict.findings if f.step and f.layout == last_of(verdict)]
    return {f.what: f"step {f.step}: {f.where}" for f in sorted(found, key=lambda f: f.step or 0)}


@pytest.mark.parametrize("span", [6, 24])
def test_the_same_run_in_every_layout(span: int) -> None:
    """24 is ghost batch norm in 1x1, plain in 1x2 and over two of four processes in 4x1."""
    layouts = "1x1,1x2,2x1,2x2,4x1" if span == 6 else "1x1,1x2,2x1,4x1"
    verdict = judge(layouts, norm={"span": span})
    assert verdict.same and not verdict.notes, verdict.text("")
    assert (verdict.steps, verdict.last_window) == (4, 17)
    worst = max(finding.difference for finding in verdict.findings)
    assert worst < 1e-11
    assert "the same run in all layouts" in verdict.text("recipe")


@pytest.mark.parametrize("strategy", ["zero1", "fsdp2"])
def test_the_same_run_whatever_a_process_holds(strategy: str) -> None:
    verdict = judge(steps=3, parallel={"strategy": strategy})
    assert verdict.same and not verdict.notes, verdict.text("")
    assert max(finding.difference for finding in verdict.findings) < 1e-12


@pytest.mark.cluster
def test_dropout_and_stochastic_depth_are_the_same_run_where_they_are_keyed() -> None:
    model = {"model": "timm/resnet10t", "options": {"drop_rate": 0.2, "drop_path_rate": 0.2}}
    data = {"name": "synthetic", "shape": [3, 16, 16], "classes": 3, "size": 1085}
    keyed = judge(steps=2, task=model, data=data, batch={"global": 24}, norm={"span": 2})
    assert keyed.same and not keyed.notes, keyed.text("")
    torchs = judge(steps=2, task={**model, "dropout": "torch"}, data=data, batch={"global": 24}, norm={"span": 2})
    assert not torchs.same and "task.dropout=keyed" in " ".join(torchs.notes)
    assert not {"sample ids", "inputs"} & differing(torchs).keys()


def test_batch_norm_over_the_micro_batch_is_told_with_the_span_to_set() -> None:
    verdict = judge("1x1,1x2,1x4", norm={"span": "micro"})
    assert not verdict.same and any("set norm.span=12" in note for note in verdict.notes)
    assert differing(verdict)["loss"].startswith("step 1:")
    assert judge("1x1,1x2,1x4", norm={"span": 12}).same


def test_without_batch_norm_the_micro_batch_is_no_matter() -> None:
    verdict = judge(norm={"kind": "group", "span": "micro", "groups": 2})
    assert verdict.same and not verdict.notes


@pytest.mark.parametrize(
    ("fault", "layouts", "first", "untouched"),
    [
        ("mean_of_means", "1x1,2x2", "loss", {"sample ids", "inputs", "learning rate", "ranks"}),
        ("seed_per_rank", "1x1,2x2", "sample ids", {"learning rate"}),
        ("augmentation_seed_per_rank", "1x1,2x2", "inputs", {"sample ids", "learning rate", "ranks"}),
        (
            "statistics_per_micro_batch", "1x1,1x2", "running statistics",
            {"sample ids", "inputs", "loss", "gradient norm", "parameters", "ranks"},
        ),
        ("skipped_sync", "1x1,2x1", "loss", {"sample ids", "inputs", "learning rate"}),
        ("sync_of_the_first", "1x1,2x4", "loss", {"sample ids", "inputs", "learning rate"}),
        ("no_zero_weight", "1x1,4x1", "loss", {"sample ids", "inputs", "learning rate", "ranks"}),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(fault: str, layouts: str, first: str, untouched: set[str]) -> None:
    verdict = judge(layouts, worker=getattr(planted, fault))
    found = differing(verdict)
    assert not verdict.same and next(iter(found)) == first, verdict.text(fault)
    assert not untouched & found.keys(), verdict.text(fault)
    assert not verdict.notes
    assert f"{last_of(verdict)}, {found[first].partition(':')[0]}: {first}: " in verdict.text("")


def test_processes_that_come_apart_are_named_with_the_step() -> None:
    found = differing(judge("1x1,2x1", worker=planted.skipped_sync_in_the_third_step))
    assert found["ranks"].startswith("step 3: rank 1 of 2 differs from the others in ")
    assert found["gradient norm"].startswith("step 3: ") and "most in" in found["parameters"]


def test_what_is_not_finite_is_not_shown_to_be_the_same() -> None:
    verdict = judge("1x1,1x2", optim={"lr": 1e200}, clip={"kind": "none", "max": None}, norm={"span": 6})
    assert not verdict.same and differing(verdict).keys() >= {"finite"}
    found = {f["what"]: f["difference"] for f in json.loads(verdict.to_json())["findings"] if f["layout"] == "1x2"}
    assert found["finite"] is None and found["sample ids"] == 0
    assert "NOT shown to be the same run" in verdict.text("")


def test_rounding_is_also_what_jolted_weights_do() -> None:
    """The layout is off by 1e-6 from the second step on; a jolt has done 2e-7 by then, or 2e-8."""
    sound = judge(worker=planted.as_chaotic_as_its_rounding)
    assert sound.layouts == ("1x1", "2x2", "jolted") and sound.same, sound.text("")
    assert "10 times what the jolted weights have made by then" in sound.text("")
    wrong = judge(worker=planted.more_chaotic_than_its_rounding)
    assert not wrong.same and differing(wrong).keys() == {"loss"}
    assert differing(wrong)["loss"].startswith("step 2: 1.000001 instead of 1; relative difference 1.0e-06")


def test_jolted_weights_are_off_in_their_last_digits() -> None:
    verdict = judge(steps=3, worker=planted.skipped_sync_in_the_third_step, layouts="1x1,2x1")
    assert verdict.layouts[-1] == "jolted"
    size = {f.what: f.difference for f in verdict.findings if f.layout == "jolted"}
    assert 1e-16 < size["parameters"] < 1e-12 and size["sample ids"] == size["inputs"] == 0


def test_in_float32_a_fault_is_told_from_rounding() -> None:
    sound, faulty = judge(precision="fp32"), judge(precision="fp32", worker=planted.mean_of_means)
    assert sound.same and sound.tolerance == 1e-3, sound.text("")
    assert not faulty.same and next(iter(differing(faulty))) == "loss"


def test_a_batch_that_grows_later_is_told() -> None:
    ramp = {"kind": "multistep", "by": "batch", "at": ["1ep", "2ep"], "factor": 0.5}
    early = judge("1x1,1x2", decay=ramp)
    assert early.same and any("--steps 25" in note for note in early.notes)
    late = judge("1x1,1x2", steps=25, decay=ramp)
    assert late.same and late.last_window == 96 // 3 + 1 and not any("1085 samples" in note for note in late.notes)


RECIPE = json.dumps(BASE)
# What a recipe says of the machines that it is for must not keep it from being verified on this one.
LARGE = ("parallel.expect_world_size=512", "batch.micro=12", "norm.span=24", "debug=true", "norm.kind=batch")


def command(tmp_path: Path, *arguments: str) -> int:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return main(["verify", str(path), "run.dir=never", *arguments])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "precision=bf16") == 2
    assert "precision=fp64 or fp32" in capsys.readouterr().err
    assert command(tmp_path, "--layouts", "1x1,2x1", "--steps", "2", "--json", *LARGE) == 0
    said = capsys.readouterr()
    verdict = json.loads(said.out)
    assert verdict["same"] and verdict["layouts"] == ["1x1", "2x1"] and verdict["steps"] == 2
    assert "2x1: 2 steps in" in said.err
    assert command(tmp_path, "--layouts", "1x1,1x2", "--steps", "2", "norm.span=micro") == 1
    said = capsys.readouterr()
    assert "DIFFERS" in said.out and "NOT shown to be the same run" in said.out and "set norm.span=24" in said.out
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "2"], "'2' is no layout"),
        (["--layouts", "1x0"], "'1x0' is no layout"),
        (["--layouts", "1x1,5x1"], "batch.global = 48 does not divide by 5x1; give layouts whose products divide it"),
        (["--layouts", "1x1,1x1"], "nothing to compare"),
        (["--steps", "1"], "--steps = 1"),
        (["--layouts", "1x1,4x2", "norm.span=16"], "nearest legal"),
        (["task.model=timm/no_such"], "task.model"),
    ],
)
def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert command(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_not_under_a_launcher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(tmp_path) == 2
    assert "starts its own processes" in capsys.readouterr().err


def test_a_layout_is_positive() -> None:
    assert str(Layout.parse(" 12x3 ")) == "12x3"
    with pytest.raises(ConfigError):
        Layout.parse("0x1")
