"""Stopped trials whose weights are in a bucket, and go there again as predictions."""

from __future__ import annotations

from orchestrator import ensemble
from orchestrator.driver import load_data
from results.objects import ObjectStore, within
from results.schema import SelectPredictions
from results.store import Experiment
from tests.test_stopped_trials import search_plan, train_all
from trainables.resident import ResidentImages
from trainables.validation import log_softmax, nll


def test_stopped_trials_in_a_bucket_are_predicted_with_there(results: str) -> None:
    images = ResidentImages.on("cpu", load_data(search_plan(), "unused"))
    info = search_plan().info(name="small", data=images.split, command="searched without Ray")
    train_all(Experiment.create(results, name="small", info=info), images)
    store = ObjectStore(within(results, "small"))
    assert list(store.objects("predictions")) == ["predictions/t00000.parquet"]
    arguments = ["--results-dir", results, "--experiment", "small", "--include-stopped", "--top-k", "2"]
    assert ensemble.main(arguments) == 0
    before = store.objects("predictions")
    assert sorted(before) == [f"predictions/t0000{number}.parquet" for number in range(4)]
    assert ensemble.main(arguments) == 0
    assert store.objects("predictions") == before
    experiment = Experiment.open(results, "small")
    for row in experiment.trials().itertuples():
        assert row.predictions == f"predictions/{row.trial_id}.parquet"
        select = experiment.predictions(row.trial_id, SelectPredictions)
        assert nll(log_softmax(select.logits_NC), select.labels_N) == row.val_nll
