"""No password and no token gets into a recipe's copies or into a message."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.cli import main
from bigbatch.config import ConfigError, RunConfig, load_config, redact

RECIPE: dict[str, Any] = {
    "duration": "2ep",
    "batch": {"global": 64},
    "optim": {"name": "sgd", "lr": 0.1},
    "task": {"name": "classification", "model": "bigbatch/resnet_small"},
    "data": {"name": "digits"},
}
SECRET = "Zq7Zq7Zq7Zq7Zq7Zq7Zq7Zq7Zq7Zq7"
PLACES = [
    "https://me:{}@host/data",
    "https://{}@host:8080/data",
    "postgres://me:{}@host/runs",
    "https://host/data?token={}&part=1",
    "https://host/data?part=1&X-Amz-Signature={}",
    "hf_{}",
    "ghp_{}",
    "api_key={}",
    "{{'password': '{}'}}",
    "tracking.wandb.api_key = '{}': unknown key",
    "auth_token: {}",
]
HARMLESS = [
    "https://host/data?part=1",
    "s3://bucket/prefix@2/data",
    "git@github.com:them/theirs.git",
    "ssh://git@github.com/them/theirs.git",
    "batch.global = 48: write key.path=value, for example batch.global=1024",
    "{'class_token': False, 'reg_tokens': 4}",
    "0" * 40,
    "hf_large_batch_of_pretraining_images",
    "mail me@example.org about http://host",
]


@pytest.mark.parametrize("place", PLACES)
@given(secret=st.text(string.ascii_letters + string.digits, min_size=20, max_size=60))
def test_a_secret_is_taken_out_and_nothing_else(place: str, secret: str) -> None:
    text = redact(f"before {place.format(secret)} after")
    assert secret not in text and "***" in text
    assert text.startswith("before ") and text.endswith(" after")
    assert redact(text) == text


@pytest.mark.parametrize("text", HARMLESS)
def test_the_rest_is_left_as_it_is(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("place", PLACES[:7])
@pytest.mark.parametrize("key", ["run.dir", "task.model", "tracking.wandb.name", "tracking.wandb.tags", "task.options"])
def test_a_recipe_takes_no_secret(key: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value: Any = place.format(SECRET)
    value = {"tags": ["a", value], "options": {"a": [{"b": value}]}}.get(key.rpartition(".")[2], value)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["train", str(tmp_path / "recipe.yaml"), f"{key}={json.dumps(value)}"]) == 2
    said = capsys.readouterr().err
    assert f"{key}" in said and "looks like a password or a token" in said and "environment" in said
    assert SECRET not in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_configuration_from_python_takes_none_either() -> None:
    with pytest.raises(ValueError, match="looks like a password"):
        RunConfig.model_validate({**RECIPE, "run": {"dir": f"https://me:{SECRET}@host"}})


@pytest.mark.parametrize(
    "override",
    [
        f"data.path=https://me:{SECRET}@host",  # an unknown key of digits
        f"tracking.wandb.api_key={SECRET}",
        f"seed=https://me:{SECRET}@host",  # a wrong type
        f"optim.name=https://me:{SECRET}@host",
        f"seed={{https://me:{SECRET}@host",  # no YAML
        f"https://me:{SECRET}@host",
        f"run.dir=https://{'me' * 90}:{SECRET}@host",  # cut in a message, but not so that it shows
        f"extends=https://host?token={SECRET}",
    ],
)
def test_no_message_tells_one(override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    try:
        assert main(["plan", str(tmp_path / "recipe.yaml"), override]) == 2
    except SystemExit as left:
        assert left.code == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err


def test_broken_yaml_is_quoted_without_its_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(f"run: {{dir: https://me:{SECRET}@host: x: y]\n")
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 2
    assert SECRET not in capsys.readouterr().err


def test_secrets_of_the_environment_stay_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "GITHUB_TOKEN"):
        monkeypatch.setenv(name, SECRET + name)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    run = tmp_path / "run"
    overrides = [f"run.dir={run}", "tracking.wandb.mode=offline", "run.stop_after=1st", "eval.every=1st"]
    assert main(["train", str(tmp_path / "recipe.yaml"), *overrides]) == 0
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 8 and any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_the_message_of_load_config_has_none() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("/nonexistent/recipe.yaml", [f"run.dir=https://me:{SECRET}@host"])
    assert SECRET not in str(caught.value)
