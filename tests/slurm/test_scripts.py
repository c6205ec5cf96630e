"""What the batch scripts make of the way a step ends. SLURM's commands are stubs here; training is what srun's does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STUBS = {
    "python": 'eval "${PLANNING:-}"\nexit "${PLAN:-0}"',
    "squeue": 'date --date "${LEFT:-1 hour}" +%FT%T',
    "sleep": "exec /bin/sleep 0.05",
    "scontrol": 'if [ "$1" = show ]; then echo n1; echo n2; else echo "$*" >>requeued; fi',
    "srun": 'printf "%s " "$@" | tr "\\n" " " >>started; echo >>started\nexport try=$(wc -l <started)\n. ./step',
}

DONE = "mkdir -p $run; touch $run/summary.json"
UNTIL_TOLD = "while :; do sleep; done"
STARTS_SLOWLY = """# Until it sets a handler it ignores what it was started to ignore, as srun does.
import os, pathlib, signal, time
def save(*_):
    run = pathlib.Path(os.environ["run"])
    run.mkdir(parents=True)
    (run / "preempted.json").touch()
    os._exit(0)
pathlib.Path("started").write_text("once")
os.kill(int(os.environ["SCRIPT"]), signal.SIGUSR1)
time.sleep(0.5)
signal.signal(signal.SIGUSR1, save)
time.sleep(30)
"""
HANGS = "trap '' USR1; kill -USR1 $PPID; exec /bin/sleep 60"


@dataclass(frozen=True)
class Ended:
    code: int
    requeued: list[str]
    started: list[str]
    output: str


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        stub = tmp_path / "bin" / name
        # srun heeds signals that it was started to ignore, as soon as it runs, and no shell does.
        default = " --default-signal=USR1" if name == "srun" else ""
        stub.write_text(f"#!/usr/bin/env -S{default} bash\n{body}\n")
        stub.chmod(0o755)
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    return tmp_path


def submit(where: Path, *args: str, step: str = DONE, script: str = "train", **variables: str) -> Ended:
    (where / "step").write_text(step)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WANDB_"))}
    env |= {
        "PATH": f"{where / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "job",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "run": "runs/job-7",
    }
    done = subprocess.run(
        ["bash", "-c", 'SCRIPT=$$ exec bash "$@"', "sbatch", f"slurm/{script}.sbatch", *args],
        cwd=where,
        env=env | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return Ended(done.returncode, lines(where / "requeued"), lines(where / "started"), done.stdout)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("step", "code", "starts", "requeued"),
    [
        (DONE, 0, 1, False),
        ("exit 0", 1, 1, False),
        ("exit 2", 2, 1, False),
        ("exit 75", 0, 1, True),
        ("mkdir -p $run; touch $run/preempted.json", 0, 1, True),
        # A failure is tried again once where nothing was saved since, and twice (MAX_RESTARTS) where there was.
        ("exit 1", 1, 2, False),
        (f"[ $try = 2 ] || exit 1; {DONE}", 0, 2, False),
        ("mkdir -p $run/checkpoints/0000000$try; exit 3", 3, 3, False),
        ("mkdir -p $run/checkpoints/00000005.part-$try; exit 3", 3, 2, False),
        # A rank that died while the others say they were preempted is a failure.
        ("mkdir -p $run; touch $run/preempted.json; exit 1", 1, 2, False),
        # The time limit.
        (f"trap 'mkdir -p $run; touch $run/preempted.json; exit' USR1; kill -USR1 $PPID; {UNTIL_TOLD}", 0, 1, True),
        (f"trap 'mkdir -p $run/checkpoints/01; exit 1' USR1; kill -USR1 $PPID; {UNTIL_TOLD}", 0, 1, True),
        (f"trap 'exit 1' USR1; kill -USR1 $PPID; {UNTIL_TOLD}", 1, 1, False),
        # What an earlier step of the job has saved is progress, too.
        (
            "[ $try = 2 ] || { mkdir -p $run/checkpoints/01; exit 1; }; "
            f"trap 'exit 1' USR1; kill -USR1 $PPID; {UNTIL_TOLD}",
            0,
            2,
            True,
        ),
        # scancel.
        (f"trap 'mkdir -p $run; touch $run/preempted.json; exit' USR1; kill -TERM $PPID; {UNTIL_TOLD}", 143, 1, False),
    ],
)
def test_a_job_is_queued_again_only_where_it_will_go_on(
    step: str, code: int, starts: int, requeued: bool, cluster: Path
) -> None:
    ended = submit(cluster, "recipe.yaml", step=step, MAX_RESTARTS="2")
    assert (ended.code, len(ended.started)) == (code, starts), ended.output
    assert ended.requeued == (["requeue 7"] if requeued else [])


@pytest.mark.parametrize(("saved", "requeued"), [("mkdir -p $run/checkpoints/01; ", ["requeue 7"]), ("", [])])
def test_a_step_that_does_not_hear_is_killed_before_the_limit(saved: str, requeued: list[str], cluster: Path) -> None:
    ended = submit(cluster, "recipe.yaml", step=saved + HANGS, LEFT="21 seconds")
    assert (ended.code, ended.requeued) == (0 if requeued else 137, requeued), ended.output


def test_an_srun_that_is_starting_does_not_die_of_the_signal(cluster: Path) -> None:
    (cluster / "bin" / "srun").write_text(f"#!{sys.executable}\n{STARTS_SLOWLY}")
    ended = submit(cluster, "recipe.yaml")
    assert (ended.code, ended.requeued, len(ended.started)) == (0, ["requeue 7"], 1), ended.output


@pytest.mark.parametrize(("name", "code", "requeued"), [("USR1", 0, ["requeue 7"]), ("TERM", 143, [])])
def test_a_signal_before_training(name: str, code: int, requeued: list[str], cluster: Path) -> None:
    ended = submit(cluster, "recipe.yaml", PLANNING=f"kill -{name} $SCRIPT")
    assert (ended.code, ended.requeued, ended.started) == (code, requeued, []), ended.output


def test_a_run_that_is_to_stop_early_is_done_without_a_summary(cluster: Path) -> None:
    ended = submit(cluster, "recipe.yaml", step="exit 0", PLANNING='echo \'{"why": "run.stop_after 5ep"}\'')
    assert (ended.code, ended.requeued) == (0, [])
    assert "summary.json" in submit(cluster, "recipe.yaml", step="exit 0").output


@pytest.mark.parametrize(("note", "requeued"), [("preempted", ["requeue 7"]), ("summary", [])])
def test_notes_that_are_seen_only_once_their_directory_is_listed(note: str, requeued: list[str], cluster: Path) -> None:
    ls = cluster / "bin" / "ls"
    ls.write_text('#!/bin/bash\ncd "$1" && for note in .hidden-*; do mv $note ${note#.hidden-}; done\n')
    ls.chmod(0o755)
    ended = submit(cluster, "recipe.yaml", step=f"mkdir -p $run; touch $run/.hidden-{note}.json")
    assert (ended.code, ended.requeued) == (0, requeued), ended.output


def test_a_stale_note_of_a_preemption_counts_for_nothing(cluster: Path) -> None:
    (cluster / "mine").mkdir()
    (cluster / "mine" / "preempted.json").touch()
    assert submit(cluster, "recipe.yaml", "run.dir=mine").requeued == []


def test_a_bad_plan_is_refused_before_anything_starts(cluster: Path) -> None:
    for code in (2, 1):
        ended = submit(cluster, "recipe.yaml", PLAN=str(code))
        assert (ended.code, ended.started) == (code, [])


def test_the_run_directory_is_the_jobs_own(cluster: Path) -> None:
    ended = submit(cluster, "recipe.yaml", "seed=3")
    assert ended.started[0].endswith(" train recipe.yaml seed=3 run.dir=runs/job-7 ")
    assert (cluster / "runs" / "job-7").is_dir()
    # Of another cluster's job 7; but the job's own where it was queued again.
    assert submit(cluster, "recipe.yaml").code == 2
    assert submit(cluster, "recipe.yaml", SLURM_RESTART_COUNT="1").code == 0


def test_one_task_of_an_array_is_queued_again(cluster: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    (cluster / "lines").write_text("optim.lr=0.4\nseed=1 'warmup={kind: gradual, duration: 5%}' \"a=$(id)\"\n")
    ended = submit(cluster, "recipe.yaml", "lines", "precision=bf16", script="array", step="exit 75", **array)
    assert ended.requeued == ["requeue 7_2"], ended.output
    told = "train recipe.yaml seed=1 warmup={kind: gradual, duration: 5%} a=$(id) precision=bf16 run.dir=runs/job-7_2 "
    assert ended.started[0].endswith(told)


@pytest.mark.parametrize(
    ("script", "args", "variables", "words"),
    [
        ("train", ["recipe.yaml"], {"LAUNCHER": "mpirun"}, ["LAUNCHER", "mpirun", "torchrun or srun"]),
        ("train", ["recipe.yaml"], {"MAX_RESTARTS": "-1"}, ["MAX_RESTARTS = -1", "0 or more"]),
        ("train", ["recipe.yaml", "run={dir: x}"], {}, ["run={dir: x}", "run.dir=DIRECTORY"]),
        ("train", ["recipe.yaml", "run.dir='x'"], {}, ["run.dir='x'", "quotes"]),
        ("train", ["recipe.yaml", 'run.dir="x"'], {}, ['run.dir="x"', "quotes"]),
        ("train", ["recipe.yaml", "run.dir=x # y"], {}, ["run.dir=x # y", "without #"]),
        ("train", ["recipe.yaml", "run.dir= x"], {}, ["run.dir= x", "blanks"]),
        ("train", ["recipe.yaml", "run.dir=x\t"], {}, ["run.dir=x\t", "blanks"]),
        ("array", ["recipe.yaml", "lines"], {"SLURM_ARRAY_TASK_ID": "4"}, ["line 4", "--array=1-3"]),
        ("array", ["recipe.yaml", "lines"], {"SLURM_ARRAY_TASK_ID": "3"}, ["line 3", "quotes do not match"]),
        ("array", ["recipe.yaml", "lines", "run.dir=x"], {"SLURM_ARRAY_TASK_ID": "1"}, ["run.dir"]),
        ("array", ["recipe.yaml"], {}, ["usage", "--array"]),
    ],
)
def test_refused(script: str, args: list[str], variables: dict[str, str], words: list[str], cluster: Path) -> None:
    (cluster / "lines").write_text("seed=1\nseed=2\nseed=3 'warmup={kind: none} optim.lr=1\n")
    ended = submit(cluster, *args, script=script, **variables)
    assert (ended.code, ended.started) == (2, [])
    assert all(word in ended.output for word in words)
