"""Regularization of the 150,690-parameter net on CIFAR-10.

    python -m orchestrator.search cifar10_efficient200k

The baselines are the published recipe's settings (87.42% claimed, unproven) and the advice its authors give.
"""

from optuna.distributions import FloatDistribution, IntDistribution

from search_spaces.space import Budget, SearchSpace
from trainables.config import TrainConfig

SPACE = SearchSpace(
    base=TrainConfig(dataset="cifar10", backbone="efficient200k", batch_size=128, lr=0.05, ema_decay=0.999),
    dimensions={
        "dropout": FloatDistribution(0.0, 0.5),
        "weight_decay": FloatDistribution(1e-5, 1e-2, log=True),
        "mixup_alpha": FloatDistribution(0.0, 1.0),
        "lr": FloatDistribution(5e-3, 0.5, log=True),
        "label_smoothing": FloatDistribution(0.0, 0.2),
        "cutout_size": IntDistribution(0, 16, step=4),
    },
    baselines=(
        {"dropout": 0.2, "weight_decay": 1e-4, "label_smoothing": 0.1, "mixup_alpha": 0.2, "cutout_size": 8},
        {"dropout": 0.1, "weight_decay": 5e-4, "label_smoothing": 0.0, "mixup_alpha": 0.0, "cutout_size": 0},
    ),
    budget=Budget(num_trials=24, max_epochs=27),
)
