#!/usr/bin/env bash
# Runs a script on every host of a Cloud TPU slice, with this folder's code. docs/tpu_pod.md
#
#   launch/tpu_pod.sh NAME ZONE train.py --config=configs/vit_b16.py --workdir=/mnt/runs/vit_b16
#
# --workdir is a folder that all hosts see. Ctrl-C, or `launch/tpu_pod.sh NAME ZONE stop`: the run
# saves and ends; the same command goes on.
set -euo pipefail

if (($# < 3)); then
    sed -n 's/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
cd "$(dirname "$0")/.."

on_every_host() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

running="pgrep -f '^[.]venv/bin/python ' >/dev/null"
stop() {
    on_every_host "pkill -TERM -f '^[.]venv/bin/python ' || true
while $running; do sleep 1; done"
}

if [[ $1 == stop ]]; then
    stop
    exit
fi

on_every_host "if $running; then echo 'A script is running here: stop it first' >&2; exit 2; fi"
code=$(mktemp -d)
trap 'rm -rf "$code"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -czf "$code/vit_jax.tgz"
gcloud compute tpus tpu-vm scp "$code/vit_jax.tgz" "$name:" --zone="$zone" --worker=all

# Ctrl-C here would end ssh alone: the hosts are told.
trap stop INT
on_every_host "set -e
mkdir -p vit_jax && tar xzf vit_jax.tgz -C vit_jax && cd vit_jax
python3 -m venv .venv
.venv/bin/pip install --quiet -r requirements.txt 'jax[tpu]'
exec .venv/bin/python $(printf '%q ' "$@")"
