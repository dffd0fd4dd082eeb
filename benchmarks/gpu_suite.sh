#!/usr/bin/env bash
# Rollout, update and a step against TRL at the sizes that people train, on a machine with one GPU and no network.
#
#   [WHEELS=folder] [OUT=folder] benchmarks/gpu_suite.sh [--device cuda|cpu] [--shapes "0.5b 1.5b 3b"] [--minutes 9]
#                                                        [--parts "machine rollout update trl"]
#
# Needs torch, transformers, accelerate and grpo's own dependencies (pydantic first of all). Missing ones are installed
# into a folder of their own, from the wheels in $WHEELS: pydantic pydantic-core typing-inspection annotated-types, and
# for the part against TRL also trl datasets dill multiprocess. Nothing is fetched: models are random weights in the
# shapes of Qwen2.5.
#
# Parts have time limits and do not need each other: if one fails, its error is reported and the rest goes on.
# Writes gpu.json and gpu.txt to $OUT (by default docs/results). --device cpu --shapes tiny tries it out.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=cuda shapes="0.5b 1.5b 3b" minutes=9 parts="machine rollout update trl"
while [[ $# -gt 0 ]]; do
  case "$1" in
    --device | --shapes | --minutes | --parts) declare "${1#--}=$2" && shift 2 ;;
    *) echo "gpu_suite.sh: unknown argument $1" >&2 && exit 2 ;;
  esac
done
out="${OUT:-docs/results}"
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
[[ "$device" == cpu ]] && export CUDA_VISIBLE_DEVICES=""

if [[ -n "${WHEELS:-}" ]] && compgen -G "$WHEELS/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$WHEELS"/*.whl >&2 &&
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

deadline=$((SECONDS + minutes * 60))
# part NAME SECONDS MODULE [ARGUMENTS]: its last line of output is its result.
part() {
  local name="$1" limit="$2" left=$((deadline - SECONDS)) begun=$SECONDS
  shift 2
  ((left < limit)) && limit=$left
  if ((limit < 5)); then
    echo "no time left" >"$work/$name.failed"
    return
  fi
  timeout --kill-after=5 "$limit" "$python" -m "$@" >"$work/$name.out" 2>"$work/$name.err"
  local status=$?
  ((status == 0)) || { ((status == 124)) && echo "took over $limit s" || echo "ended with $status"; } >"$work/$name.failed"
  echo "$name: $((SECONDS - begun)) s, status $status" >&2
}

small=()
if [[ "$device" == cpu ]]; then small=(--prompts 2 --completions 2 --prompt-length 8 --length 16 --rounds 1); fi
[[ " $parts " == *" machine "* ]] && part machine 60 benchmarks.gpu.machine --device "$device"
for shape in $shapes; do
  for name in rollout update; do
    [[ " $parts " == *" $name "* ]] &&
      part "${name}_$shape" 100 "benchmarks.gpu.$name" "$shape" --device "$device" ${small[@]+"${small[@]}"}
  done
  if [[ " $parts " == *" trl "* && "$shape" == "${shapes%% *}" ]]; then
    part "trl_$shape" 180 benchmarks.gpu.trl "$shape" --device "$device"
  fi
done
"$python" -m benchmarks.gpu.report "$work" "$out"
