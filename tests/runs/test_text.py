"""Whole runs on text: the same in every layout, gone on with after a stop, and not with another text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigbatch.analysis import Layout, verify
from bigbatch.cli import main
from bigbatch.config import RunConfig
from bigbatch.data import size_of

WORDS = ["light", "earth", "water", "heaven", "day", "night", "god", "man"]
MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    lines = (f"and the {a} was {b}, and the {b} was not {a}." for a in WORDS for b in WORDS)
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return {
        "duration": "6st",
        "batch": {"global": 8},
        "optim": {"name": "lamb", "lr": 0.01},
        "task": {"name": "masked_lm", "model": "transformers/bert", "options": {**MODEL, **dropout}},
        "data": {
            "name": "text", "train": str(tmp_path / "text.txt"), "validation": 0.2, "test": 0.2, "length": 16,
            "tokenizer": {"vocabulary": 80}, "mask": {"whole_word": True}, "cache": str(tmp_path),
        },
        "run": {"dir": str(tmp_path / "run")},
        "tracking": {"console": "none"},
        "checkpoint": {"every": "2st", "best": "loss", "best_is": "min", "keep": 9},
        "precision": "fp64",
    }  # fmt: skip


@pytest.mark.parametrize("objective", ["masked_lm", pytest.param("causal_lm", marks=pytest.mark.cluster)])
def test_the_same_run_in_every_layout(recipe: dict[str, Any], objective: str) -> None:
    if objective == "causal_lm":
        options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
        recipe["task"] = {"name": objective, "model": "transformers/gpt2", "options": options}
        recipe["data"] |= {"mask": None, "packing": False}
    config = RunConfig.model_validate(recipe)
    layouts = [Layout.parse(text) for text in ("1x1", "2x2")]
    verdict = verify(config, layouts=layouts, steps=2, dataset_size=size_of(config.data), say=lambda text: None)
    assert verdict.same and not verdict.notes, verdict.text("")
    assert max(finding.difference for finding in verdict.findings) < 1e-11


def test_a_run_goes_on_with_its_text_and_not_with_another(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run, text = tmp_path / "run", tmp_path / "text.txt"
    assert main(["train", str(path), "run.stop_after=3st"]) == 0
    content = text.read_text(encoding="utf-8")
    text.write_text(content.replace("water", "river"), encoding="utf-8")
    assert main(["train", str(path)]) == 2
    assert "data: its content or tokenizer is not what" in capsys.readouterr().err
    for other in (["evaluate", str(run)], ["train", str(path), f"task.weights={run}", f"run.dir={tmp_path / 'tuned'}"]):
        assert main(other) == 2
        assert f"other tokens than in {run / 'tokenizer.json'}; give" in capsys.readouterr().err
    text.write_text(content, encoding="utf-8")
    assert main(["train", str(path), "data.workers=1"]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert main(["train", str(path), f"run.dir={tmp_path / 'whole'}"]) == 0
    summaries = [json.loads((where / "summary.json").read_text()) for where in (run, tmp_path / "whole")]
    assert summaries[0]["parameters_sha256"] == summaries[1]["parameters_sha256"]
    assert set(summaries[0]["metrics"]) >= {"loss", "perplexity", "accuracy", "validation_loss"}
    vocabulary = json.loads((run / "tokenizer.json").read_text())["model"]["vocab"]
    assert "water" in vocabulary and "river" not in vocabulary

    assert main(["checkpoint", "export", str(run), str(tmp_path / "model")]) == 0
    code = (tmp_path / "model" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "model")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].config.vocab_size == len(vocabulary)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.mask=null", "task.name = 'masked_lm': text with data.mask=null is for causal_lm"),
        ("task={name: causal_lm, model: transformers/gpt2}", "text with data.mask is for masked_lm"),
    ],
)
def test_objective_and_masks_go_together(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    if override.startswith("task"):
        recipe["task"] = {"name": "causal_lm", "model": "transformers/gpt2"}
        override = "seed=1"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["plan", str(path), override]) == 2
    assert message in capsys.readouterr().err
