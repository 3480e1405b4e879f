#!/bin/bash
# Two hosts with eight GPUs each under SLURM: sbatch slurm.sh run.yaml
# outputs/ must be on a file system that both hosts share. A lost process is started again up to three times, and the
# run goes on from its newest checkpoint.
#SBATCH --job-name=training-lens
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120 # two minutes before the time limit: the run saves itself

config=${1:?give a config file}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# What starts anew must not find the addresses of the processes before it (pytorch issue 167288).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun torchrun \
  --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" \
  -m training_lens train --config "$config" distributed.base=sharded
