"""Every recipe in configs/ plans, and its plan is the one on file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigbatch.cli import main
from bigbatch.config import load_config
from bigbatch.plan import Plan, resolve

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.name != "base.yaml")
SIZES = {"digits": 1085, "fashion_mnist": 55_000, "imagenet": 1_281_167, "kjv": 36_099, "bert": 26_000_000}
WORLD = {"digits": 2, "fashion_mnist": 2, "imagenet": 256, "kjv": 2, "bert": 1024}
WITH_BATCH_NORM = [path for path in RECIPES if path.parent.name not in ("kjv", "bert")]
IDS = [str(p.relative_to(ROOT / "configs")) for p in RECIPES]


def plan_of(path: Path) -> Plan:
    kind = path.parent.name
    return resolve(load_config(path), world_size=WORLD[kind], dataset_size=SIZES[kind])


@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_plan_is_golden(path: Path) -> None:
    file = GOLDEN / path.parent.name / f"{path.stem}.json"
    text = plan_of(path).to_json() + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.exists(), f"no golden plan for {path.name}; write it with UPDATE_GOLDEN=1 and read it"
    assert json.loads(text) == json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("path", WITH_BATCH_NORM, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_batch_norm_span_fits_every_layout_of_verify(path: Path, world: int, accumulation: int) -> None:
    config = load_config(path)
    micro = config.batch.global_ // world // accumulation
    config = load_config(path, [f"batch.micro={micro}"])
    plan = resolve(config, world_size=world, dataset_size=SIZES[path.parent.name])
    assert (plan.accumulation, plan.bn_span) == (accumulation, config.norm.span)
    assert plan.bn_groups_fixed


@pytest.mark.parametrize("path", RECIPES, ids=IDS)
def test_header_has_command_and_receipt(path: Path) -> None:
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert f"configs/{path.parent.name}/{path.name}" in header, "the header gives the command"
    told = ("test accuracy", "validation loss", "Not run at this scale")
    assert any(words in header for words in told), "the header gives the metric, or says not run"


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name == "digits"], ids=lambda p: p.stem)
@pytest.mark.parametrize("duration", ["2ep", "600ex", "3st"])
def test_digits_recipes_can_be_shortened(path: Path, duration: str) -> None:
    config = load_config(path, [f"duration={duration}"])
    assert resolve(config, world_size=1, dataset_size=SIZES["digits"]).steps >= 1


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name == "imagenet"], ids=lambda p: p.stem)
def test_imagenet_recipes_take_their_first_steps(path: Path, tmp_path: Path) -> None:
    """At a batch of 32, as their headers say; on smaller images, so that two cores are quick."""
    overrides = ["batch.global=32", "run.stop_after=2st", "data.shape=[3, 64, 64]", "tracking.console=none"]
    assert main(["train", str(path), f"run.dir={tmp_path / 'run'}", *overrides]) == 0
    assert (tmp_path / "run" / "checkpoints" / "00000002" / "model.safetensors").exists()


def test_plan_verb_prints_goyal_quickly_without_torch() -> None:
    code = (
        "import sys; from bigbatch.cli import main;"
        "code = main(['plan', 'configs/imagenet/goyal2017_resnet50.yaml', '--world-size', '256', '--json']);"
        "heavy = {'torch', 'numpy', 'sklearn', 'accelerate', 'rich'} & set(sys.modules);"
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    plan = json.loads(done.stdout)
    assert (plan["global_batch"], plan["micro_batch"], plan["accumulation"]) == (8192, 32, 1)
    assert (plan["lr_peak"], plan["lr_base"], plan["lr_scale"]) == (pytest.approx(3.2), 0.1, 32)
    assert (plan["warmup_samples"], plan["warmup_steps"], plan["schedule"]["start"]) == (6_405_835, 782, 0.1)
