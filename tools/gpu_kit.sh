#!/usr/bin/env bash
# Gathers the packages that `make gpu` needs beside torch, torchvision and numpy, for a machine without registries:
#   PYTHON=.venv/bin/python tools/gpu_kit.sh [VERSION OF PYTHON THERE (3.12)] [FOLDER (kit)]
# PYTHON must have torch, which DeepSpeed asks for when its wheel is made. Then, on that machine:
#   python3 -m pip install --no-index --no-deps kit/*.whl
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} version=${1:-3.12} folder=${2:-kit}
mkdir -p "$folder"
rm -f "$folder"/*.whl # two versions of a package would stop the installation
platforms=(--platform manylinux1_x86_64 --platform manylinux2014_x86_64)
for libc in 17 24 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${libc}_x86_64"); done
"$python" -m pip download --quiet --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]}" \
    --dest "$folder" einops faster-coco-eval hjson isal msgpack ninja orjson packaging psutil py-cpuinfo 'pydantic>=2.8' \
    pytest pytest-timeout pytest-xdist safetensors scipy simplejpeg tqdm
rm -f "$folder"/numpy-*.whl # torch's own stays
# Without its CUDA operators, of which none is used, DeepSpeed is a package of plain Python.
deepspeed=deepspeed$(sed -n 's/^DEEPSPEED = "\(.*\)"$/\1/p' visft_ds/__init__.py)
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" "$deepspeed"
ls "$folder"/deepspeed-*-none-any.whl > /dev/null
du -sh "$folder"
