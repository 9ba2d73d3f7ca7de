"""Regularization strength of a ResNet-18, or any other backbone, on CIFAR-100: for a GPU.

    python -m orchestrator.search cifar100_resnet18 --data-dir DIR
    python -m orchestrator.search cifar100_resnet18 --data-dir DIR --backbone small_cnn --train-fraction 0.1

The baselines are the settings of the published ResNet44V2 and large-batch ResNet-50 recipes, and a plain run.
"""

from optuna.distributions import FloatDistribution, IntDistribution

from search_spaces.space import Budget, SearchSpace
from trainables.config import TrainConfig

SPACE = SearchSpace(
    base=TrainConfig(dataset="cifar100", backbone="resnet18", batch_size=128, lr=0.1),
    dimensions={
        "dropout": FloatDistribution(0.0, 0.5),
        "weight_decay": FloatDistribution(1e-5, 1e-2, log=True),
        "mixup_alpha": FloatDistribution(0.0, 1.0),
        "lr": FloatDistribution(1e-2, 0.5, log=True),
        "label_smoothing": FloatDistribution(0.0, 0.2),
        "cutout_size": IntDistribution(0, 16, step=4),
    },
    baselines=(
        {"dropout": 0.1, "weight_decay": 5e-4, "mixup_alpha": 0.0, "label_smoothing": 0.0, "cutout_size": 0},
        {"dropout": 0.0, "weight_decay": 5e-4, "mixup_alpha": 0.2, "label_smoothing": 0.1, "cutout_size": 16},
        {"dropout": 0.0, "weight_decay": 1e-5, "mixup_alpha": 0.0, "label_smoothing": 0.0, "cutout_size": 0},
    ),
    budget=Budget(num_trials=24, max_epochs=27),
)
