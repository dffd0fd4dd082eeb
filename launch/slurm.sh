#!/usr/bin/env bash
# A recipe under Slurm, one process a GPU, on one node or several; goes on by itself after preemption or the time limit.
#
#   sbatch --nodes 1 --gpus-per-node 8 --ntasks-per-node 8 --cpus-per-task 8 --time 8:00:00 \
#     launch/slurm.sh RECIPE [a.b=c ...]
#   sbatch --nodes 2 ...        two such nodes; the checkout and training.output_dir on a disk that they share
#   SHARD=fsdp2 sbatch ...      splits weights and optimizer over all processes, as launch/fsdp2.yaml does
#   SHARD=hsdp sbatch ...       splits them over the processes of each node, as launch/hsdp.yaml does
#
# Run it from the checkout, after `make setup`; GRPO names another grpo command. Three minutes before the end of the
# time Slurm sends SIGUSR1 (on preemption SIGTERM): the run saves at the end of its step, exits 143 and is put back in
# the queue, from its first second on. Raise @180 if a step of yours takes longer. --resume on a fresh folder starts at
# step 0; on one whose checkpoints can't be used it changes nothing and exits 2, and the job stays out of the queue.
# A node that is lost ends the job (exit code 1) within training.peer_timeout seconds: sbatch it again, and it goes on.
# docs/nodes.md says more.
# Tested with stand-ins for srun and scontrol (tests/test_launch.py), not on a cluster.
#SBATCH --job-name=grpo
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
set -uo pipefail
trap : TERM # the processes of the run answer to signals, this script waits for them

: "${1:?usage: sbatch [options] launch/slurm.sh RECIPE [a.b=c ...]}"
export GRPO="${GRPO:-$PWD/.venv/bin/grpo}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_NNODES))}"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

case "${SHARD:=none}" in
  none | fsdp2 | hsdp) ;;
  *) echo "SHARD is fsdp2, hsdp or none, not $SHARD" >&2; exit 2 ;;
esac
if [ "$SHARD" != none ]; then
  export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
  export FSDP_RESHARD_AFTER_FORWARD=true FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT
fi
if [ "$SHARD" = hsdp ]; then
  export ACCELERATE_USE_PARALLELISM_CONFIG=true
  export PARALLELISM_CONFIG_DP_REPLICATE_SIZE=$((SLURM_NTASKS / LOCAL_WORLD_SIZE))
  export PARALLELISM_CONFIG_DP_SHARD_SIZE="$LOCAL_WORLD_SIZE"
fi

# Each task becomes a process of the group by itself, so that Slurm's signals reach it and nothing stands between. Until
# it listens, the early warning must not end it.
srun --kill-on-bad-exit=1 bash -c '
  trap "" USR1
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec "$GRPO" train "$@" --resume' grpo "$@"
status=$?

if [ "$status" -eq 143 ]; then
  echo "saved before the time was up; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
