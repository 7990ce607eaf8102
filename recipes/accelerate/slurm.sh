#!/bin/bash
# Runs a recipe on all GPUs of a SLURM job: one `accelerate launch` per node, through srun.
#
#   sbatch --nodes 2 --gpus-per-node 8 recipes/accelerate/slurm.sh RECIPE [key=value ...]
#
# LAUNCH_FILE selects the launch file (ddp.yaml beside this one by default; fsdp2.yaml, deepspeed_zero3.yaml). `output_dir`
# must be on a disk that all nodes share. Three minutes before the time limit, and when the job is preempted, SLURM sends
# SIGTERM: the run saves a checkpoint after its current step, the job is queued again, and it resumes from there.
#SBATCH --job-name=dposhift
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# SLURM copies the script elsewhere, so that its own folder says nothing
launch_file=${LAUNCH_FILE:-recipes/accelerate/ddp.yaml}
[ $# -gt 0 ] || { echo "usage: sbatch slurm.sh RECIPE [key=value ...]" >&2; exit 2; }
[ -f "$launch_file" ] || { echo "LAUNCH_FILE must be a file, got $launch_file. Submit from the repository." >&2; exit 2; }

main_process_ip=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
main_process_port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node get different ones
num_processes=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170} # seconds to save a checkpoint in
export launch_file main_process_ip main_process_port num_processes

# In the background, since bash handles a signal only between commands
# shellcheck disable=SC2016 # expanded on each node
srun bash -c '
    exec accelerate launch --config_file "$launch_file" \
        --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$num_processes" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$main_process_ip" --main_process_port "$main_process_port" --rdzv_backend static \
        -m dposhift_trl.run "$@"' bash "$@" &
step=$!
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM # to the step; SIGTERM to srun itself would kill it
wait "$step"
code=$?
[ -z "$stopped" ] || { wait "$step"; code=$?; } # the first `wait` ended with the signal
if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
