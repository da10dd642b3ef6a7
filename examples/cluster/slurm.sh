#!/usr/bin/env bash
# A training on Slurm, one worker a GPU: `sbatch slurm.sh examples/gpt2_64.yaml --set workers=8`. Every argument goes to `rayllp train`.
#SBATCH --job-name=rayllp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail

source .venv/bin/activate                 # the same on every node
export RAY_AUTH_MODE=token                # nobody else on the cluster may give this Ray work
export RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(openssl rand -hex 32)}"
output="runs/slurm_${SLURM_JOB_ID}"       # on a file system that all nodes see

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | cut -d' ' -f1)
port=$((20000 + SLURM_JOB_ID % 20000))    # two jobs may share a node
export RAY_ADDRESS="$address:$port"

srun --nodes=1 --ntasks=1 --overlap -w "$head" \
    ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false --block &
sleep 15
if ((SLURM_NNODES > 1)); then
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --overlap --exclude="$head" ray start --address="$RAY_ADDRESS" --block &
    sleep 15
fi

python -m rayllp doctor --path "$output.check" || true
# Slurm's notice before the end, and before a preemption, becomes a checkpoint; requeued, the job goes on from it.
python -m rayllp train "$@" --output "$output" &
training=$!
trap 'kill -TERM $training' TERM
code=0
wait $training || code=$?
if kill -0 $training 2>/dev/null; then    # the trap ended the wait before training has ended
    code=0
    wait $training || code=$?
fi
exit $code
