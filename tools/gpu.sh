#!/usr/bin/env bash
# Is a GPU right, and how fast is it? The tests of tests/gpu, then `visft profile` of each model and stage in three
# precisions, and of ZeRO-3. `make gpu` runs it; without make, and without installing anything:
#   PYTHON=python3 tools/gpu.sh [ARGUMENTS OF PYTEST]
# From the environment: DEVICE (cuda; cpu tries it out), GPUS (1), MODELS ("dinov3_b eva_e"), XML (a file for the rows).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cuda}
models=${MODELS:-dinov3_b eva_e}
if [ -z "${MODELS:-}" ] && [ "$device" = cpu ]; then
    models=debug
fi
status=0

rows=()
if [ -n "${XML:-}" ]; then
    rows=(--junit-xml "$XML")
fi
VISFT_DEVICE=$device VISFT_GPUS=${GPUS:-1} \
    "$python" -m pytest -n 1 -m gpu --timeout 900 tests/gpu "${rows[@]}" "$@" || status=1

profile() { # shows the command, and goes on when it fails
    set -- "$python" -m visft_ds profile --synthetic --steps 3 "$@"
    echo "$@"
    DS_ACCELERATOR=$device "$@" || status=1
}

for model in $models; do
    for stage in 1 2; do
        profile --model "$model" --stage "$stage" # heads in 16 bit, too
        profile --model "$model" --stage "$stage" --set visft.heads.precision=fp32
        profile --model "$model" --stage "$stage" --set visft.heads.precision=fp32 --set visft.model.tf32=false
    done
done
profile --model "$model" --stage 2 --engine zero3
exit $status
