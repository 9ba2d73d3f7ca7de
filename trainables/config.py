"""TrainConfig: everything that decides how one model is trained, checked once when it is made."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from results.schema import Scalar, UsageError

NUM_VIEWS = {"none": 1, "flip": 2, "flip_shift": 6}
"""Views of an image that each kind of test-time augmentation looks at."""


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
    pipeline: str = "resident"
    """`resident`: images in memory, augmented in batches where the model trains. Otherwise the name of an
    albumentations pipeline of `streaming.py`; the fields of augmentation from `crop_padding` on are then not used."""
    loader_workers: int = 0
    """Processes that decode and augment for a pipeline that is not resident; 0: the training process itself. Results
    do not depend on it."""
    max_epochs: int = 9
    seed: int = 0

    batch_size: int = 128
    accumulation_steps: int = 1
    """Parts in which a batch's gradient is computed, one after the other, to save memory. Batch normalization sees each
    part alone."""
    optimizer: str = "sgd"
    """`sgd`, `adamw` (Loshchilov & Hutter 2019) or `muon` (Jordan et al. 2024)."""
    lr: float = 0.1
    """Peak learning rate."""
    lr_batch_size: int | None = None
    """The batch size that `lr` is meant for: the rate is lr x batch_size / lr_batch_size (Goyal et al. 2017)."""
    head_lr_factor: float = 1.0
    """How many times the rate the classifier gets; above 1 when the rest has been trained before."""
    norm_bias_lr_factor: float = 1.0
    """How many times the rate the biases of normalization layers get (Page 2019; Jordan 2024 has 64)."""
    schedule: str = "cosine"
    """What follows the warmup: `cosine`, `cosine_restarts`, `one_cycle`, `warmup_stable_decay` or `constant`."""
    warmup_epochs: float = 1.0
    """Epochs of linear growth from `initial_lr_fraction` of the peak to it; at most half of the training is used."""
    initial_lr_fraction: float = 0.0
    final_lr_fraction: float = 0.0
    restart_epochs: int = 10
    """Length of the first cycle of `cosine_restarts`; each next one is twice as long (Loshchilov & Hutter 2017)."""
    decay_fraction: float = 0.2
    """Share of the epochs in which `warmup_stable_decay` falls, linearly (Haegele et al. 2024)."""
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = False
    """Whether normalization parameters and biases are decayed like the weights."""
    gradient_clip: float = 0.0
    """Largest norm of the whole gradient; larger ones are scaled down to it. 0: never."""
    ema_decay: float = 0.0
    """Decay of the weights' exponential moving average; 0: none. Reported figures are then the average's."""
    monitor: str = "val_accuracy"
    """What the best epoch and patience go by: `val_accuracy` or `val_nll`. A search sets it to its metric."""
    patience: int = 0
    """Epochs without a better monitored figure after which training ends; 0: never early."""
    unfreeze_epochs: int = 0
    """Progressive unfreezing (Howard & Ruder 2018): the classifier alone learns first, and one part after another
    joins it from the top, all by the end of so many epochs. 0: everything learns from the start."""
    stem_epochs: int = 0
    """Epochs in which the part next to the input learns; it is fixed after them, and needs no gradient. 0: all. Of the
    speedrun nets that part is the bias of the whitening (Jordan 2024: the first 3 epochs)."""
    snapshot_every: int = 0
    """Epochs between stored snapshots of the evaluated weights, which become variants of the trial; 0: none. 1 with
    snapshot_from=0.75 makes their mean that of SWA (Izmailov et al. 2018); `restart_epochs`, with `cosine_restarts` and
    no warmup, has the end of every cycle among them (Huang et al. 2017)."""
    snapshot_from: float = 0.0
    """Share of max_epochs before which no snapshot is stored."""
    initial_image_size: int | None = None
    """Progressive resolution (Touvron et al. 2019, Tan & Le 2021): side at which training begins, growing to the
    full one by `full_size_at`. None: full size throughout. Evaluation is always at full size."""
    full_size_at: float = 0.75
    """Share of the epochs after which images have their full size."""

    label_smoothing: float = 0.0
    dropout: float = 0.0
    """Probability of dropping a feature before the classifier."""
    mixup_alpha: float = 0.0
    """Mixup (Zhang et al. 2018): each image is mixed with a partner by a weight from Beta(alpha, alpha)."""
    mixup_probability: float = 1.0
    """Share of the images that mixup touches. Where the shares of the mixings that are on sum to more than 1, they are
    divided by the sum: an image is mixed in one way at most."""
    cutmix_alpha: float = 0.0
    """CutMix (Yun et al. 2019): a rectangle of a partner, whose share of the image is from Beta(alpha, alpha)."""
    cutmix_probability: float = 1.0
    ricap_beta: float = 0.0
    """RICAP (Takahashi et al. 2018): four images patched around a point drawn from Beta(beta, beta)."""
    ricap_probability: float = 1.0

    crop_padding: int = 4
    crop_fill: str = "black"
    """What a crop finds outside the image: `black` or `reflect`."""
    resized_crop_probability: float = 0.0
    """Share of the images that get a RandomResizedCrop (Szegedy et al. 2015), of the flipped image, in place of the
    padded one."""
    resized_crop_min_area: float = 0.08
    resized_crop_max_area: float = 1.0
    resized_crop_min_ratio: float = 3 / 4
    resized_crop_max_ratio: float = 4 / 3
    flip: bool = True
    alternating_flip: bool = False
    """With `flip`: each image in every other epoch instead of at random (Jordan 2024)."""
    affine_probability: float = 0.0
    affine_degrees: float = 15.0
    """Largest rotation, either way."""
    affine_translate: float = 0.0625
    """Largest shift, as a share of the side."""
    affine_scale: float = 0.1
    """Largest relative change of size, either way."""
    affine_shear_degrees: float = 0.0
    """Largest horizontal shear, either way."""
    jitter_probability: float = 0.0
    """Share of the images whose brightness, contrast and saturation, in this order, are changed by factors from 1 - x
    to 1 + x, and whose hue is then turned by up to x."""
    jitter_brightness: float = 0.0
    jitter_contrast: float = 0.0
    jitter_saturation: float = 0.0
    jitter_hue: float = 0.0
    """In turns of the colour circle, at most 0.5."""
    policy: str = "none"
    """`autoaugment_cifar10` (Cubuk et al. 2019), `randaugment` (Cubuk et al. 2020), `trivialaugment` (Mueller &
    Hutter 2021) or `none`."""
    policy_probability: float = 1.0
    """Share of the images that the policy is applied to."""
    randaugment_num_ops: int = 2
    randaugment_magnitude: int = 9
    """Of 0 to 30."""
    cutout_size: int = 0
    """Side in pixels of the square blanked out (DeVries & Taylor 2017), at most half the image's; 0: none."""
    cutout_probability: float = 1.0
    erasing_probability: float = 0.0
    """Random erasing (Zhong et al. 2020): a rectangle of 2 to 33% of the area, blanked out."""

    test_time_augmentation: str = "none"
    """`none`, `flip` (an image and its mirror image) or `flip_shift` (these, and shifted by a pixel each way):
    predictions averaged over the views are stored as variant `tta`, beside the plain ones."""

    distill_weight: float = 0.0
    """Share of the loss that follows a teacher's probabilities (Hinton et al. 2015); 0: there is no teacher."""
    distill_temperature: float = 4.0
    """By which the teacher's and the student's log-probabilities are divided where they are compared."""

    precision: str = "auto"
    """`float32`, `bfloat16` or `float16` for convolutions and products; auto: bfloat16 on a GPU, elsewhere float32. For
    all trials of a longer experiment on CPUs the commands replace auto by bfloat16 where steps of it are measured to
    be faster. `float64`: for the weights and everything that is computed with them."""
    compile: bool | None = None
    """Whether torch.compile builds the step; None: on a GPU."""
    cuda_graph: bool | None = None
    """Whether whole steps are replayed as a CUDA graph; None: on a GPU, unless the step is built anew along the way."""
    channels_last: bool = True
    """Whether pixels' channels lie together in memory."""
    sync_batch_norm: bool | None = None
    """Where several workers train one model: whether batch norms see whole batches. None: on GPUs; elsewhere, or if
    false, each worker normalizes its own share, and the running statistics are the workers' mean."""
    gradient_compression: str = "none"
    """`bfloat16`: what several workers add up are gradients rounded to it, half the bytes; `none`."""

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
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name}={getattr(self, name)!r}: wanted one of {', '.join(choices)}")
        self._refuse_nonsense()

    def _refuse_nonsense(self) -> None:
        """Raise UsageError for values that are fine alone and make no sense together."""
        if self.warmup_epochs > self.max_epochs:
            raise UsageError(
                f"warmup_epochs={self.warmup_epochs:g} is more than max_epochs={self.max_epochs}; lower the one or "
                f"raise the other"
            )
        if self.unfreeze_epochs > self.max_epochs:
            raise UsageError(
                f"unfreeze_epochs={self.unfreeze_epochs} is more than max_epochs={self.max_epochs}; lower the one or "
                f"raise the other"
            )
        for low, high in (
            ("resized_crop_min_area", "resized_crop_max_area"),
            ("resized_crop_min_ratio", "resized_crop_max_ratio"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise UsageError(f"{low}={getattr(self, low):g} is above {high}={getattr(self, high):g}")
        if self.patience and self.val_fraction == 0:
            raise UsageError(f"patience={self.patience} with val_fraction=0: there is no validation to go by; drop one")
        if self.accumulation_steps > self.batch_size // 2:
            raise UsageError(
                f"accumulation_steps={self.accumulation_steps} leaves parts of a single image of batch_size="
                f"{self.batch_size}; batch normalization needs two"
            )
        if self.precision == "float16" and self.optimizer == "muon":
            raise UsageError(
                "precision=float16 with optimizer=muon: the loss scaler cannot skip its steps; use bfloat16"
            )

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

PROBABILITIES = (
    "mixup_probability",
    "cutmix_probability",
    "ricap_probability",
    "resized_crop_probability",
    "affine_probability",
    "jitter_probability",
    "policy_probability",
    "cutout_probability",
    "erasing_probability",
)

RANGES: list[tuple[tuple[str, ...], str, typing.Callable[[Any], bool]]] = [
    (("train_fraction", "full_size_at"), "a fraction in (0, 1]", lambda x: 0 < x <= 1),
    (("val_fraction",), "a fraction in [0, 1)", lambda x: 0 <= x < 1),
    (
        ("max_epochs", "accumulation_steps", "restart_epochs", "lr_batch_size", "randaugment_num_ops"),
        "1 or more",
        lambda x: x >= 1,
    ),
    (("image_size",), "1 to 2048", lambda x: 1 <= x <= 2048),
    (("initial_image_size",), "8 or more", lambda x: x >= 8),
    (("batch_size",), "2 or more: batch normalization needs them", lambda x: x >= 2),
    (
        ("lr", "head_lr_factor", "norm_bias_lr_factor", "distill_temperature"),
        "a finite number above 0",
        lambda x: 0 < x < float("inf"),
    ),
    (
        ("warmup_epochs", "weight_decay", "mixup_alpha", "cutmix_alpha", "ricap_beta", "gradient_clip"),
        "a finite number, 0 or more",
        lambda x: 0 <= x < float("inf"),
    ),
    (
        (
            "crop_padding",
            "cutout_size",
            "patience",
            "unfreeze_epochs",
            "stem_epochs",
            "loader_workers",
            "snapshot_every",
        ),
        "0 or more",
        lambda x: x >= 0,
    ),
    (("seed",), "0 or more, below 2**48", lambda x: 0 <= x < 2**48),
    (
        ("momentum", "dropout", "label_smoothing", "ema_decay", "affine_scale", "snapshot_from"),
        "a number in [0, 1)",
        lambda x: 0 <= x < 1,
    ),
    (
        (
            *PROBABILITIES,
            "initial_lr_fraction",
            "final_lr_fraction",
            "decay_fraction",
            "affine_translate",
            "distill_weight",
        ),
        "a probability or fraction in [0, 1]",
        lambda x: 0 <= x <= 1,
    ),
    (("affine_degrees",), "0 to 180", lambda x: 0 <= x <= 180),
    (("affine_shear_degrees",), "0 to 60", lambda x: 0 <= x <= 60),
    (("jitter_brightness", "jitter_contrast", "jitter_saturation"), "a number in [0, 1]", lambda x: 0 <= x <= 1),
    (("jitter_hue",), "a number in [0, 0.5]", lambda x: 0 <= x <= 0.5),
    (("resized_crop_min_area", "resized_crop_max_area"), "a fraction in (0, 1]", lambda x: 0 < x <= 1),
    (("resized_crop_min_ratio", "resized_crop_max_ratio"), "a number in [0.1, 10]", lambda x: 0.1 <= x <= 10),
    (("randaugment_magnitude",), "0 to 30", lambda x: 0 <= x <= 30),
]

CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adamw", "muon"),
    "schedule": ("cosine", "cosine_restarts", "one_cycle", "warmup_stable_decay", "constant"),
    "monitor": ("val_accuracy", "val_nll"),
    "crop_fill": ("black", "reflect"),
    "policy": ("none", "autoaugment_cifar10", "randaugment", "trivialaugment"),
    "test_time_augmentation": ("none", "flip", "flip_shift"),
    "precision": ("auto", "float32", "bfloat16", "float16", "float64"),
    "gradient_compression": ("none", "bfloat16"),
    "pipeline": ("resident", "efficient200k", "food101"),
}


INTERLOCKED = (
    "backbone",
    "batch_size",
    "accumulation_steps",
    "optimizer",
    "precision",
    "cuda_graph",
    "initial_image_size",
    "warmup_epochs",
    "unfreeze_epochs",
    "patience",
    "resized_crop_min_area",
    "resized_crop_max_area",
    "resized_crop_min_ratio",
    "resized_crop_max_ratio",
)
"""The fields that may be right alone and wrong together."""


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
