"""Regularization strength on CIFAR-100 of a net that two CPU cores train: the search to begin with.

    python -m orchestrator.search cifar100 --data-dir DIR
    python -m orchestrator.search cifar100 --data-dir DIR --backbone speedrun_cnn_large --max-epochs 30
    python -m orchestrator.search cifar100 --data-dir DIR --train-fraction 0.1

Mixup of a searched strength touches up to half of the images, CutMix a searched share of them. The baselines are the
`speedrun` recipe as it is, the recipe without regularization, and a strongly regularized one.
`cifar100_resnet18` searches the same fields around the settings of published recipes, for a GPU.
"""

from dataclasses import replace

from optuna.distributions import FloatDistribution, IntDistribution

from search_spaces.space import Budget, SearchSpace
from trainables.recipes import SPEEDRUN

SPACE = SearchSpace(
    base=replace(SPEEDRUN, mixup_probability=0.5),
    dimensions={
        "dropout": FloatDistribution(0.0, 0.5),
        "weight_decay": FloatDistribution(1e-3, 1.0, log=True),
        "mixup_alpha": FloatDistribution(0.0, 1.0),
        "cutmix_probability": FloatDistribution(0.0, 0.75),
        "label_smoothing": FloatDistribution(0.0, 0.3),
        "cutout_size": IntDistribution(0, 16, step=4),
        "lr": FloatDistribution(3e-3, 3e-2, log=True),
    },
    baselines=(
        {},
        {"dropout": 0.0, "weight_decay": 1e-3, "cutmix_probability": 0.0, "label_smoothing": 0.0},
        {"dropout": 0.2, "mixup_alpha": 0.2, "cutmix_probability": 0.5, "cutout_size": 8},
    ),
    budget=Budget(num_trials=24, max_epochs=SPEEDRUN.max_epochs),
)
