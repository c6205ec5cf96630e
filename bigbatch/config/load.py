"""From a YAML file and ``a.b=c`` overrides to a frozen RunConfig, or one clear message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .models import RunConfig
from .redact import redact

Tree = dict[str, Any]

LONGEST = 100_000
"""Characters a recipe may have, counted as often as aliases repeat them."""

TAGS = {"optim": "name", "task": "name", "data": "name"} | dict.fromkeys(("warmup", "decay", "clip", "norm"), "kind")
"""The key of a section that says what its other keys mean."""


class ConfigError(ValueError):
    """The user's input is wrong. The message names the key, the value and a way out; the CLI exits 2 with it."""


class _Loader(yaml.SafeLoader):
    """YAML where ``off`` is a word and ``1e-1`` a number, and a repeated key is an error.

    It has no tags, which can stand for objects, and is at most `LONGEST`, though nested aliases multiply.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._length = 0
        self._lengths: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> Any:
        event, before = self.peek_event(), self._length  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None):
            raise ConfigError(f"{event.tag}, line {event.start_mark.line + 1}: a recipe has no tags; remove it")
        node: Any = super().compose_node(parent, index)
        # An alias inside of what it stands for has no length yet, and no end.
        self._length += self._lengths.get(node, LONGEST) if isinstance(event, yaml.AliasEvent) else 1 + len(node.value)
        self._lengths.setdefault(node, self._length - before)
        if self._length > LONGEST:
            raise ConfigError(f"more than {LONGEST} characters, counted as often as aliases repeat them; shorten it")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge")
        keys = [self.construct_object(key, deep=True) for key in own]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise ConfigError(
                f"{', '.join(sorted(repeated))}: written twice, line {node.start_mark.line + 1}; keep one"
            )
        return super().construct_mapping(node, deep)


def _resolvers() -> dict[str, list[tuple[str, Any]]]:
    import re

    table = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":bool", ":int", ":float", ":timestamp"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    boolean = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
    # Decimal only: 010 is no 8, and 12:30 no 750.
    whole = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
    number = re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$")
    for first in "tTfF":
        table.setdefault(first, []).append(("tag:yaml.org,2002:bool", boolean))
    for first in "-+.0123456789":
        table.setdefault(first, []).extend([("tag:yaml.org,2002:int", whole), ("tag:yaml.org,2002:float", number)])
    return table


_Loader.yaml_implicit_resolvers = _resolvers()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, follow its ``extends:``, apply ``key.path=value`` overrides, validate.

    A section whose ``name`` or ``kind`` differs from the one it overrides replaces it whole, so that no option of
    another optimiser or schedule is inherited. Raises ConfigError.
    """
    try:
        tree = _read(Path(path), ())
        # A section's name or kind comes first: it clears the section of what another one had set.
        for override in sorted(overrides, key=lambda text: not _names_section(text)):
            tree = merge(tree, _override(override))
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, tree)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a recipe; sections have at most a few levels") from None


def dump_config(config: RunConfig) -> str:
    """The resolved recipe as YAML that load_config reads back to an equal config."""
    tree = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """``over`` on ``base``, section by section; neither is changed."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            tag = TAGS.get(key, "")
            renamed = tag in value and tag in old and value[tag] != old[tag]
            # Nothing on something empties it: the only way to drop inherited options.
            value = merge(old, value) if value and not renamed else value
        result[key] = value
    return result


def _shown(value: object) -> str:
    """A value as a message has room for it."""
    return redact(repr(value))[:200]


def explain(error: ValidationError, tree: object) -> str:
    """The first problem pydantic found in ``tree`` as ``key = value: what is wrong``, and how many keys have one."""
    problems: dict[str, list[Any]] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(_key(problem, tree), []).append(problem)
    key, first = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    match first[0]["type"]:
        case "missing":
            return f"{key}: required and not set{more}"
        case "extra_forbidden":
            return f"{key} = {_shown(first[0]['input'])}: unknown key; `bigbatch schema` lists the legal ones{more}"
        case "union_tag_invalid":
            context = first[0]["ctx"]
            tag = context["discriminator"].strip("'")
            return f"{key}.{tag} = {_shown(context['tag'])}: unknown; choose one of {context['expected_tags']}{more}"
        case "secret":
            return f"{key}: {first[0]['msg']}{more}"
        case "union_tag_not_found":
            return f"{key}: {first[0]['ctx']['discriminator']} is required and not set{more}"
    messages = " or ".join(dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in first))
    return f"{key} = {_shown(first[0]['input'])}: {messages}{more}"


def _key(problem: Any, tree: object) -> str:
    """The user's own path to a problem: pydantic's, without the names of union members that stand between."""
    path: list[str] = []
    node = tree
    for part in problem["loc"]:
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, (list, tuple)) and isinstance(part, int):
            node = node[part] if part < len(node) else None
        else:
            continue
        path.append(str(part))
    if problem["type"] == "missing" and path[-1:] != [str(problem["loc"][-1])]:
        path.append(str(problem["loc"][-1]))
    return ".".join(path) or "recipe"


def _read(path: Path, seen: tuple[Path, ...]) -> Tree:
    try:
        where, text = path.resolve(), path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe; give the path of a YAML file, such as those in configs/") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a text file in UTF-8") from None
    if where in seen:
        raise ConfigError(f"{path}: extends itself ({' -> '.join(p.name for p in (*seen, where))}); break the circle")
    try:
        tree = yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        kind = "empty" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(
            f"{path}: the recipe is {kind}; write sections such as `duration: 10ep` and `batch: {{global: 256}}`"
        )
    if not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path}: every key must be a word, got {next(k for k in tree if not isinstance(k, str))!r}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {parent!r}: give the path of one recipe, relative to this file")
    return merge(_read(path.parent / parent, (*seen, where)), tree)


def _names_section(override: str) -> bool:
    section, _, tag = override.partition("=")[0].partition(".")
    return TAGS.get(section) == tag


def _override(text: str) -> Tree:
    key, equals, raw = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > 20:
        raise ConfigError(f"override {text!r}: write key.path=value, for example batch.global=1024")
    try:
        value = yaml.load(raw, Loader=_Loader)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"override {text[:80]!r}: the value is not YAML; quote it") from None
    for part in reversed(parts):
        value = {part: value}
    return value  # type: ignore[no-any-return]
