#!/usr/bin/env bash
# The large-batch ResNet-50 on one GPU, in steps of less than nine minutes; see gpu_reproduce.md.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: benchmarks/gpu_reproduce.sh deliver FILE... | step published|held_out|ours | collect FOLDER"
data=${DATA_DIR:-data/cifar100}
results=${RESULTS_DIR:-results/runs}
seconds=${STEP_SECONDS:-500} # a step's training; what it takes to start and to stop comes on top
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor} # later steps find the step compiled

deliver() { # parts of the data set, one or more at a time; a machine that is kept keeps them
    mkdir -p "$data"
    cp --verbose "$@" "$data/"
}

step() { # train, or go on; exit status 0: done, 130: run the same step again
    local settings=(val_fraction=0)
    case $1 in
        published) ;;
        held_out) settings=(val_fraction=0.1) ;;
        ours) settings+=(ema_decay=0.999 test_time_augmentation=flip) ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
    local name=large_batch_$1 workers=(--num-workers "${NUM_WORKERS:-1}") resume=()
    "$python" -c "import ray" 2> /dev/null || workers=() # the same training, in this process
    [[ -d $results/$name ]] && resume=(--resume)
    local status=0
    # shellcheck disable=SC2086  # EXTRA is several words
    timeout --foreground --preserve-status --signal=TERM "$seconds" "$python" -m orchestrator.train resnet50_large_batch \
        --data-dir "$data" --results-dir "$results" --name "$name" "${workers[@]}" "${resume[@]}" \
        --set "${settings[@]}" ${EXTRA:-} || status=$?
    [[ $status != 130 ]] || echo "this step's time is up; run it again to go on"
    return "$status"
}

collect() { # what is published of the runs, as parquet
    mkdir -p "$1"
    for run in "$results"/large_batch_*; do
        mkdir -p "$1/${run##*/}"
        cp -r "$run/trials" "$run/epochs" "$run/experiment.json" "$1/${run##*/}/"
    done
}

case ${1:-} in
    deliver | step | collect) [[ $# -ge 2 ]] || { echo "$usage" >&2; exit 2; }; "$@" ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
