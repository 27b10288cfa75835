#!/bin/bash
# Trains under SLURM, and goes on in the same job after its time limit or a preemption:
#
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 tools/slurm_train.sh --config-file C
#
# from the folder of the sources; all arguments are those of tools/train_net.py. 300 seconds before
# the time limit the run is signalled, writes a checkpoint and ends with status 75: the job is put
# into the queue again, and --resume goes on. Any other status ends it.
#SBATCH --job-name=rope-vit-det
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

# SLURM signals the step, not this script; where a site signals both, it lives to see the status.
trap : TERM
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Machines share a port of this job's own.
srun bash -c 'exec python tools/train_net.py --resume --num-gpus "${SLURM_GPUS_ON_NODE:-1}" \
    --num-machines "$SLURM_NNODES" --machine-rank "$SLURM_NODEID" "$@"' \
    train --dist-url "tcp://$host:$((20000 + SLURM_JOB_ID % 10000))" "$@"
status=$?
if [ "$status" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
