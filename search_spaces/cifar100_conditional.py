"""Which mixing, which policy and which of two small nets suit CIFAR-100: dimensions that depend on each other.

    python -m orchestrator.search cifar100_conditional --data-dir DIR
    python -m orchestrator.search cifar100_conditional --data-dir DIR --train-fraction 0.1 --max-epochs 9

An image is mixed by mixup, by CutMix or not at all: the probabilities switch them on, each with an alpha of its own.
"""

from search_spaces.conditional import Suggestions
from search_spaces.space import Budget, SearchSpace
from trainables.config import TrainConfig


def define(trial: Suggestions) -> None:
    """The regularization of a trial, and its net."""
    trial.suggest_float("lr", 1e-2, 0.5, log=True)
    trial.suggest_float("weight_decay", 1e-5, 1e-2, log=True)
    trial.suggest_float("label_smoothing", 0.0, 0.2)
    trial.suggest_float("dropout", 0.0, 0.5)
    if trial.suggest_categorical("backbone", ("small_cnn", "efficient200k")) == "efficient200k":
        trial.suggest_categorical("ema_decay", (0.0, 0.99, 0.999))
    if trial.suggest_categorical("mixup_probability", (0.0, 1.0)):
        trial.suggest_float("mixup_alpha", 0.1, 1.0)
    elif trial.suggest_categorical("cutmix_probability", (0.0, 1.0)):
        trial.suggest_float("cutmix_alpha", 0.1, 1.0)
    if trial.suggest_categorical("policy", ("none", "randaugment")) == "randaugment":
        trial.suggest_int("randaugment_magnitude", 1, 15)
    else:
        trial.suggest_int("cutout_size", 0, 16, step=4)


SPACE = SearchSpace(
    base=TrainConfig(
        dataset="cifar100",
        backbone="small_cnn",
        batch_size=128,
        lr=0.1,
        mixup_alpha=0.2,
        mixup_probability=0.0,
        cutmix_alpha=1.0,
        cutmix_probability=0.0,
        randaugment_num_ops=1,
    ),
    define=define,
    baselines=(
        {"dropout": 0.1},
        {"mixup_probability": 1.0, "label_smoothing": 0.1, "cutout_size": 16},
        {"backbone": "efficient200k", "cutmix_probability": 1.0, "policy": "randaugment"},
    ),
    budget=Budget(num_trials=48, max_epochs=27),
)
