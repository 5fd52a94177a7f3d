#!/bin/sh
# Puts DeepSpeed beside $VENV's packages, for the tests that need it: importable, it would be imported by all training.
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
# Without what is there already, torch above all.
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$VENV/deepspeed" \
    deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 nvidia-ml-py==13.615.71 py-cpuinfo==9.0.0
PYTHONPATH="$VENV/deepspeed" DS_ACCELERATOR=cpu "$VENV/bin/python" -c "import deepspeed" >/dev/null ||
    { echo "DeepSpeed was installed but cannot be imported" >&2; exit 1; }
touch "$VENV/.deepspeed-ready"
