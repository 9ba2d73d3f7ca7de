"""The demo: regularization of a small net on scikit-learn's 8x8 digits. No download, no GPU.

python -m orchestrator.search digits
"""

from optuna.distributions import FloatDistribution

from search_spaces.space import Budget, SearchSpace
from trainables.config import TrainConfig

SPACE = SearchSpace(
    base=TrainConfig(dataset="digits", backbone="small_cnn", batch_size=64, lr=0.05, crop_padding=1, flip=False),
    dimensions={
        "dropout": FloatDistribution(0.0, 0.5),
        "weight_decay": FloatDistribution(1e-5, 1e-2, log=True),
        "mixup_alpha": FloatDistribution(0.0, 1.0),
        "lr": FloatDistribution(5e-3, 0.3, log=True),
        "label_smoothing": FloatDistribution(0.0, 0.2),
    },
    baselines=(
        {"dropout": 0.0, "weight_decay": 5e-4, "mixup_alpha": 0.0, "label_smoothing": 0.0},
        {"dropout": 0.2, "weight_decay": 5e-4, "mixup_alpha": 0.2, "label_smoothing": 0.1},
    ),
    budget=Budget(num_trials=24, max_epochs=9),
)
