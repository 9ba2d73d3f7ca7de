"""What Ray itself says of a cluster file: its schema, and what `ray up` begins with. No network, no account."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.cluster_check.document import Document, Finding, did_you_mean

NAMES_OF_TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
}


def schema_findings(document: Document) -> Iterator[Finding]:
    """Where the file breaks Ray's schema, and all places at once, which Ray itself would name one by one."""
    jsonschema = importlib.import_module("jsonschema")
    autoscaler = importlib.import_module("ray.autoscaler")
    schema = json.loads((Path(str(autoscaler.__file__)).parent / "ray-schema.json").read_text())
    for error in jsonschema.Draft7Validator(schema).iter_errors(document.value):
        yield from _explained(document, error)


def _explained(document: Document, error: Any) -> Iterator[Finding]:
    place = tuple(error.absolute_path)
    where = ".".join(map(str, place)) or "the file"
    kind = document.at("provider", "type")
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for key in error.instance:
            if key in known or (key == "min_workers" and kind == "local" and not place):
                continue  # Ray takes the latter out before it validates
            yield document.error((*place, key), f"{key} is no setting of {where}{did_you_mean(key, known)}")
    elif error.validator == "required":
        missing = [name for name in error.validator_value if name not in error.instance]
        for name in missing:
            if name != "resources" or kind not in ("aws", None):  # AWS is asked what its instance types have
                yield document.error(place, f"{where} lacks {name}; add it")
    elif error.validator == "type":
        wanted = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        names = " or ".join(NAMES_OF_TYPES.get(name, str(name)) for name in wanted)
        given = _shortened(error.instance)
        if isinstance(error.instance, str) and not {"array", "object"} & set(wanted):
            given = f'the text "{given}"'  # which looks like what is wanted: "10", "false"
        yield document.error(place, f"{where} is {given}, but wanted is {names}")
    else:
        yield document.error(place, f"{where}: {_shortened(error.message)}; Ray's schema does not allow it")


def _shortened(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def preparation_findings(document: Document) -> Iterator[Finding]:
    """What Ray's own preparation and validation refuse, for a file in which nothing else was found wrong."""
    util = importlib.import_module("ray.autoscaler._private.util")
    click = importlib.import_module("click")
    jsonschema = importlib.import_module("jsonschema")
    config = copy.deepcopy(document.value)
    if document.at("provider", "type") == "aws":
        for node_type in config.get("available_node_types", {}).values():
            node_type.setdefault("resources", {})
    said = io.StringIO()
    logging.getLogger(util.__name__).setLevel(logging.WARNING)
    refusals = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            util.validate_config(util.prepare_config(config))
    except (*refusals, OSError, RuntimeError, TypeError, ValueError, click.ClickException) as error:
        yield document.error((), f"Ray refuses the file: {_shortened(error) or _shortened(said.getvalue())}")
    except jsonschema.ValidationError as error:
        yield document.error((), f"Ray refuses the file: {_shortened(error.message)}")
