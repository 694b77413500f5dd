"""A recipe as people read it: resolved YAML with descriptions, and the reference of every key as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from training.config import Config, describe, sections_of


def as_yaml(recipe: Config) -> str:
    """Every value of `recipe` with its description beside it; reading it again gives the same recipe."""
    tree = recipe.model_dump(mode="json")
    lines: list[str] = []
    open_sections: list[str] = []
    for dotted, _, description in describe(recipe):
        *sections, name = dotted.split(".")
        for depth, section in enumerate(sections):
            if open_sections[: depth + 1] != sections[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
        open_sections = sections
        value: Any = tree
        for part in (*sections, name):
            value = value[part]
        comment = f"  # {' '.join(description.split())}" if description else ""
        lines.append(f"{'  ' * len(sections)}{name}: {_flow(value)}{comment}")
    return "\n".join(lines) + "\n"


def as_markdown(model: type[Config]) -> str:
    """A table of every key of `model`: its default, its description, and whether it decides a trial's result."""
    lines = [
        "# Recipe keys", "",
        "A recipe says only what differs from these defaults; `--set KEY=VALUE` changes one value. A key with a *yes*",
        "under *result* is part of a trial's identity: changing it makes new trials, changing another leaves finished",
        "trials finished.",
        "", "| key | default | result | meaning |", "| --- | --- | --- | --- |",
    ]
    for key, default, result, description in _keys(model):
        cells = (f"`{key}`", default, "yes" if result else "", description)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _keys(model: type[Config], prefix: str = "") -> Iterator[tuple[str, str, bool, str]]:
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Config):
            yield from _keys(nested, f"{prefix}{name}.")
            continue
        extra = field.json_schema_extra
        operational = isinstance(extra, dict) and bool(extra.get("operational"))
        value = field.get_default(call_default_factory=True, validated_data={})
        default = "required" if value is PydanticUndefined else f"`{_flow(_plain(value))}`"
        yield prefix + name, default, not operational, " ".join((field.description or "").split())
        for section in sections_of(nested):
            yield from _keys(section, f"{prefix}{name}.")


def _plain(value: Any) -> Any:
    """Tuples and nested models as lists and mappings."""
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()
