"""The configuration: frozen, complete, every key known; what is typed is what counts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from stic_ray.core.config import RunConfig, WorkersConfig
from stic_ray.core.errors import ConfigError, UserError, nearest
from stic_ray.core.overrides import apply_overrides, load_config
from stic_ray.core.resources import accumulation_steps
from stic_ray.engines.fake import read_script
from stic_ray.method import prompts
from stic_ray.method.prompts import load_prompts
from stic_ray.recipes import RECIPES, recipe


def read(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def set_one(assignment: str) -> RunConfig:
    return apply_overrides(recipe("demo").config, [assignment])


def refusal(assignment: str) -> str:
    """The message that refuses an assignment: one line that names the key."""
    with pytest.raises(ConfigError) as caught:
        set_one(assignment)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("dpo.learning_rate=1e-5", 1e-5),
        ("dpo.learning_rate=1E-5", 1e-5),
        ("dpo.learning_rate=0.00001", 1e-5),
        ("dpo.alpha=0", 0.0),
        ("preferences.num_images=6000", 6000),
        ("preferences.num_images=6e3", 6000),
        ("preferences.num_images=null", None),
        ("model.trust_remote_code=true", True),
        ("workers.zero_stage=3", 3),
        ("evaluation.benchmarks=[a.jsonl, b.parquet]", ("a.jsonl", "b.parquet")),
        ("evaluation.benchmarks=bench.jsonl", ("bench.jsonl",)),
        ("evaluation.benchmarks=s3://bucket/2024: a.jsonl", ("s3://bucket/2024: a.jsonl",)),
        ("evaluation.benchmarks=1e5", ("1e5",)),
        ("evaluation.benchmarks='[a] b.jsonl'", ("[a] b.jsonl",)),
        ("evaluation.models=base", ("base",)),
        ("evaluation.modes=direct", ("direct",)),
        ("tuning.freeze=vision_tower", ("vision_tower",)),
        ("tuning.freeze=null", None),
        ("workers.trackers=wandb", ("wandb",)),
        ("actors.label_selector=group=generation", (("group", "generation"),)),
        ("workers.label_selector=ray.io/market-type=!spot", (("ray.io/market-type", "!spot"),)),
        ("tuning.freeze=[]", ()),
        ("tuning.freeze=[vision_tower, projector]", ("vision_tower", "projector")),
        ("seed=7", 7),
        ("pool.source=s3://bucket/images?region=eu-west-1", "s3://bucket/images?region=eu-west-1"),
        ("pool.source=/data/year=2024/my images", "/data/year=2024/my images"),
    ],
)
def test_a_setting_takes_the_value_that_was_typed(assignment: str, expected: Any) -> None:
    value = read(set_one(assignment), assignment.partition("=")[0])
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("text", ["12", "0123456", "12e3", "5e12345", "1_000", "1:30", "2024-01-01", "/data/images #1"])
def test_a_text_setting_takes_the_text_as_it_was_typed(text: str) -> None:
    """A revision such as 0123456 or 5e12345 is a commit, and a folder's name may hold a "#"."""
    assert set_one(f"model.revision={text}").model.revision == text
    assert set_one(f"pool.source={text}").pool.source == text


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("pool.shard_size", "many"),
        ("pool.shard_size", "6.5"),
        ("pool.shard_size", "0"),
        ("pool.shard_size", "true"),
        ("preferences.hallucination_share", "1.5"),
        ("preferences.top_p", "0"),
        ("dpo.learning_rate", "yes"),
        ("dpo.learning_rate", "0"),
        ("dpo.learning_rate", "nan"),
        ("dpo.learning_rate", ".nan"),
        ("dpo.learning_rate", "inf"),
        ("dpo.learning_rate", "1e400"),
        ("dpo.alpha", "-.inf"),
        ("pool.max_aspect_ratio", "Infinity"),
        ("model.trust_remote_code", "maybe"),
        ("pool.source", "null"),
        ("evaluation.benchmarks", "[1, [2]]"),
        ("evaluation.modes", "drect"),
        ("evaluation.models", "null"),
        ("evaluation.benchmarks", "[]"),
        ("tuning.freeze", "vision"),
        ("workers.trackers", "tensorbord"),
        ("actors.label_selector", "generation"),
        ("workers.zero_stage", "4"),
        ("seed", "-1"),
        ("seed", "null"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(key: str, text: str) -> None:
    assert key in refusal(f"{key}={text}")


def test_fewer_actors_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_actors=3 is more than num_actors=2"):
        apply_overrides(recipe("demo").config, ["actors.num_actors=2", "actors.min_actors=3"])


def test_a_word_that_is_not_allowed_is_refused_with_those_that_are() -> None:
    message = refusal("tuning.method=loraa")
    assert "loraa" in message
    assert "qlora" in message
    assert "full" in message


@pytest.mark.parametrize(
    ("assignment", "wrong", "suggestion", "also_valid"),
    [
        ("pool.sorce=/images", "sorce", "source", "shard_size"),
        ("pol.source=/images", "pol", "pool", "preferences"),
        ("preferences.temprature=1", "temprature", "temperature", "max_new_tokens"),
        ("dpo.learning-rate=1", "learning-rate", "learning_rate", "beta"),
        ("sede=1", "sede", "seed", "name"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_and_the_valid_ones(
    assignment: str, wrong: str, suggestion: str, also_valid: str
) -> None:
    message = refusal(assignment)
    assert f"'{wrong}'" in message
    assert f"Did you mean '{suggestion}'?" in message
    assert also_valid in message


@pytest.mark.parametrize("assignment", ["pool.source", "=3", "pool..source=x", "seed.x=1", "tuning.freeze.0=projector"])
def test_a_malformed_assignment_is_refused(assignment: str) -> None:
    assert refusal(assignment)


def test_a_section_cannot_be_set_as_a_whole() -> None:
    message = refusal("pool=3")
    assert "section" in message
    assert "shard_size" in message


def test_the_last_of_two_assignments_counts_and_the_given_config_stays() -> None:
    before = recipe("demo").config
    after = apply_overrides(before, ["seed=1", "seed=2", "pool.shard_size=9"])
    assert (after.seed, after.pool.shard_size) == (2, 9)
    assert before == recipe("demo").config
    assert after.model_copy(update={"seed": before.seed, "pool": before.pool}) == before


@pytest.mark.parametrize(("section", "field"), [(None, "seed"), ("pool", "shard_size"), ("dpo", "beta")])
def test_a_config_cannot_be_changed(section: str | None, field: str) -> None:
    config = recipe("demo").config
    with pytest.raises(ValidationError, match="frozen"):
        setattr(getattr(config, section) if section else config, field, 3)
    assert config == recipe("demo").config
    assert hash(config) == hash(recipe("demo").config), "nothing inside can be changed either"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_written_as_yaml_reads_back_the_same(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(recipe(name).config.model_dump(mode="json")), encoding="utf-8")
    assert load_config(file) == recipe(name).config


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'dmo'.*Did you mean 'demo'\?.*llava16_7b"):
        recipe("dmo")


def test_the_published_settings_are_those_of_the_paper() -> None:
    """reference/methods.md 1.2 to 1.5: STIC's scripts for LLaVA-v1.6-Mistral-7B."""
    published = {
        "preferences.num_images": 6000,
        "preferences.hallucination_share": 0.5,
        "preferences.low_resolution_share": 0.5,
        "preferences.low_resolution_px": 20,
        "preferences.jitter_brightness": 0.5,
        "preferences.jitter_hue": 0.3,
        "preferences.temperature": 0.2,
        "preferences.max_new_tokens": 1024,
        "tuning.lora_rank": 128,
        "tuning.lora_alpha": 256,
        "tuning.lora_dropout": 0.05,
        "dpo.learning_rate": 1e-7,
        "dpo.global_batch": 8,
        "dpo.beta": 0.1,
        "dpo.alpha": 1 / 1024,
        "dpo.num_epochs": 1,
        "dpo.warmup_share": 0.03,
        "dpo.objective": "paper",
        "infusion.num_rows": 5000,
        "sft.learning_rate": 2e-5,
        "sft.global_batch": 32,
        "workers.zero_stage": 2,
    }
    config = recipe("llava16_7b").config
    assert {key: read(config, key) for key in published} == published


def written(folder: Path, content: str | bytes) -> Path:
    file = folder / "mine.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_a_config_file_keeps_the_defaults_of_what_it_leaves_out(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "pool:\n  source: /images\ndpo:\n  learning_rate: 1e-5\n"))
    assert config.name == "mine"
    assert (config.pool.source, config.dpo.learning_rate) == ("/images", 1e-5)
    assert config.sft == RunConfig(name="mine").sft


def test_a_config_file_can_change_a_recipe(tmp_path: Path) -> None:
    file = written(tmp_path, "recipe: demo\nseed: 3\ndpo:\n  beta: 0.2\n")
    demo = recipe("demo").config
    assert load_config(file, demo) == apply_overrides(demo, ["name=mine", "seed=3", "dpo.beta=0.2"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_config_file_is_read_in_the_encoding_that_it_was_saved_in(
    encoding: str, line_end: str, tmp_path: Path
) -> None:
    """Editors on Windows write a byte order mark, or UTF-16, and other line ends."""
    lines = ["pool:", "  source: /Bilder/Köln 写真", "tuning:", "  freeze: projector", "seed: 3", ""]
    config = load_config(written(tmp_path, line_end.join(lines).encode(encoding)))
    assert (config.pool.source, config.tuning.freeze, config.seed) == ("/Bilder/Köln 写真", ("projector",), 3)


def test_a_prompt_set_and_a_script_are_read_in_any_encoding(tmp_path: Path) -> None:
    file = tmp_path / "script.yaml"
    file.write_bytes("default: Köln\r\n".encode("utf-16"))
    assert read_script(str(file)).default == "Köln"
    file.write_bytes(Path(prompts.__file__).with_name("prompts.yaml").read_text().encode("utf-8-sig"))
    assert load_prompts(str(file)) == load_prompts(None)


def test_a_config_file_in_another_encoding_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine.yaml' is no UTF-8 text .* at byte 18\); save it as UTF-8"):
        load_config(written(tmp_path, "pool:\n  source: /Köln\n".encode("cp1252")))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("pool:\n  sorce: x\n", "Did you mean 'source'?"),
        ("pol: {}\n", "Did you mean 'pool'?"),
        ("pool:\n  shard_size: many\n", "pool.shard_size"),
        ("dpo:\n  learning_rate: .nan\n", "dpo.learning_rate"),
        ("pool: 3\n", "pool"),
        ("pool: [\n", "not valid YAML"),
        ("- pool\n- dpo\n", "mapping"),
        ("", "mapping"),
        (b"\xff\xfe\x00name", "mine.yaml"),
    ],
    ids=["field", "section", "value", "nan", "shape", "syntax", "list", "empty", "binary"],
)
def test_a_wrong_config_file_is_refused_in_one_line(content: str | bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, content))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_config_file_that_is_not_there_is_refused_with_its_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path / name)):
        load_config(tmp_path / name)


def test_the_global_batch_is_cut_into_whole_steps() -> None:
    assert accumulation_steps(32, WorkersConfig(num_workers=4, micro_batch=2)) == 4
    with pytest.raises(ConfigError, match=r"global_batch=30 .*num_workers=4 .*micro_batch=2 = 8"):
        accumulation_steps(30, WorkersConfig(num_workers=4, micro_batch=2))


@pytest.mark.parametrize(
    ("global_batch", "num_workers", "micro_batch", "ways"),
    [
        (8, 3, 2, ["global_batch=6 or 12", "workers.num_workers=2"]),
        (30, 4, 2, ["global_batch=24 or 32", "workers.num_workers=3"]),
        (4, 8, 1, ["global_batch=8", "workers.num_workers=4"]),
    ],
)
def test_the_nearest_settings_that_work_are_told(
    global_batch: int, num_workers: int, micro_batch: int, ways: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(global_batch, WorkersConfig(num_workers=num_workers, micro_batch=micro_batch))
    told = str(caught.value)
    assert told.endswith(f"The nearest that work: {', or '.join(ways)}.")


@pytest.mark.parametrize(
    ("assignments", "told"),
    [
        (
            ["workers.offload_optimizer=true", "workers.zero_stage=0"],
            "workers: offload_optimizer=true .* zero_stage=1, 2",
        ),
        (["workers.offload_parameters=true"], "workers: offload_parameters=true needs zero_stage=3, not 2"),
        (["workers.offload_activations=true"], "workers: offload_activations=true .* needs num_gpus=1, not 0"),
        (["workers.accelerator_type=H100"], "workers: accelerator_type .* needs num_gpus=1, not 0"),
        (["workers.num_gpus=0.5"], "workers: num_workers=2 with num_gpus=0.5 .* NCCL"),
        (["tuning.freeze=[vision_tower, projector, language_model]"], "tuning: freeze names all parts"),
        (["tuning.freeze=[projector]", "tuning.projector_learning_rate=1"], "tuning: freeze names the projector"),
        (["tuning.method=qlora", "workers.zero_stage=3"], "tuning.method=qlora cannot .* workers.zero_stage=3"),
        (
            ["tuning.projector_learning_rate=1", "model.engine=vllm"],
            "model.engine=vllm applies .* language_model and proj",
        ),
        (["actors.merge_adapter=true", "model.engine=vllm"], "leave out actors.merge_adapter=true"),
        (["sft.mix={a: 1}"], "sft: mix has one source, a; name at least two"),
        (["sft.mix={a: 1, b: 0}"], "sft: mix gives b the weight 0; it must be above 0, and may"),
        (["sft.mix={a: 1, b: -2}"], "sft: mix gives b the weight -2; it must be above 0"),
        (["sft.mix={a: 1, b: 2}", "sft.mix_end={a: 1, b: -1}"], "sft: mix gives b the weight -1"),
        (["sft.mix={a: 0, b: 1}", "sft.mix_end={a: 0, b: 1}"], "sft: mix gives a the weight 0"),
        (
            ["sft.mix={a: 1, b: 2}", "sft.mix_end={a: 1, c: 1}"],
            "sft: mix and mix_end must name .* only one .* has b, c",
        ),
        (["sft.mix_end={a: 1, b: 2}"], "sft: mix_end needs mix"),
        (["sft.mix_unit=tokens"], "sft: mix_unit needs mix"),
        (["sft.num_tokens=1000", "sft.num_steps=3"], "sft: num_tokens and num_steps both say when to stop"),
        (["sft.num_tokens=1000", "sft.num_epochs=3"], "sft: num_tokens and num_epochs both say when to stop"),
        (["sft.image=none", "sft.prior_alpha=1"], "sft: prior_alpha counts what images bring, and image=none leaves"),
        (["sft.image=none", "sft.num_tokens=9"], "sft: num_tokens counts what images bring"),
        (["sft.image=none", "sft.mix={a: 1, b: 1}", "sft.mix_unit=tokens"], "sft: mix_unit=tokens .* image=none"),
        (["sft.start_learning_rate=1e-5", "sft.schedule=constant"], "sft: start_learning_rate .* not constant"),
        (["dpo.start_learning_rate=1"], "dpo: start_learning_rate=1 is above learning_rate="),
        (["tuning.freeze=[vision_tower]", "model.engine=vllm"], "model.engine=vllm applies .* language_model and proj"),
    ],
)
def test_settings_of_training_that_contradict_each_other_are_one_line(assignments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        apply_overrides(recipe("demo").config, assignments)
    assert "\n" not in str(caught.value)


def test_a_suggestion_is_made_only_when_something_is_near() -> None:
    assert nearest("sorce", ["source", "shard_size"]) == " Did you mean 'source'?"
    assert nearest("xyz", ["source", "shard_size"]) == ""
    assert issubclass(ConfigError, UserError), "a mistake of the user's, told without a traceback"


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\ndpo: {beta: 0.1}\ndpo:\n  alpha: 0.1\n")
    with pytest.raises(ConfigError, match="the key 'dpo' stands there twice"):
        load_config(file)
