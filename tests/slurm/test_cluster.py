"""Jobs on a SLURM cluster: time limits, preemption and lost nodes change nothing about the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm.cluster import ROOT, Cluster, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(why_not()), reason=why_not())]

RECIPE = "configs/digits/lars_512.yaml"
# A save sums running statistics over processes, and so rounds them: to be the same bit by bit, save at the same steps.
OVERRIDES = ("duration=30ep", "checkpoint.every=1st", "eval.every=20ep", "tracking.console=none", "parallel.timeout=60")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, Any]:
    """The summary of a run on two nodes to which nothing happens."""
    job, run = submit(cluster, "undisturbed", "--nodes=2", "slurm/train.sbatch", RECIPE, *OVERRIDES)
    assert cluster.end(job)["JobState"] == "COMPLETED"
    summary = finished(run)
    assert summary["world_size"] == 2
    return summary


def submit(cluster: Cluster, name: str, *words: str, **variables: str) -> tuple[str, Path]:
    run = cluster.directory / name
    options = ["--parsable", f"--job-name={name}", f"--output={cluster.directory}/%x-%j.out"]
    return cluster.lab("in", "sbatch", *options, *words, f"run.dir={run}", **variables), run


def finished(run: Path) -> dict[str, Any]:
    steps = [event["step"] for event in events(run) if event["event"] == "step"]
    summary = json.loads((run / "summary.json").read_text())
    assert steps == list(range(1, summary["steps"] + 1))
    return summary  # type: ignore[no-any-return]


def events(run: Path) -> list[dict[str, Any]]:
    """What has been written so far; a line may be half there."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def reach(cluster: Cluster, run: Path, step: int) -> None:
    cluster.until(lambda: any(event.get("step", 0) >= step for event in events(run)))


def resumed(run: Path) -> list[int]:
    return [event["step"] for event in events(run) if event["event"] == "resume"]


def test_two_nodes(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["metrics"]["accuracy"] > 0.9


def test_srun_alone_is_launcher_enough(cluster: Cluster) -> None:
    run = cluster.directory / "alone"
    train = ["python", "-m", "bigbatch", "train", RECIPE, "duration=2ep", f"run.dir={run}", "tracking.console=none"]
    cluster.lab("in", "srun", "--nodes=2", "--ntasks=2", *train)
    assert finished(run)["world_size"] == 2


def test_a_job_near_its_time_limit_saves_and_goes_on(cluster: Cluster, undisturbed: dict[str, Any]) -> None:
    job, run = submit(cluster, "limit", "--nodes=2", "--time=10", "slurm/train.sbatch", RECIPE, *OVERRIDES)
    reach(cluster, run, 3)
    # What SLURM does by --signal=B:USR1@120.
    cluster.lab("in", "scancel", "--batch", "--signal=USR1", job)
    ended = cluster.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert len(resumed(run)) == 1
    assert finished(run)["parameters_sha256"] == undisturbed["parameters_sha256"]


def test_a_job_that_loses_a_node_goes_on_on_another(cluster: Cluster, undisturbed: dict[str, Any]) -> None:
    """One task a process, without torchrun, in the script that ``bigbatch slurm`` writes."""
    script, run = cluster.directory / "lost.sbatch", cluster.directory / "lost"
    options = ["--nodes=2", f"--sbatch=output={cluster.directory}/%x-%j.out", "--output", str(script)]
    cluster.lab("in", "python", "-m", "bigbatch", "slurm", RECIPE, *OVERRIDES, *options)
    job = cluster.lab("in", "sbatch", "--parsable", str(script), f"run.dir={run}", LAUNCHER="srun")
    reach(cluster, run, 12)
    cluster.lab("off", "n2")
    # slurmctld would find out by itself, in half a minute.
    cluster.lab("in", "scontrol", "update", "nodename=n2", "state=down", "reason=off")
    ended = cluster.end(job)
    assert (ended["JobState"], ended["Restarts"], ended["NodeList"]) == ("COMPLETED", "1", "n[1,3]")
    assert len(resumed(run)) == 1
    assert finished(run)["parameters_sha256"] == undisturbed["parameters_sha256"]


def test_an_array_trains_a_run_for_each_line(cluster: Cluster) -> None:
    """The last of four tasks, whose id is the whole array's, is preempted in the way of a partition's GraceTime."""
    (cluster.directory / "slurm").symlink_to(ROOT / "slurm")
    lines = cluster.directory / "lines"
    lines.write_text(
        "".join(f"seed={seed} duration={epochs}ep\n" for seed, epochs in ((1, 2), (2, 2), (3, 2), (4, 20)))
    )
    options = ["--array=1-4", f"--chdir={cluster.directory}", f"--output={cluster.directory}/%x-%a.out"]
    command = ["slurm/array.sbatch", str(ROOT / RECIPE), "lines", *OVERRIDES[1:]]
    array = cluster.lab("in", "sbatch", "--parsable", *options, *command, LAUNCHER="srun")
    runs = [cluster.directory / f"runs/sweep-{array}_{task}" for task in range(1, 5)]
    reach(cluster, runs[3], 3)
    cluster.lab("in", "scancel", "--signal=TERM", f"{array}_4")
    ended = [cluster.end(f"{array}_{task}") for task in range(1, 5)]
    assert [(job["JobState"], job["Restarts"]) for job in ended] == [("COMPLETED", "0")] * 3 + [("COMPLETED", "1")]
    assert len({finished(run)["parameters_sha256"] for run in runs}) == 4
    assert [len(resumed(run)) for run in runs] == [0, 0, 0, 1]
    assert [yaml.safe_load((run / "config.yaml").read_text())["seed"] for run in runs] == [1, 2, 3, 4]
