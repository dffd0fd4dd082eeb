#!/usr/bin/env bash
# A vLLM server that a run generates with and hands its weights to (rollout.vllm_mode: server).
#
#   launch/vllm_serve.sh MODEL [arguments of `vllm serve`]
#
# One node with two GPUs, a shell each:
#   CUDA_VISIBLE_DEVICES=1 launch/vllm_serve.sh Qwen/Qwen2.5-3B --port 8000
#   CUDA_VISIBLE_DEVICES=0 grpo train RECIPE rollout.backend=vllm rollout.vllm_mode=server \
#     rollout.vllm_server_base_url=http://127.0.0.1:8000
# Several servers: one call each, with a port and GPUs of its own, and all of them in the recipe:
#   rollout.vllm_server_base_url='[http://127.0.0.1:8000, http://127.0.0.1:8001]'
# On another node: --host 0.0.0.0 here, that node's name in the URL, and model.name a hub id or a folder that both see.
# Weights then need vLLM beside the trainer too (NCCL; servers connect back to ports from rollout.vllm_group_port on), or
# a folder that both see in rollout.vllm_sync_dir.
#
# Whoever reaches the port can replace the weights and read what is sampled: there is no password. So the server listens
# on 127.0.0.1 alone unless --host opens it, and then it belongs on a private network.
#
# Python is $VLLM_PYTHON, else .venv-vllm of the checkout (`make setup-vllm`), else python3. grpo need not be installed
# in it, vLLM must be.
set -euo pipefail

if [[ $# -eq 0 || "$1" == -* ]]; then
  echo "usage: launch/vllm_serve.sh MODEL [arguments of vllm serve, such as --port 8000]" >&2
  exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${VLLM_PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python3
  if [[ -x "$root/.venv-vllm/bin/python" ]]; then python="$root/.venv-vllm/bin/python"; fi
fi
unset VLLM_PYTHON # vLLM warns of VLLM_ variables that it does not know
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m grpo.backends.vllm.serve "$@"
