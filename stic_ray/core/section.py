"""What every section of the configuration is made of."""

import re
from typing import Annotated, Any, ClassVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0)]
Temperature = Annotated[float, Field(ge=0.0, le=5.0)]
"""Of sampling; 0 is greedy decoding."""


def in_order(given: Any) -> Any:
    """Return a mapping as pairs ordered by name, which cannot be changed; the rest is pydantic's."""
    return tuple(sorted(given.items())) if isinstance(given, dict) else given


def _weights(given: Any) -> Any:
    """Return a mapping of weights, or names of weight 1, as pairs ordered by name; the rest is pydantic's."""
    names = [given] if isinstance(given, str) else given
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        given = dict.fromkeys(names, 1.0)
    return in_order(given)


Weights = Annotated[tuple[tuple[str, float], ...], BeforeValidator(_weights), PlainSerializer(dict)]
"""Weights by name, {claims: 2, consistency: 1}; names alone, [claims, consistency], weigh 1."""


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is no regular expression of Python: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiled)]
"""A regular expression."""


class Section(BaseModel):
    """A group of settings; unknown keys are errors, values cannot be changed after creation."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for numbers, and take one word where several may stand."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("true and false are no value for this field")
        return (value,) if holds_words(kind) and isinstance(value, str | int | float) else value


def holds_words(kind: Any) -> bool:
    """Return whether a field of this type holds a tuple of words, or may hold one."""
    if get_origin(kind) is tuple:
        return get_origin(get_args(kind)[0]) is not tuple
    return any(holds_words(part) for part in get_args(kind))
