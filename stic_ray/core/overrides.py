"""From YAML text and `--set section.field=value` to a checked `RunConfig`."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, nearest, one_line
from stic_ray.core.section import holds_words

RECIPE = "recipe"
"""Key of a configuration file that names the recipe whose steps it has, and whose settings it changes."""


def load_config(path: Path, base: RunConfig | None = None) -> RunConfig:
    """Read a run configuration from a YAML file; what it leaves out is as in `base`, or keeps its default.

    Raises ConfigError when the file is missing, is no YAML mapping, or holds an unknown key or a wrong value.
    """
    data = {**(base.model_dump() if base else {}), "name": path.stem}
    for key, value in read_mapping(path).items():
        before = data.get(key)
        data[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    data.pop(RECIPE, None)
    return build_config(data)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return what a YAML file of a configuration holds. Raises ConfigError as `load_config`."""
    data = read_yaml(path, "configuration")
    if not isinstance(data, dict):
        raise ConfigError(f"'{path}' must hold a mapping of sections, found {type(data).__name__}.")
    return data


def read_yaml(path: Path, what: str) -> Any:
    """Return what a YAML file holds; `what` names it in errors. Raises ConfigError when it is missing or no YAML."""
    if not path.is_file():
        raise ConfigError(f"No {what} file at '{path}'.")
    try:
        return yaml.load(read_text(path), _EachKeyOnce)
    except yaml.YAMLError as error:
        raise ConfigError(f"'{path}' is not valid YAML: {one_line(error)}") from error


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"the key '{twice[0]}' stands there twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_text(path: Path) -> str:
    """Return the text of a file that a user wrote, in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises OSError, and ConfigError for another encoding.
    """
    content = path.read_bytes()
    encoding = json.detect_encoding(content)  # by the zeros among the first bytes, as any text that begins in ASCII has
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"'{path}' is no {encoding.upper()} text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error


def apply_overrides(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Return `config` with each "section.field=value" applied; values are read as YAML.

    Raises ConfigError for an unknown section or field, naming the valid ones and the nearest, and for a value
    that the field does not allow.
    """
    data = config.model_dump()
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set needs section.field=value, got '{assignment}'.")
        section, name, kind = _find(data, key.strip())
        section[name] = _read_value(text, kind)
    return build_config(data)


def apply_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return `config` with each "section.field" set to its value, as `apply_overrides` does with text.

    Raises ConfigError for an unknown section or field, and for a value that the field does not allow.
    """
    data = config.model_dump()
    for key, value in values.items():
        section, name, _ = _find(data, key)
        section[name] = value
    return build_config(data)


def build_config(data: dict[str, Any]) -> RunConfig:
    """Check `data` and return the configuration. Raises ConfigError in one line."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(detail)) for detail in error.errors())) from error


def _find(data: dict[str, Any], key: str) -> tuple[dict[str, Any], str, Any]:
    """Return the mapping that holds a field, its name in there, and its type. Raises ConfigError for no field."""
    *sections, name = key.split(".")
    for depth, part in enumerate([*sections, name]):
        if part not in (fields := _fields_of(sections[:depth])):
            raise ConfigError(_unknown(".".join(sections[:depth]), part, fields))
    if inner := _fields_of([*sections, name]):
        raise ConfigError(f"'{key}' is a section; set one of its fields: {', '.join(inner)}.")
    for section in sections:
        data = data[section]
    return data, name, _fields_of(sections)[name].annotation


def _read_value(text: str, kind: Any) -> Any:
    """Read a value of a field of this type: YAML, where 1e-5 is a number, which YAML 1.1 takes for a string.

    Text is taken as it was typed, also where it is the only one of several, so that revisions and paths that look like
    numbers stay what they are.
    """
    if kind in (str, str | None):  # constraints are kept apart from the type
        return None if text == "null" else text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if holds_words(kind):
        return value if value is None or isinstance(value, str | list) else text
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _unknown(section: str, key: str, allowed: Mapping[str, Any]) -> str:
    where = f"in section '{section}'" if section else "at the top level"
    names = ", ".join(allowed) or "none, it is a single value"
    return f"Unknown key '{key}' {where}.{nearest(key, allowed)} Valid: {names}."


def _explain(detail: dict[str, Any]) -> str:
    """Turn one pydantic error into a line for the reader."""
    location = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        return _unknown(".".join(location[:-1]), location[-1], _fields_of(location[:-1]))
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], dict):  # a section whose settings do not fit together; the message names them
        return ": ".join([*location, message])
    return f"{'.'.join(location)}={detail['input']!r}: {message}"


def _fields_of(section: list[str]) -> dict[str, FieldInfo]:
    """Return the fields of a section, of the top level for []; a single value has none."""
    kind: Any = RunConfig
    for name in section:
        kind = kind.model_fields[name].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return {}
    return dict(kind.model_fields)
