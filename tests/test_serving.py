"""An ensemble can be used: it predicts what was stored, wherever its folder lies, and says why where it cannot."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.combination import COMBINERS, Combination
from orchestrator.description import image_shape, read_description
from orchestrator.keeping import MemberFiles, keep_members
from orchestrator.pooling import POOLS, pooled_log_probs
from orchestrator.serving import digest, load_ensemble
from results import files
from results.schema import EstimatePredictions, TestPredictions, UsageError
from results.store import Experiment
from tests.serving import (
    CONFIG,
    MEMBERS,
    fitted,
    make_ensemble,
    stored_log_probs,
    trained_experiment,
    with_probabilities,
)
from trainables.datasets import SplitImages
from trainables.resident import ResidentImages
from trainables.validation import log_softmax


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, resident_digits: ResidentImages) -> Experiment:
    return trained_experiment(tmp_path_factory.mktemp("runs"), resident_digits)


@pytest.fixture(scope="module")
def folder(experiment: Experiment) -> Path:
    return make_ensemble(experiment)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.mark.parametrize("combiner", with_probabilities())
@pytest.mark.parametrize("of", [EstimatePredictions, TestPredictions])
def test_predictions_equal_the_stored_ones_to_the_bit(
    combiner: str, of: type[EstimatePredictions], experiment: Experiment, digits: SplitImages, tmp_path: Path
) -> None:
    ensemble = load_ensemble(make_ensemble(experiment, combiner, ensemble_id=f"bits-{combiner}"))
    combined = fitted(experiment, combiner).combine(stored_log_probs(experiment, MEMBERS, of))
    indices = experiment.predictions("t00000", of).example_ids_N
    probs_NC = ensemble.predict(digits.images_NCHW[indices])
    assert probs_NC.dtype == np.float64
    assert np.array_equal(probs_NC, np.exp(combined.log_probs_NC))
    assert np.array_equal(ensemble.predict_classes(digits.images_NCHW[indices]), combined.scores_NC.argmax(1))


def test_a_variant_of_a_trial_has_weights_of_its_own(experiment: Experiment, digits: SplitImages) -> None:
    members = (("t00000", "best"), ("t00001", "raw"))
    ensemble = load_ensemble(make_ensemble(experiment, ensemble_id="variants", members=members))
    combined = fitted(experiment, "mean", members).combine(stored_log_probs(experiment, members, TestPredictions))
    assert [Path(member.weights_file).name for member in ensemble.members] == [
        "digits.t00000.best.safetensors",
        "digits.t00001.raw.safetensors",
    ]
    assert np.array_equal(ensemble.predict(digits.images_NCHW[digits.test]), np.exp(combined.log_probs_NC))


def test_probabilities_sum_to_one_and_are_better_than_guessing(folder: Path, digits: SplitImages) -> None:
    ensemble = load_ensemble(folder)
    probs_NC = ensemble.predict(digits.images_NCHW[digits.test])
    assert np.allclose(probs_NC.sum(1), 1)
    assert (probs_NC.argmax(1) == digits.labels_N[digits.test]).mean() > 0.3  # chance is 0.1
    assert ensemble.class_names == digits.class_names
    assert (ensemble.combiner, len(ensemble.members), ensemble.weights.shape) == ("mean", 3, (3,))


@pytest.mark.parametrize("combiner", ["vote", "rank"])
def test_a_combiner_without_probabilities_gives_classes_and_says_so(
    combiner: str, experiment: Experiment, digits: SplitImages
) -> None:
    ensemble = load_ensemble(make_ensemble(experiment, combiner, ensemble_id=f"classes-{combiner}"))
    images = digits.images_NCHW[digits.test]
    expected = fitted(experiment, combiner).combine(stored_log_probs(experiment, MEMBERS, TestPredictions))
    assert np.array_equal(ensemble.predict_classes(images), expected.scores_NC.argmax(1))
    with pytest.raises(UsageError, match=f"combiner '{combiner}' gives no probabilities; predict_classes gives"):
        ensemble.predict(images)
    with pytest.raises(UsageError, match="a student learns from probabilities"):
        ensemble.check_can_teach()


def test_a_folder_moved_elsewhere_works_without_the_experiment(own: Path, folder: Path, digits: SplitImages) -> None:
    images = digits.images_NCHW[digits.test[:20]]
    moved = own.rename(own.with_name("elsewhere"))
    assert np.array_equal(load_ensemble(moved).predict(images), load_ensemble(folder).predict(images))
    assert np.array_equal(load_ensemble(moved / "ensemble.json").predict(images), load_ensemble(folder).predict(images))
    assert digest(moved) == digest(folder)


def test_weights_are_links_that_outlive_the_checkpoints(
    tmp_path: Path, resident_digits: ResidentImages, digits: SplitImages
) -> None:
    experiment = trained_experiment(tmp_path, resident_digits)
    folder = make_ensemble(experiment)
    best = experiment.files("t00000").best
    assert best.stat().st_nlink == 3  # the plain member's and that of its views
    before = load_ensemble(folder).predict(digits.images_NCHW[:5])
    best.unlink()
    assert np.array_equal(load_ensemble(folder).predict(digits.images_NCHW[:5]), before)
    assert not list(folder.rglob("*.tmp"))


def test_where_there_are_no_links_weights_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: Experiment
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source = experiment.files("t00000").best
    (name,) = keep_members(tmp_path, [MemberFiles("digits", "t00000", "best", source)])
    assert name == "members/digits.t00000.best.safetensors"
    assert (tmp_path / name).read_bytes() == source.read_bytes()
    assert (tmp_path / name).stat().st_ino != source.stat().st_ino


def test_keeping_members_twice_leaves_no_temporary_file(tmp_path: Path, experiment: Experiment) -> None:
    member = MemberFiles("digits", "t00000", "best", experiment.files("t00000").best)
    assert keep_members(tmp_path, [member]) == keep_members(tmp_path, [member])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["digits.t00000.best.safetensors"]


def test_a_link_that_is_cut_short_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: Experiment
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", die)
    member = MemberFiles("digits", "t00000", "best", experiment.files("t00000").best)
    with pytest.raises(KeyboardInterrupt):
        keep_members(tmp_path, [member])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_weights_that_were_removed_before_are_named_with_the_fix(
    tmp_path: Path, resident_digits: ResidentImages
) -> None:
    experiment = trained_experiment(tmp_path, resident_digits)
    experiment.files("t00001").best.unlink()
    folder = make_ensemble(experiment)
    with pytest.raises(
        UsageError,
        match=r"cannot be used: the weights of digits/t00001 were removed before it was made; search with a larger "
        r"--keep-checkpoints, or .* --candidates \"checkpoint != ''\"",
    ):
        load_ensemble(folder)


def test_weights_that_are_missing_or_damaged_are_named(own: Path) -> None:
    damaged = own / "members" / "digits.t00001.best.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"t00001\.best\.safetensors cannot be read .*; copy the ensemble's whole"):
        load_ensemble(own)
    damaged.unlink()
    with pytest.raises(UsageError, match=r"t00001\.best\.safetensors cannot be read .*; copy the ensemble's whole"):
        load_ensemble(own)


def test_weights_of_another_network_are_refused(own: Path) -> None:
    content = json.loads((own / "ensemble.json").read_text())
    content["members"][0]["backbone"] = "efficient200k"
    (own / "ensemble.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"t00000\.best\.safetensors cannot be read"):
        load_ensemble(own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("null", "cannot be read"),
        ("{}", "lacks 'ensemble_id'"),
        ("\x00\xff", "cannot be read"),
    ],
)
def test_a_description_that_is_none_is_a_usage_error(text: str, message: str, own: Path) -> None:
    (own / "ensemble.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=rf"ensemble\.json {message}.*; restore it, or make the ensemble anew"):
        load_ensemble(own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combiner": "median"}, "there is no combiner 'median'; there are mean, weighted"),
        ({"weights": [1.0]}, r"weights of shape \(1,\) for 3 members"),
        ({"weights": "all"}, "cannot be read"),
        ({"weights": [[1.0], 2.0]}, "cannot be read"),
        ({"members": []}, "weights of shape"),
        ({"members": [1]}, "cannot be read"),
        ({"members": {"a": 1}}, "cannot be read"),
        ({"image_size": "8"}, "image_size='8' is no int"),
        ({"image_size": 0}, "images of 1 channels and 0 pixels"),
        ({"temperature": True}, "temperature=True is no float"),
        ({"class_names": None}, "cannot be read"),
    ],
)
def test_a_description_that_makes_no_sense_is_a_usage_error(
    changes: dict[str, object], message: str, own: Path
) -> None:
    content = json.loads((own / "ensemble.json").read_text())
    (own / "ensemble.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(UsageError, match=message):
        load_ensemble(own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vgg"}, "there is no backbone 'vgg'"),
        ({"views": "upside_down"}, "has views 'upside_down'; wanted one of none, flip"),
        ({"weights_file": "../../secret"}, "lies outside of its folder"),
        ({"config": {"wings": 2}}, "was trained by a later version, with wings; use that one"),
        ({"config": {"dropout": 2}}, "dropout=2.0: wanted a number in"),
    ],
)
def test_a_member_that_makes_no_sense_is_a_usage_error(changes: dict[str, object], message: str, own: Path) -> None:
    content = json.loads((own / "ensemble.json").read_text())
    content["members"][0].update(changes)
    (own / "ensemble.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        load_ensemble(own)


def test_a_folder_that_is_no_ensemble_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere/ensemble\.json cannot be read \(No such file or directory\); give"):
        load_ensemble(tmp_path / "nowhere")


def test_a_description_survives_being_written_and_read_with_all_that_it_says(folder: Path) -> None:
    written = json.loads((folder / "ensemble.json").read_text())
    assert written["selection"] == "by hand"
    assert json.loads(json.dumps(read_description(folder).to_json())) == written
    assert [m["variant"] for m in written["members"]] == ["best", "tta", "best"]


def test_a_member_of_an_earlier_version_has_defaults_for_what_it_lacks(own: Path, digits: SplitImages) -> None:
    content = json.loads((own / "ensemble.json").read_text())
    for member in content["members"]:
        del member["config"]["distill_weight"], member["config"]["distill_temperature"]
    (own / "ensemble.json").write_text(json.dumps(content))
    assert load_ensemble(own).members[0].train_config().distill_weight == 0


# --- images ---


def test_arrays_tensors_and_floats_of_the_same_images_give_the_same(folder: Path, digits: SplitImages) -> None:
    ensemble, images = load_ensemble(folder), digits.images_NCHW[digits.test[:7]]
    expected = ensemble.predict(images)
    for same in (torch.from_numpy(images), images.astype(np.float32), torch.from_numpy(images).double()):
        assert np.array_equal(ensemble.predict(same), expected)
    mirrored = np.ascontiguousarray(images[..., ::-1])
    mirrored.flags.writeable = False
    assert np.array_equal(ensemble.predict(images[..., ::-1]), ensemble.predict(mirrored))


def test_image_files_are_decoded_as_the_dataset_decodes_them(folder: Path, digits: SplitImages, tmp_path: Path) -> None:
    ensemble, images = load_ensemble(folder), digits.images_NCHW[digits.test[:7]]
    paths = [tmp_path / f"{place}.png" for place in range(7)]
    for path, pixels in zip(paths, images, strict=True):
        Image.fromarray(pixels[0]).save(path)
    expected = ensemble.predict(images)
    assert np.array_equal(ensemble.predict(paths), expected)
    assert np.array_equal(ensemble.predict([str(path) for path in paths]), expected)
    assert np.array_equal(ensemble.predict([path.read_bytes() for path in paths]), expected)
    larger = io.BytesIO()
    Image.fromarray(images[0][0]).resize((40, 24)).convert("RGB").save(larger, "JPEG")
    assert ensemble.predict([larger.getvalue()]).shape == (1, 10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 1)), r"images of shape \[2, 8, 8, 1\]; wanted \[N, 1, 8, 8\] with values in 0 to 255: put"),
        (np.zeros((1, 8, 8)), r"images of shape \[1, 8, 8\]; wanted \[N, 1, 8, 8\]"),
        (np.zeros((2, 3, 8, 8)), r"wanted \[N, 1, 8, 8\]"),
        (torch.full((1, 1, 8, 8), -1.0), "images with values from -1 to -1; wanted .*: do not normalize them"),
        (torch.full((1, 1, 8, 8), torch.nan), "images with values from nan to nan"),
        (np.full((1, 1, 8, 8), 256.0), "images with values from 256 to 256"),
        (np.zeros((1, 1, 8, 8), bool), "images of type bool; wanted"),
        (torch.zeros((1, 1, 8, 8), dtype=torch.complex64), r"images of type torch\.complex64; wanted"),
        (np.zeros((0, 1, 8, 8)), "no images were given; wanted one or more"),
        ([], "no images were given"),
        ("scan.png", r"a single image was given; wanted a list of them, such as predict\(\[image\]\)"),
        (["nowhere.png"], r"nowhere\.png cannot be read as an image \(FileNotFoundError\); leave it out or mend it"),
        ([b"GIF"], r"image 0 cannot be read as an image \(UnidentifiedImageError\)"),
        ([3], "image 0 is a int; wanted paths or bytes of image files, or one array"),
    ],
)
def test_other_images_are_refused_with_what_was_wanted(images: object, message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_ensemble(folder).predict(images)  # type: ignore[arg-type]


def test_an_array_of_objects_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="images of type object; wanted"):
        load_ensemble(folder).predict(np.array([[["a"]]], dtype=object))


# --- as a teacher ---


def test_every_combiner_with_probabilities_can_teach() -> None:
    assert sorted(POOLS) == sorted(with_probabilities())


@pytest.mark.parametrize("combiner", with_probabilities())
def test_the_teacher_says_what_the_combination_says(combiner: str) -> None:
    rng = np.random.default_rng(0)
    log_probs_MNC = log_softmax(rng.normal(scale=3, size=(4, 50, 7)))
    weights_M = np.array([0.5, 0.0, 0.3, 0.2])
    combination = Combination.fit(
        combiner,
        log_probs_MNC,
        rng.integers(0, 7, 50),
        weights_M=weights_M,
        temperatures_M=np.array([0.7, 1.0, 1.3, 2.0]),
    )
    found = pooled_log_probs(combination, torch.from_numpy(log_probs_MNC).float())
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), combination.combine(log_probs_MNC).log_probs_NC, atol=1e-5)


def test_the_teacher_of_a_batch_agrees_with_its_predictions(folder: Path, digits: SplitImages) -> None:
    ensemble, images = load_ensemble(folder), digits.images_NCHW[digits.test[:64]]
    log_probs = ensemble.log_probabilities(torch.from_numpy(images).float())
    assert not log_probs.requires_grad
    # Predictions went through float16.
    assert np.allclose(np.exp(log_probs.numpy()), ensemble.predict(images), atol=5e-3)


# --- what earlier versions did not record ---


def test_the_shape_of_images_comes_from_the_experiment_or_its_weights(experiment: Experiment) -> None:
    weights = experiment.files("t00000").best
    assert image_shape(experiment.info, CONFIG, weights) == (8, 1)
    old = {name: value for name, value in experiment.info.items() if name not in {"image_size", "channels"}}
    assert image_shape(old, CONFIG, weights) == (8, 1)
    assert image_shape(old, CONFIG.having({"image_size": 12}), weights) == (12, 1)
    assert image_shape(old, CONFIG.having({"dataset": "cifar10"}), Path("gone")) == (32, 3)
    with pytest.raises(
        UsageError, match=re.escape("go on with it once, by the command it was begun with and --resume")
    ):
        image_shape(old, CONFIG.having({"dataset": "folder:photos"}), weights)


def test_combiners_of_the_fixture_are_all_there_are() -> None:
    assert set(with_probabilities()) | {"vote", "rank"} == set(COMBINERS)
