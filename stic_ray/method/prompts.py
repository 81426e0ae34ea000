"""The prompt set: every text that a model is asked (STIC section 4.1 and appendix; the wording is ours)."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from stic_ray.core.errors import ConfigError, nearest, one_line
from stic_ray.core.overrides import read_text
from stic_ray.method.media import without_placeholder

Prompt = Annotated[str, AfterValidator(lambda text: without_placeholder(text).strip()), Field(min_length=1)]
PromptList = Annotated[tuple[Prompt, ...], Field(min_length=1)]

_PLACEHOLDERS = {
    "split": ("{answer}",),
    "confirm": ("{question}",),
    "infuse": ("{description}", "{question}"),
    "choose": ("{question}", "{choices}"),
    "answer_briefly": ("{question}",),
}


_BUILT_IN = yaml.safe_load(files("stic_ray.method").joinpath("prompts.yaml").read_text(encoding="utf-8"))


class PromptSet(BaseModel):
    """What is asked, and how the parts of a prompt are put together; the last three may be left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step_by_step: PromptList
    plain: PromptList
    hallucination: PromptList
    describe: Prompt
    infuse: Prompt
    choose: Prompt
    answer_briefly: Prompt
    split: Prompt = _BUILT_IN["split"]
    confirm: Prompt = _BUILT_IN["confirm"]
    ask: PromptList = tuple(_BUILT_IN["ask"])

    @field_validator("infuse", "choose", "answer_briefly", "split", "confirm")
    @classmethod
    def _has_placeholders(cls, value: str, info: Any) -> str:
        missing = [name for name in _PLACEHOLDERS[info.field_name] if name not in value]
        if missing:
            raise ValueError(f"lacks {' and '.join(missing)}")
        return value

    def infused(self, description: str, question: str) -> str:
        """Put a description in front of a question."""
        return fill(self.infuse, description=description, question=question)


def fill(template: str, **values: str) -> str:
    """Replace each {name} of `template` by its value; braces inside the values stay as they are."""
    names = "|".join(map(re.escape, values))
    return re.sub(f"{{({names})}}", lambda match: values[match[1]], template)


def load_prompts(path: str | None) -> PromptSet:
    """Read a prompt set from a YAML file, or the built-in one.

    Raises ConfigError when the file is missing, is no YAML, or lacks a part.
    """
    try:
        return PromptSet.model_validate(yaml.safe_load(read_text(Path(path).expanduser())) if path else _BUILT_IN)
    except OSError as error:
        raise ConfigError(f"Cannot read the prompt set '{path}': {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The prompt set '{path}' is not valid YAML: {one_line(error)}") from error
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            key = ".".join(map(str, detail["loc"])) or "file"
            hint = nearest(key, PromptSet.model_fields) if detail["type"] == "extra_forbidden" else ""
            problems.append(f"{key}: {detail['msg']}.{hint}")
        raise ConfigError(f"The prompt set '{path}' is wrong: {'; '.join(problems)}") from error
