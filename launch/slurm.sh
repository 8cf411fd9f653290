#!/usr/bin/env bash
# Runs a script on GPU nodes under Slurm, one process a GPU. docs/slurm.md
#
#   sbatch --nodes=2 launch/slurm.sh train.py --config=configs/vit_b16.py --workdir=/shared/vit_b16
#
# Run from the repository's folder, which all nodes see, as they see --workdir.
#SBATCH --job-name=vit_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# Of every process: its own exit code, and a mark where that is a mistake (2) or an error (1). The
# others then end as they do when one is lost, with codes above, and srun gives the highest.
task='
trap "kill -TERM \$child" TERM
"$@" &
child=$!
wait "$child"
while code=$? && kill -0 "$child" 2>/dev/null; do wait "$child"; done
((code == 1 || code == 2)) && echo "$code" >"$MARK"
exit "$code"'
export MARK=".slurm_${SLURM_JOB_ID}_failed"
rm -f "$MARK"

# srun doesn't take it over from sbatch.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-}"
srun bash -c "$task" task "${PYTHON:-.venv/bin/python}" "$@"
code=$?
if [[ -e $MARK ]]; then
    code=$(<"$MARK")
    rm -f "$MARK"
# Saved when asked to stop (75: the time is up, or another job needs the nodes), or a process was
# lost (76, or a signal's): the same job goes on from the last checkpoint.
elif ((code >= 75 && code != 130 && ${SLURM_RESTART_COUNT:-0} < 100)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
