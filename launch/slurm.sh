#!/usr/bin/env bash
# Runs a script on GPU nodes under Slurm, one process per GPU. See docs/slurm.md.
#
#   sbatch --nodes=2 launch/slurm.sh train.py --config=configs/vit_b16.py --workdir=/shared/vit_b16
#
# Run it from the repository's folder. All nodes must see that folder and --workdir.
#SBATCH --job-name=vit_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "This isn't a Slurm job: start it with sbatch launch/slurm.sh ..." >&2
    exit 2
fi

# Each process runs this. A process that fails by a user's mistake (2) or an error (1) writes its
# exit code to a file: the others then fail with higher codes, because they lost one, and srun
# returns the highest.
task='
trap "kill -TERM \$child" TERM
"$@" &
child=$!
wait "$child"
while code=$? && kill -0 "$child" 2>/dev/null; do wait "$child"; done
((code == 1 || code == 2)) && echo "$code" >"$EXIT_CODE_FILE"
exit "$code"'
export EXIT_CODE_FILE=".slurm_${SLURM_JOB_ID}_failed"
rm -f "$EXIT_CODE_FILE"

# srun doesn't inherit --cpus-per-task from sbatch.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-}"
srun bash -c "$task" task "${PYTHON:-.venv/bin/python}" "$@"
code=$?
if [[ -e $EXIT_CODE_FILE ]]; then
    code=$(<"$EXIT_CODE_FILE")
    rm -f "$EXIT_CODE_FILE"
# The run was stopped and saved (75: the time limit, or another job needs the nodes), or lost a
# process (76, or the code of a signal): requeue the job, which resumes from the last checkpoint.
elif ((code >= 75 && code != 130 && ${SLURM_RESTART_COUNT:-0} < 100)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
