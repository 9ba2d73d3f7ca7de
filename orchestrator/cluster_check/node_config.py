"""node_config against botocore's model of EC2's RunInstances, which gets it from Ray as it is. Needs no account."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from orchestrator.cluster_check.document import Document, Finding, Place, did_you_mean

OF_RAY = ("SubnetIds",)  # Ray tries them in turn and passes on one
WHOLE_NUMBERS = ("integer", "long")
NUMBERS = ("float", "double")


def has_botocore() -> bool:
    """Whether the model is there to check against."""
    try:
        importlib.import_module("botocore")
    except ImportError:
        return False
    return True


@lru_cache(maxsize=1)
def _loader() -> Any:
    """botocore's own data alone: a session would read the user's configuration, and fail where that is broken."""
    loaders = importlib.import_module("botocore.loaders")
    return loaders.Loader(
        extra_search_paths=[loaders.Loader.BUILTIN_DATA_PATH],
        include_default_search_paths=False,
    )


@lru_cache(maxsize=1)
def _model() -> Any:
    return importlib.import_module("botocore.model").ServiceModel(_loader().load_service_model("ec2", "service-2"))


def known_regions() -> list[str]:
    """Regions that botocore knows EC2 in, of all partitions."""
    endpoints = importlib.import_module("botocore.regions").EndpointResolver(_loader().load_data("endpoints"))
    partitions = endpoints.get_available_partitions()
    return [region for name in partitions for region in endpoints.get_available_endpoints("ec2", name)]


def node_config_findings(document: Document) -> Iterator[Finding]:
    """Unknown keys and wrong types in every node type's node_config."""
    if not has_botocore():
        yield document.warning(
            ("available_node_types",),
            "node_config and region were not checked, since boto3 is not installed, which ray up needs too: "
            "pip install -c constraints.txt -e '.[aws]'",
        )
        return
    shape = _model().operation_model("RunInstances").input_shape
    for name, node_type in document.mapping("available_node_types").items():
        config = node_type.get("node_config") if isinstance(node_type, dict) else None
        if isinstance(config, dict):
            place = ("available_node_types", name, "node_config")
            yield from _structure(document, place, config, shape)
            yield from _set_by_ray(document, place, config)


def _set_by_ray(document: Document, place: Place, config: dict[Any, Any]) -> Iterator[Finding]:
    for key, instead in (("SubnetId", "write SubnetIds: [...]"), ("MinCount", "remove it"), ("MaxCount", "remove it")):
        if key in config:
            yield document.warning((*place, key), f"Ray sets {key} itself, so this one is not used; {instead}")


def _value(document: Document, place: Place, value: Any, shape: Any) -> Iterator[Finding]:
    if shape.type_name == "structure":
        yield from _structure(document, place, value, shape)
    elif shape.type_name == "list":
        yield from _list(document, place, value, shape)
    elif shape.type_name == "string":
        yield from _text(document, place, value, shape)
    elif shape.type_name == "boolean" and not isinstance(value, bool):
        yield _mistyped(document, place, value, "true or false")
    elif shape.type_name in WHOLE_NUMBERS and (isinstance(value, bool) or not isinstance(value, int)):
        yield _mistyped(document, place, value, "a whole number")
    elif shape.type_name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
        yield _mistyped(document, place, value, "a number")


def _structure(document: Document, place: Place, value: Any, shape: Any) -> Iterator[Finding]:
    if not isinstance(value, dict):
        yield _mistyped(document, place, value, f"a mapping with some of {', '.join(list(shape.members)[:6])}")
        return
    for key, part in value.items():
        if key in shape.members:
            yield from _value(document, (*place, key), part, shape.members[key])
        elif not (place[-1] == "node_config" and key in OF_RAY):
            yield document.error(
                (*place, key), f"{key} is no setting of {place[-1]} in EC2's RunInstances{_choices(key, shape.members)}"
            )


def _choices(key: object, members: Any) -> str:
    return did_you_mean(key, members) or ("" if len(members) > 12 else f"; it has {', '.join(members)}")


def _list(document: Document, place: Place, value: Any, shape: Any) -> Iterator[Finding]:
    if not isinstance(value, list):
        yield _mistyped(document, place, value, "a list")
        return
    for position, part in enumerate(value):
        yield from _value(document, (*place, position), part, shape.member)


def _text(document: Document, place: Place, value: Any, shape: Any) -> Iterator[Finding]:
    if not isinstance(value, str):
        yield _mistyped(document, place, value, "text (in quotes if need be)")
    elif shape.enum and value not in shape.enum:
        few = f" of {', '.join(shape.enum)}" if len(shape.enum) <= 10 else ""
        what = "instance type" if place[-1] == "InstanceType" else str(place[-1])
        version = importlib.import_module("botocore").__version__
        yield document.error(
            place,
            f"{value} is no {what}{few} that EC2 has (botocore {version})"
            + (did_you_mean(value, shape.enum) or "; correct it, or upgrade boto3 if it is new"),
        )


def _mistyped(document: Document, place: Place, value: object, wanted: str) -> Finding:
    names = [str(step) for step in place if not isinstance(step, int)]
    return document.error(place, f"{names[-1]} is {str(value)[:60]!r}, but EC2 wants {wanted}")
