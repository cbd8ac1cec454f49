#!/bin/sh
# Everything that a GPU session must answer, in one command of under nine minutes:
#
#     benchmarks/gpu.sh --wheels wheels       # before, where there is a network: what the GPU's machine lacks
#     benchmarks/gpu.sh --output results      # on that machine, in the repository's root, with the folder wheels beside it
#     benchmarks/gpu.sh --rehearse            # every part at tiny sizes on a CPU
#
# The machine needs Python 3.11 to 3.13 with torch, transformers, safetensors and numpy. Results are one JSON file a part,
# written as soon as it is measured; a part that has one is left out when the command is given again. See gpu.py.
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
# What else the package and its tests import. torchao is for --weights int8 on a GPU; it comes without its dependencies.
WHEELS="pytest hypothesis iniconfig pluggy pygments packaging sortedcontainers attrs pillow tqdm pyyaml huggingface_hub torchao"

if [ "${1:-}" = --wheels ]; then
    mkdir -p "$2"
    for name in $WHEELS; do
        pinned=$(grep -E "^$name==" requirements/lock.txt | cut -d' ' -f1 || true)
        "$PYTHON" -m pip download --no-deps --quiet --dest "$2" "${pinned:-$name}"
    done
    ls "$2"
    exit 0
fi

SITE="${TMPDIR:-/tmp}/starflow-gpu-site"
if [ -d wheels ] && [ ! -d "$SITE" ]; then # beside what is installed, and only what is missing
    "$PYTHON" -m pip install --no-index --no-deps --quiet --target "$SITE.new" wheels/*.whl && mv "$SITE.new" "$SITE"
fi
PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}:$SITE"
export PYTHONPATH
exec "$PYTHON" benchmarks/gpu.py "$@"
