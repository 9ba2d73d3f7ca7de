"""Regularization strength on CIFAR-10 of a net that two CPU cores train.

    python -m orchestrator.search cifar10 --data-dir DIR

`cifar10_efficient200k` searches around the published recipe of a net of 150,690 parameters instead.
"""

from dataclasses import replace

from search_spaces import cifar100
from search_spaces.space import Budget

SPACE = replace(
    cifar100.SPACE,
    base=replace(cifar100.SPACE.base, dataset="cifar10"),
    budget=Budget(num_trials=24, max_epochs=12),
)
