"""Wrong input: exit code 2, one message with key, value and way out, no traceback, no run directory."""

import gzip
from pathlib import Path

import pytest

from bigbatch.cli import main
from runs.command import bigbatch

RECIPE = """
duration: 2ep
batch: {global: 64}
optim: {name: sgd, lr: 0.1}
task: {name: classification, model: bigbatch/resnet_small}
data: {name: digits}
"""

CASES = {
    "unknown key": (["batch.globl=3"], ["batch.globl", "3", "schema"]),
    "wrong type": (["batch.global=many"], ["batch.global", "many", "integer"]),
    "unknown optimiser": (["optim.name=lion"], ["optim.name", "lion", "'lars'"]),
    "rate is no number": (["optim.lr=fast"], ["optim.lr", "fast", "number"]),
    "micro does not divide": (["batch.micro=48"], ["batch.micro", "48", "batch.micro=64"]),
    "warmup as long as the run": (["warmup={kind: gradual, duration: 2ep}"], ["warmup.duration", "2ep", "shorten"]),
    "span cannot be met": (["norm.span=48"], ["norm.span", "48", "nearest legal: 64"]),
    "span beyond the processes": (["norm.span=128"], ["norm.span", "128", "nearest legal: 64"]),
    "duration without unit": (["duration=5"], ["duration", "5", "10ep"]),
    "world size": (["parallel.expect_world_size=8"], ["parallel.expect_world_size", "8", "1"]),
    "clip without max": (["clip.kind=norm"], ["clip.max", "norm"]),
    "scaling without base": (["scaling.rule=linear"], ["scaling.base_batch", "linear"]),
    "decay past the end": (["decay={kind: multistep, at: [3ep]}"], ["decay.at", "3ep", "shorter"]),
    "bare word": (["duration"], ["duration", "key.path=value"]),
    "no such folder": (["data={name: idx, path: /nonexistent}"], ["data.path", "/nonexistent", "download"]),
    "unknown model": (["task.model=timm/resnet_18"], ["task.model", "timm/resnet_18", "resnet18"]),
    "model of nobody": (["task.model=resnet18"], ["task.model", "resnet18", "timm/"]),
    "weights from a file": (
        ["task.options={checkpoint_path: a.pth}"],
        ["task.options.checkpoint_path", "task.weights"],
    ),
    "weights from a hub": (
        ["task={model: timm/test_resnet, weights: pretrained, options: {pretrained_cfg: {hf_hub_id: a/b}}}"],
        ["task.options.pretrained_cfg", "task.weights"],
    ),
    "a new head without weights": (["task.head=replace"], ["task.head", "task.weights"]),
    "a hub's revision of files": (
        ["data={name: text, train: a.txt, hub_revision: main}"],
        ["data.hub_revision", "main", "data.hub"],
    ),
    "unknown model option": (["task.options={depth: 3}"], ["task.options", "depth"]),
    "rule that matches nothing": (
        ["optim.groups=[{match: nonsense}, {match: rest}]"],
        ["optim.groups", "nonsense"],
    ),
    "parameters nobody claims": (["optim.groups=[{match: stages}]"], ["optim.groups", "rest"]),
    "nesterov without momentum": (
        ["optim={name: sgd, lr: 0.1, momentum: 0, nesterov: true}"],
        ["optim.nesterov", "momentum"],
    ),
    "correction outside": (
        ["optim={name: lars, lr: 1, lr_placement: outside, momentum_correction: true}"],
        ["optim.momentum_correction", "inside"],
    ),
    "span without batch norm": (
        ["task.model=timm/vit_tiny_patch16_224", "task.options={img_size: 8, patch_size: 4}", "norm.span=64"],
        ["norm.span", "64"],
    ),
    "shift out of the frame": (["data.augment.shift=8"], ["data.augment.shift", "8"]),
    "class weights of other classes": (["task.class_weights=[1, 2]"], ["task.class_weights", "2 weights", "10"]),
    "run directory in a file": (["run.dir=/dev/null/run"], ["run.dir", "/dev/null/run", "another directory"]),
    "batch norm over other rows": (
        ["task.model=timm/levit_128s", "data={name: synthetic, shape: [3, 224, 224]}", "batch.global=4"],
        ["norm.kind", "norm.kind=group"],
    ),
    "no such metric": (["checkpoint.best=acuracy"], ["checkpoint.best", "acuracy", "accuracy"]),
    "impossible name": (['run.dir="a\\0b"'], ["run.dir", "a"]),
    "wrong size": (["data.size=1000"], ["data.size", "1000"]),
    "groups do not divide": (["norm={kind: group, groups: 5}"], ["norm.groups", "5"]),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def refuse(arguments: list[str], words: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", f"{arguments[0]}", f"run.dir={run}", "tracking.console=none", *arguments[1:]])
    message = capsys.readouterr().err
    assert code == 2
    assert message.count("\n") == 1, message
    assert all(word in message for word in words), message
    assert not run.exists()


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, words = CASES[case]
    refuse([str(recipe), *overrides], words, tmp_path / "run", capsys)


def test_missing_and_empty_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse([str(tmp_path / "no.yaml")], ["no.yaml", "no such recipe"], tmp_path / "run", capsys)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    refuse([str(tmp_path / "empty.yaml")], ["empty.yaml", "empty"], tmp_path / "run", capsys)


def test_wrong_dataset_shape(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "idx"
    folder.mkdir()
    for part, count in (("train", 6000), ("t10k", 10)):
        images = bytes([0, 0, 8, 2, *count.to_bytes(4, "big"), 0, 0, 0, 9]) + bytes(count * 9)
        labels = bytes([0, 0, 8, 1, *count.to_bytes(4, "big")]) + bytes(i % 10 for i in range(count))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, 1))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 1))
    words = ["train-images-idx3-ubyte.gz", "2", "3"]
    refuse([str(recipe), f"data={{name: idx, path: {folder}}}"], words, tmp_path / "run", capsys)


def test_another_run_in_the_directory(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(recipe), f"run.dir={tmp_path / 'run'}", "tracking.console=none"]
    assert main([*arguments, "run.stop_after=3st"]) == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    assert main([*arguments, "optim.lr=0.2"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("optim.lr", "0.2", "0.1", "run.dir"))
    assert (tmp_path / "run" / "config.yaml").read_text() == before


@pytest.mark.parametrize("path", ["nowhere", ".", "run/checkpoints/00000099"])
def test_evaluate_of_what_is_no_run(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path / path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluate_takes_nothing_that_it_sets_itself(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(recipe), f"run.dir={run}", "run.stop_after=1st"]) == 0
    assert main(["evaluate", str(run), "parallel.strategy=fsdp2"]) == 2
    assert "parallel.strategy: evaluate sets it itself" in capsys.readouterr().err


def test_evaluate_another_model(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", str(recipe), f"run.dir={run}", "tracking.console=none", "run.stop_after=1st"]) == 0
    assert main(["evaluate", str(run), "--split", "test", "task.options={widths: [4]}"]) == 2
    assert "another model" in capsys.readouterr().err


def test_overrides_stand_before_and_after_options(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "seed=3", "--json", "batch.global=128"]) == 0
    assert '"global_batch": 128' in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(recipe), "--jsn"])


def test_under_torchrun_rank_0_alone_speaks(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = bigbatch("train", str(recipe), "batch.micro=48", f"run.dir={run}", processes=2)
    assert done.returncode == 1  # torchrun turns any code of a worker into 1
    assert done.stderr.count("batch.micro = 48") == 1
    assert "exitcode  : 2" in done.stderr
    assert "File " not in done.stderr.split("batch.micro = 48")[0]
    assert not run.exists()
