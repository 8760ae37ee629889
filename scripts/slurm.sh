#!/usr/bin/env bash
# One process for each GPU of a SLURM job; every process must see all GPUs of its node, and takes
# that of its number there. From the root of the repository:
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm.sh \
#     --config configs/ve/cifar10.py --mode train --workdir runs/cifar10
#
# SIGTERM two minutes before the end of the time writes a checkpoint; the job, submitted again, goes on.
# Tried: what it gives to srun, and two processes that find each other by SLURM's variables. Not tried:
# on a cluster.
#SBATCH --job-name=score_sde
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -euo pipefail
srun .venv/bin/python main.py --distributed "$@"
