#!/usr/bin/env bash
# The large-batch ResNet-50 on one GPU, in steps of less than nine minutes; see gpu_reproduce.md.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: benchmarks/gpu_reproduce.sh deliver FILE... | step speed|short|published|ours|held_out | collect FOLDER"
data=${DATA_DIR:-data/cifar100}
results=${RESULTS_DIR:-results/runs}
seconds=${STEP_SECONDS:-440} # until a training is told to stop, of which its start is a part; stopping comes on top
seed=${SEED:-} # another one than the recipe's
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor} # later steps find the step compiled

deliver() { # parts of the data set, one or more at a time; a machine that is kept keeps them
    mkdir -p "$data"
    cp --verbose "$@" "$data/"
}

step() { # train, or go on; exit status 0: done, 130: run the same step again
    local settings=(val_fraction=0) ours=(ema_decay=0.999 test_time_augmentation=flip)
    case $1 in
        speed) speed; return ;;
        short) settings+=("${ours[@]}" max_epochs=30) ;;
        published) ;;
        ours) settings+=("${ours[@]}") ;;
        held_out) settings=(val_fraction=0.1 "${ours[@]}") ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
    local name=large_batch_$1${seed:+_seed$seed} workers=(--num-workers "${NUM_WORKERS:-1}") resume=()
    "$python" -c "import ray" 2> /dev/null || workers=() # the same training, in this process
    [[ -d $results/$name ]] && resume=(--resume)
    local status=0
    # shellcheck disable=SC2086  # EXTRA is several words
    timeout --foreground --preserve-status --signal=TERM --kill-after=90 "$seconds" \
        "$python" -m orchestrator.train resnet50_large_batch --data-dir "$data" --results-dir "$results" --name "$name" \
        "${workers[@]}" "${resume[@]}" ${seed:+--seed "$seed"} --set "${settings[@]}" ${EXTRA:-} || status=$?
    [[ $status != 130 ]] || echo "this step's time is up; run it again to go on"
    return "$status"
}

speed() { # images/s and share of the GPU's peak of the step by itself
    mkdir -p "$results"
    "$python" benchmarks/gpu.py --output "$results/speed.parquet"
}

collect() { # what is published of the runs, as parquet
    mkdir -p "$1"
    shopt -s nullglob
    [[ ! -f $results/speed.parquet ]] || cp "$results/speed.parquet" "$1/"
    for run in "$results"/large_batch_*; do
        mkdir -p "$1/${run##*/}"
        cp -r "$run/trials" "$run/epochs" "$run/experiment.json" "$1/${run##*/}/"
    done
}

case ${1:-} in
    deliver | step | collect) [[ $# -ge 2 ]] || { echo "$usage" >&2; exit 2; }; "$@" ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
