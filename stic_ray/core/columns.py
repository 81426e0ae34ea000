"""What tables are made of: columns with a meaning, and the feature description of Hugging Face `datasets`."""

import json
from typing import Any

import pyarrow as pa

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Storage type of the Image feature of `datasets`: encoded bytes, and where they came from."""

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""A conversation, as TRL and chat templates take it."""


def column(name: str, kind: pa.DataType, meaning: str, *, nullable: bool = False) -> pa.Field:
    """Return a column; its meaning is for readers, and whether it may hold nulls for `schemas.check`."""
    # Arrow's own flag stays "nullable": `datasets` ignores the feature description of a column that is not.
    return pa.field(name, kind, metadata={"meaning": meaning, "required": "no" if nullable else "yes"})


def schema(*columns: pa.Field) -> pa.Schema:
    """Return the schema of a table, with the features that `datasets` reads."""
    plain = pa.schema(columns)
    features = {each.name: _feature(each.type) for each in plain}
    return plain.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> Any:
    """Describe an Arrow type in the JSON of `datasets.Features`."""
    if kind == IMAGE:
        return {"_type": "Image", "mode": "RGB"}
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _feature(kind.field(i).type) for i in range(kind.num_fields)}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    names = {"double": "float64"}
    return {"dtype": names.get(str(kind), str(kind)), "_type": "Value"}
