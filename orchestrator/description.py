"""What `ensemble.json` says: an ensemble's members, how they are combined, and what images they take.

Shape suffixes: M members, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from orchestrator.calibration import UNSCALED, Confidence
from orchestrator.combination import COMBINERS, Combination
from results.schema import FloatArray, Scalar, UsageError
from trainables.config import FIELD_TYPES, NUM_VIEWS, TrainConfig

FILE_NAME = "ensemble.json"
NATIVE_SHAPES = {"digits": (8, 1), "cifar10": (32, 3), "cifar100": (32, 3)}
"""Image size and channels of the datasets that have one of their own."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A trial's weights: `variant` says which of them, `views` what is averaged over.

    `weight` is what is shown of it: the combiner's own, or their mean over the classes. `temperature` is the one that
    its probabilities are tempered by before they are combined. `weights_file` is relative to the ensemble's folder,
    and empty when the weights had been removed before the ensemble was made.
    """

    experiment: str
    trial_id: str
    variant: str
    backbone: str
    weight: float
    temperature: float
    weights_file: str
    views: str
    config: Mapping[str, Scalar]

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.experiment}/{self.trial_id}" + ("" if self.variant == "best" else f" ({self.variant})")

    def train_config(self) -> TrainConfig:
        """The configuration that it was trained with; fields that an earlier version did not have are the defaults."""
        unknown = [name for name in self.config if name not in FIELD_TYPES]
        if unknown:
            raise UsageError(f"{self.name} was trained by a later version, with {', '.join(unknown)}; use that one")
        return TrainConfig(**self.config)  # type: ignore[arg-type]  # checked when it is made


@dataclass(frozen=True, kw_only=True, eq=False)
class Description:
    """An ensemble, its members' weights apart. `weights` are [M] or [M, C], as the combiner has them.

    Images have `channels` and `image_size` pixels a side. `further` is what else the file says, such as how the
    ensemble was chosen.
    """

    ensemble_id: str
    dataset: str
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    split_hash: str
    combiner: str
    weights: FloatArray
    temperature: float | None
    confidence: Confidence = UNSCALED
    members: tuple[Member, ...]
    further: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.image_size, self.channels) < 1:
            raise UsageError(f"images of {self.channels} channels and {self.image_size} pixels")
        if self.combiner not in COMBINERS:
            raise UsageError(f"there is no combiner {self.combiner!r}; there are {', '.join(COMBINERS)}")
        allowed = ((len(self.members),), (len(self.members), len(self.class_names)))
        if not self.members or self.weights.shape not in allowed:
            raise UsageError(f"weights of shape {self.weights.shape} for {len(self.members)} members")
        for member in self.members:
            member.train_config()  # checks it
            if member.views not in NUM_VIEWS:
                raise UsageError(f"{member.name} has views {member.views!r}; wanted one of {', '.join(NUM_VIEWS)}")

    @property
    def combination(self) -> Combination:
        """What turns the members' log-probabilities into the ensemble's."""
        temperatures_M = np.array([member.temperature for member in self.members])
        return Combination(self.combiner, self.weights, temperatures_M, self.temperature, self.confidence)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `ensemble.json`."""
        return {
            "ensemble_id": self.ensemble_id,
            "dataset": self.dataset,
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "channels": self.channels,
            "split_hash": self.split_hash,
            "combiner": self.combiner,
            "weights": self.weights.tolist(),
            "temperature": self.temperature,
            "confidence": asdict(self.confidence),
            "members": [{**asdict(member), "config": dict(member.config)} for member in self.members],
            **self.further,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Description:
        """The reverse of `to_json`. Raises UsageError, KeyError, TypeError or ValueError where it is not one."""
        lists = ("class_names", "weights", "members", "confidence")
        plain = {f.name: _plain(content, f) for f in fields(cls) if f.name not in {*lists, "further"}}
        confidence = content.get("confidence", asdict(UNSCALED))  # of an earlier version: not scaled
        return cls(
            **plain,
            class_names=tuple(map(str, content["class_names"])),
            weights=np.array(content["weights"], dtype=np.float64),
            confidence=Confidence(**{f.name: float(confidence[f.name]) for f in fields(Confidence)}),
            members=tuple(Member(**{f.name: _plain(one, f) for f in fields(Member)}) for one in content["members"]),
            further={name: value for name, value in content.items() if name not in {*plain, *lists}},
        )


PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, NoneType),
    "Mapping[str, Scalar]": (dict,),
}


def _plain(content: Mapping[str, Any], of: Field[Any]) -> Any:
    """A field's value, which must be of its type."""
    value = content[of.name]
    if not isinstance(value, PLAIN_TYPES[str(of.type)]) or isinstance(value, bool):
        raise TypeError(f"{of.name}={value!r} is no {of.type}")
    return value


def read_description(folder: Path) -> Description:
    """What a folder's `ensemble.json` says. Raises UsageError, naming the file, when it is missing or no such file."""
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Description.from_json(content)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give the folder of an ensemble") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({str(error).splitlines()[0]})"
        remedy = "restore it, or make the ensemble anew with python -m orchestrator.ensemble"
        raise UsageError(f"{path} {what}; {remedy}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def image_shape(info: Mapping[str, Any], config: TrainConfig, weights: Path) -> tuple[int, int]:
    """Image size and channels of what an experiment was trained on.

    `weights`: one of its safetensors files, which tells the channels where an experiment of an earlier version does
    not. Raises UsageError when there is no telling.
    """
    if "image_size" in info and "channels" in info:
        return info["image_size"], info["channels"]
    native = NATIVE_SHAPES.get(config.dataset, (None, None))
    image_size, channels = config.image_size or native[0], _channels_of(weights) or native[1]
    if image_size is None or channels is None:
        raise UsageError(
            f"experiment {info['name']!r} does not say how large its images are, since an earlier version recorded it; "
            f"go on with it once, by the command it was begun with and --resume"
        )
    return image_size, channels


def _channels_of(weights: Path) -> int | None:
    try:
        with safe_open(weights, framework="numpy") as file:
            return int(file.get_slice("mean_C11").get_shape()[0])
    except (OSError, SafetensorError):
        return None
