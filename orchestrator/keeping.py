"""Keeping the weights of an ensemble's members beside its description, whatever becomes of their trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.combination import Combination
from orchestrator.description import Description, Member, image_shape
from results.files import link_file
from results.predictions import SEEN_FROM_VIEWS
from results.store import Experiment
from trainables.config import TrainConfig

MEMBERS_FOLDER = "members"


@dataclass(frozen=True)
class MemberFiles:
    """Where the weights of a member lie in its own experiment: `experiment.weights(trial_id, variant)`."""

    experiment: str
    trial_id: str
    variant: str
    source: Path


@dataclass(frozen=True)
class Chosen:
    """A variant of a trial that was chosen as a member, by the weight that is shown of it."""

    experiment: Experiment
    trial_id: str
    variant: str
    weight: float

    @property
    def config(self) -> TrainConfig:
        """What it was trained with."""
        return TrainConfig(**self.experiment.history.trials[self.trial_id].started.config)  # type: ignore[arg-type]

    @property
    def files(self) -> MemberFiles:
        """Where its weights lie."""
        source = self.experiment.weights(self.trial_id, self.variant)
        return MemberFiles(self.experiment.name, self.trial_id, self.variant, source)

    def member(self, *, temperature: float, weights_file: str) -> Member:
        """What `ensemble.json` says of it."""
        return Member(
            experiment=self.experiment.name,
            trial_id=self.trial_id,
            variant=self.variant,
            backbone=self.config.backbone,
            weight=self.weight,
            temperature=temperature,
            weights_file=weights_file,
            views=self.config.test_time_augmentation if self.variant in SEEN_FROM_VIEWS else "none",
            config=self.config.to_dict(),
        )


def keep(
    folder: Path, chosen: Sequence[Chosen], combination: Combination, *, ensemble_id: str, further: Mapping[str, Any]
) -> Description:
    """Keep the weights of what was chosen in an ensemble's folder; what its `ensemble.json` is to say.

    `further`: how it was chosen. Raises UsageError where an experiment of an earlier version does not tell how large
    its images are.
    """
    info, files = chosen[0].experiment.info, [one.files for one in chosen]
    image_size, channels = image_shape(info, chosen[0].config, files[0].source)
    temperatures = combination.temperatures_M.tolist()
    return Description(
        ensemble_id=ensemble_id,
        dataset=info["dataset"],
        class_names=tuple(info["class_names"]),
        image_size=image_size,
        channels=channels,
        split_hash=info["split_hash"],
        combiner=combination.combiner,
        weights=combination.weights,
        temperature=combination.temperature,
        confidence=combination.confidence,
        members=tuple(
            one.member(temperature=temperature, weights_file=file)
            for one, temperature, file in zip(chosen, temperatures, keep_members(folder, files), strict=True)
        ),
        further=further,
    )


def keep_members(folder: Path, members: Sequence[MemberFiles]) -> list[str]:
    """Keep members' weights in an ensemble's folder, whatever becomes of their trials; the paths inside the folder.

    They take no room of their own where the file system has hard links. A path is empty where there are no weights any
    more. Each file is there whole or not at all.
    """
    return [_kept(folder, member) for member in members]


def _kept(folder: Path, member: MemberFiles) -> str:
    name = f"{MEMBERS_FOLDER}/{member.experiment}.{member.trial_id}.{member.variant}.safetensors"
    try:
        link_file(member.source, folder / name)
    except FileNotFoundError:
        return ""
    return name
