"""TrainConfig: everything that decides how one model is trained, checked once when it is made."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from results.schema import Scalar, UsageError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The randomness of a run comes from `seed` alone, keyed by (seed, epoch, example)."""

    dataset: str = "digits"
    backbone: str = "small_cnn"
    image_size: int | None = None
    """Side in pixels; None: the dataset's own, or at most 64 for folders of photographs."""
    train_fraction: float = 1.0
    """Share of the training split that is used, stratified; the other splits stay whole."""
    val_fraction: float | None = None
    """Share of the training images held out as select and estimate; None: a tenth (a fifth below 10,000)."""
    max_epochs: int = 9
    batch_size: int = 128
    lr: float = 0.1
    """Peak learning rate: linear warmup up to it, then a half cosine down to `final_lr_fraction` of it."""
    warmup_epochs: float = 1.0
    final_lr_fraction: float = 0.0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = False
    """Whether normalization parameters and biases are decayed like the weights."""
    label_smoothing: float = 0.0
    dropout: float = 0.0
    """Probability of dropping a feature before the classifier."""
    mixup_alpha: float = 0.0
    """Mixup (Zhang et al. 2018): each image is mixed with a partner by a weight from Beta(alpha, alpha)."""
    mixup_probability: float = 1.0
    """Share of the images that mixup touches."""
    crop_padding: int = 4
    flip: bool = True
    cutout_size: int = 0
    """Side in pixels of the square blanked out (DeVries & Taylor 2017), at most half the image's; 0: none."""
    cutout_probability: float = 1.0
    ema_decay: float = 0.0
    """Decay of the weights' exponential moving average; 0: none. Reported figures are then the average's."""
    monitor: str = "val_accuracy"
    """What the best epoch and patience go by: `val_accuracy` or `val_nll`. A search sets it to its metric."""
    patience: int = 0
    """Epochs without a better monitored figure after which training ends; 0: never early."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in FIELD_TYPES.items():
            value = getattr(self, name)
            if kind.accepts_int_as_float(value):
                object.__setattr__(self, name, float(value))
            elif not kind.accepts(value):
                raise UsageError(f"{name}={value!r}: wanted {kind}")
        for names, wanted, holds in RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise UsageError(f"{name}={value!r}: wanted {wanted}")

    def having(self, values: Mapping[str, Scalar]) -> TrainConfig:
        """A copy with fields set by name, checked like any other. Raises UsageError for wrong values."""
        return replace(self, **values)  # type: ignore[arg-type]  # checked when it is made

    def to_dict(self) -> dict[str, Scalar]:
        """The fields as plain values, in order."""
        return asdict(self)


@dataclass(frozen=True)
class FieldType:
    """What a field of TrainConfig may hold."""

    type: type
    optional: bool

    def __str__(self) -> str:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        return names[self.type] + (" or none" if self.optional else "")

    def accepts(self, value: object) -> bool:
        """Whether `value` is of the type; a bool is not a number."""
        return (value is None and self.optional) or type(value) is self.type

    def accepts_int_as_float(self, value: object) -> bool:
        """Whether `value` is a whole number given for a float."""
        return self.type is float and type(value) is int

    def parse(self, text: str) -> Scalar:
        """The value written as `text` on a command line. Raises ValueError."""
        lowered = text.strip().lower()
        if self.optional and lowered in {"none", "null"}:
            return None
        if self.type is bool:
            if lowered not in {"true", "false", "1", "0", "yes", "no"}:
                raise ValueError(text)
            return lowered in {"true", "1", "yes"}
        return typing.cast("Scalar", self.type(text))


def _field_type(annotation: Any) -> FieldType:
    if isinstance(annotation, types.UnionType):
        (inner,) = (arg for arg in typing.get_args(annotation) if arg is not type(None))
        return FieldType(inner, optional=True)
    return FieldType(annotation, optional=False)


FIELD_TYPES = {name: _field_type(hint) for name, hint in typing.get_type_hints(TrainConfig).items()}
ANNOTATIONS = {f.name: str(f.type) for f in fields(TrainConfig)}

RANGES: list[tuple[tuple[str, ...], str, typing.Callable[[Any], bool]]] = [
    (("train_fraction",), "a fraction in (0, 1]", lambda x: 0 < x <= 1),
    (("val_fraction",), "a fraction in [0, 1)", lambda x: 0 <= x < 1),
    (("max_epochs", "image_size"), "1 or more", lambda x: x >= 1),
    (("batch_size",), "2 or more: batch normalization needs them", lambda x: x >= 2),
    (("monitor",), "val_accuracy or val_nll", lambda x: x in {"val_accuracy", "val_nll"}),
    (("lr",), "a finite number above 0", lambda x: 0 < x < float("inf")),
    (("warmup_epochs", "weight_decay", "mixup_alpha"), "a finite number, 0 or more", lambda x: 0 <= x < float("inf")),
    (("crop_padding", "cutout_size", "patience"), "0 or more", lambda x: x >= 0),
    (("seed",), "0 or more, below 2**48", lambda x: 0 <= x < 2**48),
    (("momentum", "dropout", "label_smoothing", "ema_decay"), "a number in [0, 1)", lambda x: 0 <= x < 1),
    (
        ("mixup_probability", "cutout_probability", "final_lr_fraction"),
        "a probability or fraction in [0, 1]",
        lambda x: 0 <= x <= 1,
    ),
]


def parse_overrides(assignments: Iterable[str]) -> dict[str, Scalar]:
    """The fields set by `FIELD=VALUE` texts. Raises UsageError, listing the fields, for an unknown one."""
    overrides: dict[str, Scalar] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise UsageError(f"--set {assignment!r}: wanted FIELD=VALUE, such as dropout=0.1")
        if name not in FIELD_TYPES:
            raise UsageError(
                f"--set {assignment!r}: TrainConfig has no field {name!r}; there are {', '.join(FIELD_TYPES)}"
            )
        try:
            overrides[name] = FIELD_TYPES[name].parse(text)
        except ValueError as error:
            raise UsageError(f"--set {assignment!r}: wanted {FIELD_TYPES[name]}") from error
    return overrides
