"""The strict base of every YAML schema: unknown keys are errors that suggest the nearest known key."""

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from vlm.errors import VlmError, did_you_mean


class Strict(BaseModel):
    """A frozen model that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_and_numbers(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key, value in data.items():
                if key not in cls.model_fields:
                    hint = did_you_mean(str(key), cls.model_fields)
                    raise PydanticCustomError("unknown_key", "{text}", {"text": f"unknown key {key!r}{hint}"})
                # YAML reads `on` and `yes` as true, which pydantic would take for 1.
                if isinstance(value, bool) and _wants_number(cls.model_fields[key].annotation):
                    text = f"`{key}` is {str(value).lower()}, expected a number"
                    raise PydanticCustomError("no_number", "{text}", {"text": text})
        return data


def _wants_number(annotation: Any) -> bool:
    kinds = {annotation, *get_args(annotation)}
    return bool(kinds & {int, float}) and bool not in kinds


# Kinds of problems whose text says what was given.
_TELL_ALL = ("unknown_key", "no_number", "missing")

Schema = TypeVar("Schema", bound=Strict)


def validate(schema: type[Schema], content: dict[str, Any], where: str) -> Schema:
    """`content` as a `schema`; every problem becomes one line that names the key. Raises VlmError."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key, text = _key(problem["loc"], content), problem["msg"].removeprefix("Value error, ")
            told = problem["type"] in _TELL_ALL or isinstance(problem["input"], dict)
            given = "" if told else f" (got {_short(problem['input'])})"
            if problem["type"].startswith("union_tag"):  # several kinds of mapping, told apart by `type`
                kinds = [kind.strip().strip("'") for kind in problem["ctx"].get("expected_tags", "").split(",")]
                tag = str(problem["ctx"].get("tag", ""))
                text, given = f"unknown type {tag!r}{did_you_mean(tag, kinds)}" if tag else "missing", ""
                key += ".type"
            problems.append(f"{key + ': ' if key else ''}{text}{given}")
        raise VlmError(f"{where}: " + "; ".join(problems)) from error


def _key(location: tuple[int | str, ...], content: Any) -> str:
    """The dotted key of a problem's location, without the names that pydantic puts in for the kind of a mapping."""
    parts: list[str] = []
    for number, part in enumerate(location):
        inside = isinstance(content, dict) and part in content
        listed = isinstance(content, list) and isinstance(part, int) and part < len(content)
        if not (inside or listed) and number < len(location) - 1:
            continue
        content = content[part] if inside or listed else None
        parts.append(str(part))
    return ".".join(parts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def apply_overrides(content: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """A copy of `content` with each `KEY=VALUE` applied: KEY is a dotted path, VALUE is read as YAML.

    `train.steps=10`, `data.train.0.weight=2`, `model.language_model.lora.rank=8`. Raises VlmError on a malformed one.
    """
    result = yaml.safe_load(yaml.safe_dump(content, sort_keys=False))
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise VlmError(f"override {text!r}: expected KEY=VALUE, e.g. train.steps=10")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise VlmError(f"override {text!r}: the value is not plain YAML") from error
        _set(result, path.strip().split("."), parsed, text)
    return result


def _set(node: Any, keys: list[str], value: Any, text: str) -> None:
    for depth, key in enumerate(keys):
        index: Any = key
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise VlmError(f"override {text!r}: {'.'.join(keys[:depth])} is a list of {len(node)}; give an index")
            index = int(key)
        elif not isinstance(node, dict):
            raise VlmError(f"override {text!r}: {'.'.join(keys[:depth])} holds a value, not keys")
        if depth == len(keys) - 1:
            node[index] = value
            return
        if isinstance(node, dict) and (node.get(index) is None or isinstance(node[index], str)):
            # `language_model: NAME` is short for `language_model: {name: NAME}`.
            node[index] = {"name": node[index]} if node.get(index) else {}
        node = node[index]


def dump_yaml(content: dict[str, Any], path: Path) -> None:
    """Write a mapping as YAML in the order of its keys."""
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
