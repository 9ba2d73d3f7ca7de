"""Whether a model is regularized too little or too much, from three accuracies of the same epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from results.schema import Scalar

Verdict = Literal["under-regularized", "balanced", "over-regularized", "underfit"]

MOST = 0.5
LITTLE = 0.25
FITTED = 0.95
LOAD = 0.05
STRONG_DECAY = 1e-3
MIXINGS = {
    "mixup_alpha": "mixup_probability",
    "cutmix_alpha": "cutmix_probability",
    "ricap_beta": "ricap_probability",
}


def regularization_verdict(
    *,
    train_accuracy: float,
    clean_train_accuracy: float,
    val_accuracy: float | None,
    progress: float = 0.0,
    regularized: bool = True,
) -> Verdict | None:
    """The verdict on one epoch; None without validation.

    `train_accuracy` is on the augmented and mixed images as trained on, as a share of what mixed labels allow at most;
    `clean_train_accuracy` is on plain training images. "Validation above training" compares the first with validation
    and says little: the second tells a network that cannot fit its training images from one that is kept from it. Of
    the validation error, the part that plain training images do not show is the generalization gap:

    - under-regularized: at least half of the validation error is gap, and the images trained on are no harder for the
      network than those of validation: it has learned them by heart.
    - over-regularized: less than a quarter is gap, plain training images are not fitted (below 95%), and training is
      harder than plain images by five points or more, by regularization: it costs fit and buys nothing.
    - underfit: the same, but regularization takes less than that: the network is too small, or trained too briefly or
      at a wrong rate.
    - balanced: everything else.

    The accuracy in training is a mean over the epoch, so part of the difference to plain images is what was learned
    meanwhile: `progress`, by how much it grew since the epoch before, is taken off. `regularized`: whether anything
    was on that could be blamed. The thresholds are this project's own. Figures of a few hundred images have an error of
    about two points, so a verdict near a threshold is not certain.
    """
    if val_accuracy is None:
        return None
    error = 1 - val_accuracy
    gap = clean_train_accuracy - val_accuracy
    if gap >= MOST * error and train_accuracy >= val_accuracy and error > 0:
        return "under-regularized"
    if gap >= LITTLE * error or clean_train_accuracy >= FITTED:
        return "balanced"
    load = clean_train_accuracy - train_accuracy - max(0.0, progress)
    return "over-regularized" if regularized and load >= LOAD else "underfit"


def explained(verdict: str, *, clean_train_accuracy: float, val_accuracy: float) -> str:
    """Return a verdict with the figures that it rests on, in points of accuracy.

    "balanced" does not say that training fits no better than validation. Part of every network's validation error is a
    generalization gap; the verdict says whether the gap is so large that stronger regularization is worth its cost in
    fit.
    """
    error, gap = 100 * (1 - val_accuracy), 100 * (clean_train_accuracy - val_accuracy)
    most, little = MOST * error, LITTLE * error
    because = {
        "under-regularized": f"{most:.0f} or more: training images are learned by heart",
        "balanced": _balance(gap, most=most, little=little),
        "over-regularized": f"less than {little:.0f}, and regularization makes training harder",
        "underfit": f"less than {little:.0f}, and regularization is not the reason",
    }
    return f"{verdict}: {gap:.0f} of {error:.0f} points of validation error are generalization gap ({because[verdict]})"


def _balance(gap: float, *, most: float, little: float) -> str:
    """Return why a gap in points is neither too much regularization nor too little."""
    if gap >= most:
        return "but the images trained on stay harder than those of validation"
    if gap < little:
        return "and training images are fitted"
    return f"under-regularized would be {most:.0f} or more, over-regularized less than {little:.0f}"


def is_regularized(config: Mapping[str, Scalar]) -> bool:
    """Whether a configuration makes training harder: by dropout, smoothing, mixing, augmentation or strong decay."""
    switches = [
        any(config.get(name) for name in ("dropout", "label_smoothing", "crop_padding", "flip")),
        any(config.get(strength) and config.get(share, 1.0) for strength, share in MIXINGS.items()),
        any(config.get(name) for name in ("cutout_size", "erasing_probability", "resized_crop_probability")),
        any(config.get(name) for name in ("affine_probability", "jitter_probability")),
        config.get("policy", "none") != "none",
        config.get("pipeline", "resident") != "resident",
        float(config.get("weight_decay") or 0) >= STRONG_DECAY,
    ]
    return any(switches)
