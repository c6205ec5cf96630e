from pathlib import Path

import pytest

from bigbatch.config import ConfigError, Duration, dump_config, load_config, merge

RECIPE = """
duration: 10ep
batch: {global: 512}
optim: {name: lars, lr: 1e-1}
task: {name: classification, model: bigbatch/resnet_small}
data: {name: digits}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_numbers_words_and_defaults(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.optim.lr == 0.1  # plain YAML 1.1 reads 1e-1 as text
    assert config.optim.weight_decay == 0.0
    assert config.duration == Duration.parse("10ep")
    assert config.batch.micro == "auto"


def test_overrides_reach_any_depth(recipe: Path) -> None:
    config = load_config(recipe, ["batch.global=64", "data.augment.shift=2", "debug=true", "clip={kind: norm, max: 1}"])
    assert (config.batch.global_, config.data.augment.shift, config.debug, config.clip.max) == (64, 2, True, 1.0)


def test_another_name_replaces_the_whole_section(recipe: Path) -> None:
    config = load_config(recipe, ["optim={name: sgd, lr: 0.2}"])
    assert config.optim.name == "sgd"
    assert "trust_coefficient" not in config.optim.model_dump()
    assert merge({"optim": {"name": "a", "x": 1}}, {"optim": {"y": 2}}) == {"optim": {"name": "a", "x": 1, "y": 2}}
    assert merge({"optim": {"name": "a", "x": 1}}, {"optim": {"name": "b"}}) == {"optim": {"name": "b"}}


def test_name_and_kind_come_first_in_any_order(recipe: Path) -> None:
    config = load_config(recipe, ["optim.lr=0.3", "optim.name=adam"])
    assert (config.optim.name, config.optim.lr) == ("adam", 0.3)


def test_only_a_sections_own_tag_replaces_it(recipe: Path) -> None:
    config = load_config(recipe, ["tracking.wandb={mode: offline, name: a}", "tracking.wandb.name=b"])
    assert (config.tracking.wandb.mode, config.tracking.wandb.name) == ("offline", "b")
    cleared = load_config(recipe, ["task.options={widths: [8]}", "task.options={}"])
    assert cleared.task.options == {}


def test_yaml_merge_keys(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(RECIPE + "eval: &every {every: 2ep}\ncheckpoint: {<<: *every, keep: 5}\n")
    assert load_config(path).checkpoint.every == Duration.parse("2ep")


def test_extends_is_relative_and_chained(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.yaml").write_text("extends: ../recipe.yaml\nseed: 1\nbatch: {micro: 8}\n")
    (tmp_path / "two.yaml").write_text("extends: deep/one.yaml\nbatch: {global: 16}\n")
    config = load_config(tmp_path / "two.yaml")
    assert (config.seed, config.batch.global_, config.batch.micro) == (1, 16, 8)


def test_dump_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load_config(
        recipe, ["decay={kind: multistep, at: [30%, 4ep]}", "optim.groups=[{match: rest}]", "duration=1234567890123ex"]
    )
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_frozen(recipe: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(recipe).seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.nam=3", "optim.nam = 3: unknown key"),
        ("batch.micro=x", "batch.micro = 'x':"),
        ("optim.name=foo", "optim.name = 'foo': unknown; choose one of 'sgd', 'lars'"),
        ("optim.lr=-1", "optim.lr = -1:"),
        ("optim.lr=.nan", "optim.lr = nan:"),
        ("duration=10", "duration = 10: not a duration"),
        ("decay={kind: cosine, foo: 3}", "decay.foo = 3: unknown key"),
        ("norm.kind=off", "norm.kind = 'off': Input should be 'batch', 'group', 'layer' or 'instance'"),
        ("optim={name: sgd}", "optim.lr: required and not set"),
        ("optim={lr: 1}", None),
        ("data.path=x", "data.path = 'x': unknown key"),
        ("decay={}", "decay: 'kind' is required"),
        ("data.augment.erase=2", "data.augment.erase = 2:"),
        ("warmup.duration=3", "warmup.duration = 3: not a duration"),
        ("a", "write key.path=value"),
        ("a.=1", "write key.path=value"),
        ("seed={", "not YAML"),
        ("batch.global=" + "9" * 5000, "not YAML"),
        ("batch.global=99999999999", "batch.global = 99999999999:"),
        ("optim={name: adam, lr: 0.1, betas: [0.9]}", "optim.betas.1: required and not set"),
        ("duration=1e400ep", "not a duration"),
        ("batch=3", "batch = 3:"),
    ],
)
def test_messages_name_key_value_and_way_out(recipe: Path, override: str, message: str | None) -> None:
    if message is None:
        load_config(recipe, [override])
        return
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("- a\n- b", "the recipe is a list"),
        ("a: [", "not YAML"),
        ("seed: 1\nseed: 2", "seed: written twice"),
        ("3: x", "every key must be a word"),
        ("extends: 3", "extends = 3"),
        ("extends: nowhere.yaml", "no such recipe"),
        ("extends: bad.yaml", "extends itself"),
    ],
)
def test_unreadable_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "bad.yaml")


def test_counts_the_other_problems(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(and 1 more\)"):
        load_config(recipe, ["optim.lr=-1", "batch.global=0"])
