#!/usr/bin/env bash
# Install a wheel in an empty environment, go somewhere else, and train the smoke recipe from it.
#
#   tests/wheel_check.sh dist/grpo_train-0.1.0-py3-none-any.whl
set -euo pipefail
wheel="$(realpath "${1:?usage: $0 WHEEL}")"
constraints="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/constraints.txt"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --constraint "$constraints" torch
"$folder/venv/bin/python" -m pip install --quiet --constraint "$constraints" "$wheel"
cd "$folder"
unset PYTHONPATH
export HF_HUB_OFFLINE=1
venv/bin/grpo recipes
venv/bin/grpo recipes copy smoke_cpu mine.yaml
venv/bin/grpo validate mine.yaml demo_cpu
venv/bin/grpo train smoke_cpu training.output_dir=run
test -s run/final/model.safetensors
test -s run/report.html
echo "wheel check passed: $(basename "$wheel")"
