"""Typed configuration: frozen pydantic models, dotted overrides, errors that name the nearest right key."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_shards.errors import UserError


class Config(BaseModel):
    """Base of every recipe section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ConfigT = TypeVar("ConfigT", bound=Config)


def operational(default: Any, description: str, **bounds: Any) -> Any:
    """A field that does not change a trial's result (threads, paths, logging), so not part of its id."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **bounds)


def one_of(known: Callable[[], Mapping[str, Any]], what: str) -> Any:
    """A validator that a name is a key of ``known()`` (asked late: the dict may stand below) and otherwise lists the keys."""

    def check(cls: type, name: str) -> str:
        if name not in known():
            raise ValueError(f"there is no such {what}; known: {', '.join(known())}")
        return name

    return check


def result_fields(config: Config) -> dict[str, Any]:
    """The fields of ``config`` that determine a result, nested sections included, as JSON-ready values."""
    kept: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            continue
        value = getattr(config, name)
        kept[name] = result_fields(value) if isinstance(value, Config) else config.model_dump(mode="json")[name]
    return kept


def content_id(*parts: Any, length: int = 12) -> str:
    """A short hash of JSON-ready values: the same content has the same id on any machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """``["training.generator.lr=1e-4"]`` -> ``{"training.generator.lr": 0.0001}``; values are read as YAML."""
    overrides: dict[str, Any] = {}
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set {text!r} is not KEY=VALUE; write for example --set training.generator.lr=1e-4.")
        overrides[key.strip()] = parse_value(value)
    return overrides


def parse_value(text: str) -> Any:
    """One YAML scalar or flow collection; ``1e-4`` is a number (plain YAML 1.1 reads it as a string)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value {text!r} is not valid YAML; quote it or write a plain number or word.") from error
    return _number(value)


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value) if value.strip()[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    return value


def apply_overrides(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested mapping ``tree`` with each dotted key set; missing levels are made."""
    result: dict[str, Any] = json.loads(json.dumps(tree))
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        level = result
        for name in path:
            nested = level.setdefault(name, {})
            if not isinstance(nested, dict):
                raise UserError(f"cannot set {dotted!r}: {name!r} is a value, not a section.")
            level = nested
        level[last] = value
    return result


def build(model: type[ConfigT], tree: Mapping[str, Any], *, where: str, overrides: Iterable[str] = ()) -> ConfigT:
    """Validate ``tree`` against ``model``; ``overrides`` are the dotted keys in it that were set beside ``where``.

    Raises:
        UserError: one sentence naming the first wrong key or value, where it came from, and the remedy.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
        # A misspelt key explains a missing one, so it is named first.
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        origin = _origin(".".join(_location(first)), where, overrides)
        if isinstance(first.get("ctx", {}).get("error"), UserError):
            raise UserError(f"{origin}: {first['ctx']['error']}") from None
        raise UserError(f"{origin}: {_explain(model, first)}") from None


def _origin(dotted: str, where: str, overrides: Iterable[str]) -> str:
    """The --set arguments that an error at ``dotted`` may come from; the file alone where there is none."""
    overrides = list(overrides)
    exact = [key for key in overrides if key == dotted or dotted.startswith(f"{key}.")]
    if exact:
        return f"--set {exact[-1]}"
    within = [f"--set {key}" for key in overrides if not dotted or key.startswith(f"{dotted}.")]
    return " ".join([where, "with", *within]) if within else where


def _location(error: Any) -> list[str]:
    """The keys to the value, without what pydantic adds for the kinds of value that a field may have (tags are capitalised)."""
    return [part for part in map(str, error["loc"])
            if part not in ("float", "int") and not part.startswith(("list[", "dict[", "literal[")) and not part[:1].isupper()]


def _explain(model: type[Config], error: Any) -> str:
    location = _location(error)
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(dotted, list(field_paths(model)), n=1, cutoff=0.5)
        siblings = [path.rpartition(".")[2] for path in field_paths(model)
                    if path.rpartition(".")[0] == ".".join(location[:-1])]
        close = difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.5)
        right = ".".join([*location[:-1], close[0]]) if close else (nearest[0] if nearest else "")
        remedy = f"did you mean {right!r}?" if right else f"its section has: {', '.join(siblings)}."
        return f"unknown key {dotted!r}; {remedy}"
    if error["type"] == "missing":
        return f"the key {dotted!r} is missing; add it."
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    if error["type"] in ("tuple_type", "list_type"):
        message = "a list is needed, such as [a, b]"
    if message.split()[0][1:].islower():  # R1 and ZeRO stay as they are
        message = message[0].lower() + message[1:]
    value = "" if isinstance(error["input"], dict | Config) else f" = {error['input']!r}"  # a whole section says nothing
    return f"{dotted or 'the recipe'}{value} is refused: {message}."


def field_paths(model: type[Config], prefix: str = "") -> Iterator[str]:
    """Every dotted key of ``model``, sections before their fields."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in sections_of(field.annotation):
            yield from field_paths(section, f"{prefix}{name}.")


def sections_of(annotation: Any) -> list[type[Config]]:
    """The sections that a field may hold: itself one, or one of Annotated[A, ...] | Annotated[B, ...]."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    plain = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    return [kind for kind in plain if isinstance(kind, type) and issubclass(kind, Config)]


def describe(config: Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """``(dotted key, value, description)`` of every leaf of ``config``, in the order of declaration."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            yield from describe(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, field.description or ""
