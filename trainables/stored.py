"""What a trial's stored weights predict, made when somebody asks for it: a trial that was stopped early has weights
alone."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from results.predictions import SEEN_FROM_VIEWS
from results.schema import Predictions, UsageError
from results.trial_files import TrialFiles
from trainables.config import TrainConfig
from trainables.evaluation import predictions, predictions_with_views
from trainables.model import unfilled_model
from trainables.resident import TrainingImages, memory_format


def best_predictions(
    files: TrialFiles, config: TrainConfig, data: TrainingImages, of: Sequence[type[Predictions]]
) -> dict[str, list[Predictions]]:
    """Return what a trial's best weights predict for each split of `of`: `best`, and `tta` where there are views.

    On the device, with the number of threads and in the precision of the training, the logits equal to the bit what the
    trial itself would have stored. Raises UsageError when the weights are missing, damaged, or of another network.
    """
    model = stored_model(files, "best", config, data)
    return predicted_best(model, config, data, of)


def variant_predictions(
    files: TrialFiles, variant: str, config: TrainConfig, data: TrainingImages, of: Sequence[type[Predictions]]
) -> list[Predictions]:
    """Return what a variant's stored weights predict for each split of `of`, averaged over views where it is seen so.

    Raises UsageError as `best_predictions` does.
    """
    model = stored_model(files, variant, config, data)
    views = config.test_time_augmentation if variant in SEEN_FROM_VIEWS else "none"
    return [predictions(model, data, cls, views=views, precision=config.precision) for cls in of]


def predicted_best(
    model: nn.Module, config: TrainConfig, data: TrainingImages, of: Sequence[type[Predictions]]
) -> dict[str, list[Predictions]]:
    """Return what a model with a trial's best weights predicts: `best`, and `tta` from the same pass."""
    views = config.test_time_augmentation
    if views == "none":
        return {"best": [predictions(model, data, cls, precision=config.precision) for cls in of]}
    both = [predictions_with_views(model, data, cls, views=views, precision=config.precision) for cls in of]
    return {"best": [plain for plain, _ in both], "tta": [averaged for _, averaged in both]}


def stored_model(files: TrialFiles, variant: str, config: TrainConfig, data: TrainingImages) -> nn.Module:
    """Return a trial's network on the data's device, with the stored weights of a variant.

    Raises UsageError as `best_predictions` does.
    """
    path = files.weights(variant)
    split = data.split
    model = unfilled_model(config, num_classes=split.num_classes, image_size=split.image_size, channels=split.channels)
    try:
        with files.open(path) as file:
            model.load_state_dict(load(file.read()))
    except FileNotFoundError as error:
        raise UsageError(_message(files, variant, "its weights are not at {where}")) from error
    except (SafetensorError, RuntimeError) as error:
        cause = f"{{where}} is damaged, or of another network ({str(error).splitlines()[0]})"
        raise UsageError(_message(files, variant, cause)) from error
    return model.to(data.device).to(memory_format=memory_format(config))


def _message(files: TrialFiles, variant: str, cause: str) -> str:
    weights = SEEN_FROM_VIEWS.get(variant, variant)
    return (
        f"Cannot predict with the {weights} weights of {files.trial_id}: "
        f"{cause.format(where=files.where(files.weights(variant)))}. Fix: restore the file, or leave the trial out."
    )
