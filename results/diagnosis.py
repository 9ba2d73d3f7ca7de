"""Whether a model is regularized too little or too much, from three accuracies of the same epoch."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["under-regularized", "balanced", "over-regularized", "underfit"]

MOST = 0.5
LITTLE = 0.25
FITTED = 0.95
LOAD = 0.05


def regularization_verdict(
    *, train_accuracy: float, clean_train_accuracy: float, val_accuracy: float | None
) -> Verdict | None:
    """The verdict on one epoch; None without validation.

    `train_accuracy` is on the augmented and mixed images as trained on, `clean_train_accuracy` on plain training
    images. "Validation above training" compares the first with validation and says little: the second tells a
    network that cannot fit its training images from one that is kept from it. Of the validation error, the part that
    plain training images do not show is the generalization gap:

    - under-regularized: at least half of the validation error is gap, and the images trained on are no harder for the
      network than those of validation: it has learned them by heart.
    - over-regularized: less than a quarter is gap, plain training images are not fitted (below 95%), and
      regularization takes five points or more off the accuracy in training: it costs fit and buys nothing.
    - underfit: the same, but regularization takes less than that: the network is too small, or trained too briefly or
      at a wrong rate.
    - balanced: everything else.

    The thresholds are this project's own. Figures of a few hundred images have an error of about two points, so a
    verdict near a threshold is not certain.
    """
    if val_accuracy is None:
        return None
    error = 1 - val_accuracy
    gap = clean_train_accuracy - val_accuracy
    if gap >= MOST * error and train_accuracy >= val_accuracy and error > 0:
        return "under-regularized"
    if gap >= LITTLE * error or clean_train_accuracy >= FITTED:
        return "balanced"
    return "over-regularized" if clean_train_accuracy - train_accuracy >= LOAD else "underfit"
