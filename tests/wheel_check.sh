#!/usr/bin/env bash
# Install a wheel in an empty environment, go somewhere else, and train the smoke recipe from it; then a recipe of a
# project folder that has a data/ and a rewards.py of its own.
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

mkdir -p project/data && cd project
echo "WHO = 'the user'" >data/__init__.py
cat >rewards.py <<'END'
import data
assert data.WHO == "the user"

def shorter(prompts, completions, **kwargs):
    from rewards import shorter as same
    assert same is shorter
    return [-float(len(completion)) for completion in completions]
END
small=(training.max_steps=1 training.prompts_per_step=2 training.save_every=0 data.eval_size=0 rollout.max_completion_length=8)
rewards='rewards=[{path: rewards.py:shorter}, {name: countdown}]'
columns='data.args={question: compact}'
../venv/bin/grpo train smoke_cpu training.output_dir=by_grpo "$rewards" "$columns" "${small[@]}"
../venv/bin/accelerate launch --num_processes=1 -m grpo train smoke_cpu training.output_dir=by_accelerate "$rewards" \
    "$columns" "${small[@]}"
test -s by_grpo/final/model.safetensors
test -s by_accelerate/final/model.safetensors
echo "wheel check passed: $(basename "$wheel")"
