"""The tables between the stages, written down once: every column with its unit and meaning.

Every table is checked against its schema when it is written and when it is read. The schemas carry the feature
description of Hugging Face `datasets`, so that `load_dataset("parquet", ...)` gives an Image feature and TRL's
trainers take the files as they are.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import pyarrow as pa

from stic_ray.core.columns import IMAGE, MESSAGES
from stic_ray.core.columns import column as _column
from stic_ray.core.columns import schema as _schema

CORRUPTION = pa.struct(
    [
        ("kind", pa.string()),
        ("shorter_side_px", pa.int32()),
        ("brightness_factor", pa.float64()),
        ("hue_shift_turns", pa.float64()),
        ("brightness_first", pa.bool_()),
        ("strength", pa.float64()),
        ("seed", pa.int64()),
    ]
)
"""What was done to an image: `low_resolution` (shorter_side_px), `colour_jitter` (the next three), or another kind
with its strength, 0 to 1, and the seed of what it draws (method/corruption.py); others are null."""


class Reason(StrEnum):
    """Why a row was rejected: the closed list."""

    EMPTY_FILE = "empty_file"
    UNREADABLE_FILE = "unreadable_file"
    UNSUPPORTED_FORMAT = "unsupported_format"
    UNDECODABLE_IMAGE = "undecodable_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_SMALL = "too_small"
    ASPECT_RATIO = "aspect_ratio"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    CORRUPTION_CHANGED_NOTHING = "corruption_changed_nothing"
    EMPTY_ANSWER = "empty_answer"
    IDENTICAL_ANSWERS = "identical_answers"
    TRUNCATED_ANSWER = "truncated_answer"
    TOO_LONG = "too_long"
    BAD_CONVERSATION = "bad_conversation"
    UNREADABLE_ROW = "unreadable_row"
    NO_IMAGE = "no_image"
    NO_CAPTION = "no_caption"
    SEVERAL_IMAGES = "several_images"
    VIDEO = "video"
    AUDIO = "audio"
    NO_SCORE = "no_score"
    GAP_TOO_SMALL = "gap_too_small"
    BELOW_THRESHOLD = "below_threshold"
    NOT_IN_TOP_SHARE = "not_in_top_share"
    NO_MAJORITY = "no_majority"
    UNBALANCED_LENGTHS = "unbalanced_lengths"
    NO_QUESTION = "no_question"
    TOO_EASY = "too_easy"
    NO_MATCH = "no_match"
    ENGINE_FAILED = "engine_failed"
    UNEXPECTED_ERROR = "unexpected_error"
    """The row raised what nothing was prepared for; its message has the error's type."""


_REJECTION = (
    _column("reason", pa.string(), "one of `Reason`"),
    _column("message", pa.string(), "the case in words, with the value that was refused"),
)

INDEX = _schema(
    _column("image_id", pa.string(), "128-bit BLAKE2b of the encoded bytes, in hex: stable under renaming"),
    _column("position", pa.int64(), "place in the pool's order, from 0; the pool of size N is position < N"),
    _column("path", pa.string(), "path or URI of the file that holds the image"),
    _column("row", pa.int64(), "row in a Parquet or Arrow file; null for others", nullable=True),
    _column("offset", pa.int64(), "first byte in a file that holds it as it is (tar, Arrow, Parquet)", nullable=True),
    _column("width_px", pa.int32(), "after the EXIF orientation"),
    _column("height_px", pa.int32(), "after the EXIF orientation"),
    _column("format", pa.string(), "as its content says: JPEG, PNG, WEBP, GIF, BMP, TIFF"),
    _column("mode", pa.string(), "Pillow's name of the pixel layout before conversion to RGB"),
    _column("num_bytes", pa.int64(), "size of the encoded image"),
    _column("perceptual_hash", pa.int64(), "64-bit pHash; null unless near-duplicates are rejected", nullable=True),
    _column("caption", pa.string(), "the caption that the source gives the image; null without one", nullable=True),
)

REJECTED = _schema(
    _column("image_id", pa.string(), "as in the index; of instruction data, the row's own id"),
    _column("path", pa.string(), "path or URI that the row came from"),
    *_REJECTION,
)

FAILED = _schema(
    _column("image_id", pa.string(), "as in the rejected rows"),
    _column("path", pa.string(), "path or URI that the row came from"),
    _column("message", pa.string(), "what was in the way: storage, credentials, an engine"),
)
"""Rows that could not be done, for a reason outside of them: the same command tries them again."""

CAPTIONS = _schema(
    _column("image_id", pa.string(), "as in the index"),
    _column("position", pa.int64(), "as in the index"),
    _column("round", pa.int32(), "of self-training, from 1"),
    _column("kind", pa.string(), "`self`, or `specialist:NAME`"),
    _column("prompt", pa.string(), "the prompt or question that it answers"),
    _column("text", pa.string(), "the caption"),
    _column("num_tokens", pa.int64(), "generated tokens"),
    _column("finish_reason", pa.string(), "`stop`, or `length` at the token limit"),
    _column("model", pa.string(), "path or hub id of the model that wrote it"),
    _column("model_revision", pa.string(), "revision of a hub id, or a hash of the weights' index"),
    _column("seed", pa.int64(), "of the step"),
)
"""What models write about the images: a row each, several of an image with where they come from."""

CANDIDATES = _schema(
    _column("image_id", pa.string(), "as in the index"),
    _column("position", pa.int64(), "as in the index"),
    _column("number", pa.int32(), "which of the image's answers, from 0"),
    _column("prompt", pa.string(), "the prompt that it answers"),
    _column("filed_under", pa.string(), "the plain prompt that the image's answers are trained under"),
    _column("text", pa.string(), "the answer"),
    _column("num_tokens", pa.int64(), "generated tokens"),
    _column("finish_reason", pa.string(), "`stop`, or `length` at the token limit"),
    _column("num_image_tokens", pa.int64(), "positions that hold a piece of the image"),
    _column("num_added_tokens", pa.int64(), "by how many tokens the image makes a conversation longer than its text"),
    _column("model", pa.string(), "path or hub id of the model that answered"),
    _column("model_revision", pa.string(), "revision of a hub id, or a hash of the weights' index"),
    _column("seed", pa.int64(), "the run's seed"),
)
"""Several answers of an image: a row each, in the order of images and numbers."""

SCORES = _schema(
    _column("image_id", pa.string(), "as in the index"),
    _column("number", pa.int32(), "the candidate; null for a score of the image itself", nullable=True),
    _column("scorer", pa.string(), "what gave the score"),
    _column("value", pa.float64(), "higher is better, whatever the scorer"),
)
"""What is thought of an answer, or of an image."""

STATEMENTS = _schema(
    _column("image_id", pa.string(), "as in the index"),
    _column("number", pa.int32(), "the candidate that says so"),
    _column("question", pa.string(), "one of its statements, as a question that yes or no answers"),
    _column("p_yes", pa.float64(), "probability of yes against no, 0 to 1"),
)
"""What scorer `claims` asked: a row for each statement of a candidate."""

DECISIONS = _schema(
    _column("image_id", pa.string(), "as in the index"),
    _column("number", pa.int32(), "the candidate"),
    _column("score", pa.float64(), "of all scorers that count together; null where one gave it none", nullable=True),
    _column(
        "taken",
        pa.string(),
        "`chosen`, `rejected` or, where it was chosen and rejected, `both`; null if neither",
        nullable=True,
    ),
    _column("reason", pa.string(), "one of `Reason`, where a rule kept it from being taken", nullable=True),
)
"""What the rules made of the candidates: a row each."""

PAIRS = _schema(
    _column("image_id", pa.string(), "as in the index"),
    _column("position", pa.int64(), "as in the index"),
    _column("image", IMAGE, "the clean image as it came; PNG where `datasets` would not show it as the model saw it"),
    _column("prompt", MESSAGES, "the plain prompt that both answers are filed under"),
    _column("chosen", MESSAGES, "answer to the step-by-step prompt on the clean image"),
    _column("rejected", MESSAGES, "answer to the hallucination prompt, or to the corrupted image"),
    _column("more_rejected", pa.list_(MESSAGES), "further dispreferred answers; null without", nullable=True),
    _column("rejected_image", IMAGE, "the picture that the chosen answer does not fit; null without", nullable=True),
    _column("chosen_prompt", pa.string(), "the prompt that produced `chosen`"),
    _column("rejected_prompt", pa.string(), "the prompt that produced `rejected`"),
    _column(
        "negative", pa.string(), "`hallucination_prompt`, `corrupted_image`, or another kind of dispreferred answer"
    ),
    _column("corruption", CORRUPTION, "the corruption as applied; null on a clean image", nullable=True),
    _column("rejected_image_corruption", CORRUPTION, "how `rejected_image` was made of the image", nullable=True),
    _column("chosen_number", pa.int32(), "the candidate that was chosen; null without candidates", nullable=True),
    _column("rejected_numbers", pa.list_(pa.int32()), "the candidates that were rejected", nullable=True),
    _column("chosen_score", pa.float64(), "by which it was chosen", nullable=True),
    _column("rejected_scores", pa.list_(pa.float64()), "by which they were rejected", nullable=True),
    _column("pixel_change", pa.float64(), "mean absolute change, 0 to 255; null if clean", nullable=True),
    _column("num_image_tokens", pa.int64(), "positions that hold a piece of the clean image"),
    _column("num_chosen_tokens", pa.int64(), "generated tokens"),
    _column("num_rejected_tokens", pa.int64(), "generated tokens"),
    _column("num_sequence_tokens", pa.int64(), "image, prompt and the longer answer, as trained on"),
    _column("chosen_finish_reason", pa.string(), "`stop`, or `length` at the token limit"),
    _column("rejected_finish_reason", pa.string(), "`stop`, or `length` at the token limit"),
    _column("reference_chosen_logp", pa.float64(), "log p of `chosen` under the model that answered", nullable=True),
    _column("reference_rejected_logp", pa.float64(), "log p of `rejected`, likewise; null if not asked", nullable=True),
    _column("model", pa.string(), "path or hub id of the model that answered"),
    _column("model_revision", pa.string(), "revision of a hub id, or a hash of the weights' index"),
    _column("seed", pa.int64(), "the run's seed"),
)

INFUSED = _schema(
    _column("id", pa.string(), "the row's id in the source"),
    _column("image", IMAGE, "as in the pairs; null in the text-only files", nullable=True),
    _column("messages", MESSAGES, "the conversation, the description in front of the first question"),
    _column("description", pa.string(), "the model's description of the image; null without one", nullable=True),
    _column("description_prompt", pa.string(), "the prompt that asked for it", nullable=True),
    _column("finish_reason", pa.string(), "of the description: `stop` or `length`", nullable=True),
    _column("num_sequence_tokens", pa.int64(), "image and conversation, as trained on"),
    _column(
        "text_logps",
        pa.list_(pa.float32()),
        "log p of each token of the answers under a model that sees no image; null if not asked",
        nullable=True,
    ),
    _column("model", pa.string(), "path of the model that described; null where none was asked to", nullable=True),
)

PROVENANCE = _schema(
    _column("image_id", pa.string(), "as in the index"),
    _column("source", pa.string(), "`original`, `recaption` or `both`: which captions its text is made of"),
    _column("num_words", pa.int64(), "of that text"),
    _column("num_specialist_turns", pa.int64(), "questions and answers behind it"),
)
"""Where the text of a row of stage `corpus` came from: a row for each."""

QUESTIONS = _schema(
    _column("image_id", pa.string(), "as in the index"),
    _column("position", pa.int64(), "as in the index"),
    _column("number", pa.int32(), "which of the image's questions, from 0"),
    _column("asked_with", pa.string(), "the prompt that asked for a question"),
    _column("question", pa.string(), "the question; what the model wrote in its place where there was none"),
    _column("answers", pa.list_(pa.string()), "the model's answers, in order; none to a question that was dropped"),
    _column("answer", pa.string(), "the most frequent one; null where there is none", nullable=True),
    _column("share", pa.float64(), "share of the answers that are the same as it, 0 to 1"),
    _column("reason", pa.string(), "why it was dropped, one of `Reason`; null where it was kept", nullable=True),
    _column("model", pa.string(), "path or hub id of the model that asked and answered"),
    _column("model_revision", pa.string(), "revision of a hub id, or a hash of the weights' index"),
    _column("seed", pa.int64(), "the run's seed"),
)
"""What the model asked itself, and what it answered: a row for each question."""

EXPORTED_QUESTIONS = _schema(
    _column("data_source", pa.string(), "names the reward function to a framework"),
    _column("prompt", MESSAGES, "the question, with <image> where the picture belongs"),
    _column("images", pa.list_(IMAGE), "the picture"),
    _column("ability", pa.string(), "a label"),
    _column(
        "reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())]), "the majority's answer"
    ),
    _column(
        "extra_info",
        pa.struct([("split", pa.string()), ("index", pa.int64()), ("question", pa.string()), ("share", pa.float64())]),
        "what a reward function may look at",
    ),
    _column("problem", pa.string(), "`prompt` as one text, for frameworks without messages"),
    _column("answer", pa.string(), "the majority's answer, likewise"),
)
"""Kept questions as verl (`prompt`, `reward_model`) and EasyR1 (`problem`, `answer`) read them."""

PREDICTIONS = _schema(
    _column("benchmark", pa.string(), "name of the benchmark file, without its ending"),
    _column("id", pa.string(), "the question's id"),
    _column("image", pa.string(), "path or URI, with #row in a table; null for a question without", nullable=True),
    _column("model", pa.string(), "`base`, `dpo`, `sft`, or the name given to a single model"),
    _column("mode", pa.string(), "`direct` or `describe_and_respond`"),
    _column("prompt", pa.string(), "the question as the model got it"),
    _column("description", pa.string(), "the model's own, in describe_and_respond", nullable=True),
    _column("response", pa.string(), "the model's answer as it came"),
    _column("prediction", pa.string(), "the answer, or the objects, read out of the response; empty if none was found"),
    _column("answers", pa.list_(pa.string()), "accepted answers; of metrics of objects, all that are there"),
    _column("metric", pa.string(), "how it was scored; a question with several has a row for each"),
    _column("score", pa.float64(), "0 to 1; the metric says whether higher is better"),
    _column("finish_reason", pa.string(), "of the response: `stop` or `length`"),
)


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Build a table of `rows` that is checked against `schema`. Raises ValueError for a column it does not have."""
    unknown = sorted(set(rows[0]) - set(schema.names)) if rows else []
    if unknown:
        raise ValueError(f"Row has the columns {unknown}, which its schema does not know.")
    return check(pa.Table.from_pylist(list(rows), schema=schema), schema)


def check(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `table` with exactly the columns of `schema`, or raise ValueError naming the column at fault."""
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise ValueError(f"Table lacks the columns {missing}; it has {table.column_names}.")
    table = table.select(schema.names)
    for column in schema:
        found = table.schema.field(column.name).type
        if found != column.type:
            raise ValueError(f"Column '{column.name}' is {found}, its schema says {column.type}.")
        if (column.metadata or {}).get(b"required") == b"yes" and table[column.name].null_count:
            raise ValueError(f"Column '{column.name}' holds nulls, its schema allows none.")
    return table.cast(schema)
