#!/bin/sh
# Everything that a GPU session must answer, in one command of under nine minutes:
#
#     benchmarks/gpu.sh --wheels wheels 3.12  # before, where there is a network: what the GPU's machine lacks, for its Python
#     benchmarks/gpu.sh --plan                # the parts, what they are expected to take, and their commands
#     benchmarks/gpu.sh --output results      # on that machine, in the repository's root, with the folder wheels beside it
#     benchmarks/gpu.sh --rehearse            # every part at tiny sizes on a CPU
#
# The machine needs Python 3.11 to 3.13 with torch, transformers, safetensors and numpy. Results are in results.json
# as soon as they are measured; a part that has one is left out when the command is given again. See gpu.py.
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
# What else the package and its tests import. torchao is for 8 and 4 bits on a GPU; all come without their dependencies.
WHEELS="pytest hypothesis iniconfig pluggy pygments sortedcontainers attrs pillow torchao"

if [ "${1:-}" = --wheels ]; then
    mkdir -p "$2"
    for name in $WHEELS; do
        pinned=$(grep -E "^$name==" requirements/lock.txt | cut -d' ' -f1 || true)
        "$PYTHON" -m pip download --no-deps --quiet --only-binary :all: ${3:+--python-version "$3"} --dest "$2" "${pinned:-$name}"
    done
    ls "$2"
    exit 0
fi

SITE="${TMPDIR:-/tmp}/starflow-gpu-site"
if [ -d wheels ] && [ ! -d "$SITE" ]; then # what is installed stays as it is, and no pip is needed
    for wheel in wheels/*.whl; do
        "$PYTHON" -m zipfile -e "$wheel" "$SITE.new"
    done
    mv "$SITE.new" "$SITE"
fi
PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}:$SITE"
export PYTHONPATH
exec "$PYTHON" benchmarks/gpu.py "$@"
