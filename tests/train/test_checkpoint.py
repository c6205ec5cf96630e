import errno
from pathlib import Path
from typing import Literal

import pytest
import torch

from bigbatch.train import RunError
from bigbatch.train.checkpoint import Checkpoints
from bigbatch.train.saved import open_checkpoint, sha256


def saved(
    root: Path, scores: dict[int, float | None], *, keep: int = 2, best_is: Literal["max", "min"] = "max"
) -> list[int]:
    """The steps left after saving one checkpoint a score."""
    checkpoints = Checkpoints(root, keep=keep, best="accuracy", best_is=best_is)
    for step, score in scores.items():
        metrics = None if score is None else {"accuracy": score}
        checkpoints.save(step, model={"w": torch.zeros(2)}, optimizer={}, state={"metrics": metrics})
    return sorted(int(path.name) for path in root.iterdir())


@pytest.mark.parametrize(
    ("scores", "left"),
    [
        ({1: 0.2, 2: 0.9, 3: 0.4, 4: 0.5, 5: 0.6}, [2, 4, 5]),
        ({1: 0.2, 2: 0.3, 3: 0.4, 4: 0.5}, [3, 4]),
        ({1: 0.9, 2: None, 3: None, 4: None}, [1, 3, 4]),
        ({1: None, 2: None, 3: None}, [2, 3]),
        ({1: float("nan"), 2: 0.1, 3: 0.0, 4: 0.0}, [2, 3, 4]),
    ],
)
def test_keeps_the_newest_and_the_best(tmp_path: Path, scores: dict[int, float | None], left: list[int]) -> None:
    assert saved(tmp_path, scores) == left


def test_the_best_can_be_the_least(tmp_path: Path) -> None:
    assert saved(tmp_path, {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.3}, keep=1, best_is="min") == [2, 4]


def test_the_newest_is_the_greatest_number(tmp_path: Path) -> None:
    assert saved(tmp_path, {99_999_999: 0.1, 100_000_000: 0.1}) == [99_999_999, 100_000_000]
    newest, damage = Checkpoints(tmp_path, keep=2, best="accuracy", best_is="max").newest()
    assert newest is not None and newest.path.name == "100000000" and damage == []


def test_tied_and_neighbouring_weights_keep_all_their_names(tmp_path: Path) -> None:
    buffer = torch.arange(12.0)
    model = {"a": buffer[:6].view(2, 3), "b": buffer[6:], "tied": buffer[:6].view(2, 3), "t": buffer[:6].view(2, 3).t()}
    checkpoints = Checkpoints(tmp_path, keep=1, best="accuracy", best_is="max")
    found = open_checkpoint(checkpoints.save(1, model=model, optimizer={}, state={})).model()
    assert found.keys() == model.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.items())


def test_the_best_is_not_chosen_by_a_damaged_state(tmp_path: Path) -> None:
    saved(tmp_path, {1: 0.5, 2: 0.4}, keep=3)
    state = tmp_path / "00000002" / "state.json"
    state.write_text(state.read_text().replace("0.4", "0.9"))
    assert saved(tmp_path, {3: 0.1}, keep=1) == [1, 3]


def test_what_a_killed_process_left_is_swept_by_the_next_save(tmp_path: Path) -> None:
    saved(tmp_path, {1: 0.5})
    for name in (".00000002.part", ".00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert saved(tmp_path, {2: 0.5}) == [1, 2]


def test_a_checkpoint_is_whole_or_not_there_while_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, {1: None, 2: None})
    checkpoints = Checkpoints(tmp_path, keep=1, best="accuracy", best_is="max")

    def killed(path: Path, **_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        checkpoints.save(3, model={}, optimizer={}, state={})
    assert checkpoints.wait() is None and [path.name for path in checkpoints.paths()] == ["00000003"]
    newest, damage = checkpoints.newest()
    assert newest is not None and newest.path.name == "00000003" and damage == []


def test_checkpoints_of_an_owner_who_had_lost_the_run_are_named_and_skipped(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=9, best="accuracy", best_is="max")
    for step, owner in ((5, 1), (6, 2), (7, 1)):
        checkpoints.save(step, model={}, optimizer={}, state={"owner": owner})
    newest, damage = checkpoints.newest(valid=lambda step, owner: owner == 2 or step <= 5)
    assert newest is not None and newest.path.name == "00000006"
    assert len(damage) == 1 and "00000007" in damage[0] and "owner 1" in damage[0]
    newest, ousted = checkpoints.newest(valid=lambda step, owner: False)
    assert newest is None and len(ousted) == 3, "the run began afresh, so it does again"
    checkpoints.set_aside(newest)
    assert checkpoints.paths() == [] and len(list(tmp_path.iterdir())) == 3


def test_what_lies_after_the_newest_save_costs_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    assert saved(tmp_path, {9: 0.9}) == [9]
    assert saved(tmp_path, {1: 0.5, 2: 0.1}, keep=1) == [1, 2, 9]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    assert saved(tmp_path, {1: None}) == saved(tmp_path, {1: 0.5}) == [1]
    assert open_checkpoint(tmp_path / "00000001").state["metrics"] == {"accuracy": 0.5}


def test_a_directory_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "file", keep=1, best="accuracy", best_is="max")
    assert checkpoints.newest() == (None, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        checkpoints.newest()


def renames_fail(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Renaming from a name that ends so fails."""
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name.endswith(kinds):
            raise OSError(errno.EBUSY, "busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)


def test_what_cannot_be_deleted_costs_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, {1: None})
    for name in (".00000002.part", ".00000002.0.part", ".00000001.old"):
        (tmp_path / name).mkdir()
    checkpoints = Checkpoints(tmp_path, keep=1, best="accuracy", best_is="max")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        renames_fail(patch, "00000001")
        for step in (2, 2, 2):
            checkpoints.save(step, model={}, optimizer={}, state={})
            assert checkpoints.wait() is None
    assert [path.name for path in checkpoints.paths()] == ["00000001", "00000002"]
    assert [event.get("code") for event in checkpoints.events] == ["checkpoint_kept", None] * 3
    assert saved(tmp_path, {3: None}, keep=1) == [3]


@pytest.mark.parametrize("killed", [False, True])
def test_a_step_that_is_being_replaced_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    saved(tmp_path, {5: 0.5})
    checkpoints = Checkpoints(tmp_path, keep=1, best="accuracy", best_is="max")
    with monkeypatch.context() as patch:
        renames_fail(patch, *[".part", ".replaced"][: 1 + killed])  # a killed process does not rename back
        checkpoints.save(5, model={}, optimizer={}, state={})
        assert isinstance(checkpoints.wait(), RunError)
    assert [path.name for path in checkpoints.paths()] == [".00000005.replaced" if killed else "00000005"]
    checkpoints.save(4, model={}, optimizer={}, state={})  # which sweeps
    assert checkpoints.wait() is None
    newest, damage = checkpoints.newest()
    assert newest is not None and newest.state["metrics"] == {"accuracy": 0.5} and damage == []
    checkpoints.set_aside(newest)
    assert saved(tmp_path, {5: 0.6}, keep=1) == [5]


def test_an_owner_who_lost_the_run_deletes_nothing_of_the_next(tmp_path: Path) -> None:
    def lost() -> None:
        raise RunError("taken over")

    old, new, stale = (tmp_path / f".00000003.{owner}.1.part" for owner in (1, 3, 2))
    for part in (old, new, stale):
        part.mkdir()
    checkpoints = Checkpoints(tmp_path, keep=1, best="accuracy", best_is="max", check=lost)
    checkpoints.save(3, model={}, optimizer={}, state={"owner": 2})
    assert checkpoints.wait() and old.exists() and new.exists() and stale.exists()
    checkpoints = Checkpoints(tmp_path, keep=1, best="accuracy", best_is="max")
    checkpoints.save(3, model={}, optimizer={}, state={"owner": 2})
    assert checkpoints.wait() is None and new.exists() and not old.exists() and not stale.exists()


@pytest.mark.parametrize(
    ("error", "passes"),
    [(MemoryError(), True)]
    + [(OSError(getattr(errno, name), name), True) for name in ("EMFILE", "ENOMEM", "ESTALE", "ETIMEDOUT", "EACCES")]
    + [(OSError(getattr(errno, name), name), False) for name in ("ENOENT", "EIO", "EISDIR")],
)
def test_an_error_that_may_pass_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, passes: bool
) -> None:
    saved(tmp_path, {1: None, 2: None})

    def reads(path: Path) -> str:
        if path.parent.name == "00000002":
            raise error
        return sha256(path)

    monkeypatch.setattr("bigbatch.train.saved.sha256", reads)
    checkpoints = Checkpoints(tmp_path, keep=2, best="accuracy", best_is="max")
    if passes:
        with pytest.raises(RunError, match=r"00000002 cannot be read now: .*; run again"):
            checkpoints.newest()
    else:
        newest, damage = checkpoints.newest()
        assert newest is not None and newest.path.name == "00000001" and len(damage) == 1
