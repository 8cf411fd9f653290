#!/usr/bin/env bash
# Runs a script on every host of a Cloud TPU slice, with this folder's code. See docs/tpu_pod.md.
#
#   launch/tpu_pod.sh NAME ZONE train.py --config=configs/vit_b16.py --workdir=gs://BUCKET/runs/vit_b16
#   launch/tpu_pod.sh NAME ZONE stop
#
# All hosts must see --workdir. On Ctrl-C or `stop` the run saves and ends; the same command
# resumes it. With QUEUED_RESOURCE=1 in the environment, NAME is a queued resource, of one slice or
# several.
set -euo pipefail

if (($# < 3)); then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
cd "$(dirname "$0")/.."

tpus() {
    if [[ -n ${QUEUED_RESOURCE:-} ]]; then
        gcloud compute tpus queued-resources "$@" --zone="$zone" --node=all --worker=all
    else
        gcloud compute tpus tpu-vm "$@" --zone="$zone" --worker=all
    fi
}

on_every_host() {
    tpus ssh "$name" --command="$1"
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

on_every_host "if $running; then echo 'A script is already running on this host: stop it first' >&2; exit 2; fi"
code=$(mktemp -d)
trap 'rm -rf "$code"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -czf "$code/vit_jax.tgz"
tpus scp "$code/vit_jax.tgz" "$name:"

# Ctrl-C by itself would end ssh, and leave the script running on the hosts.
trap stop INT
on_every_host "set -e
mkdir -p vit_jax && tar xzf vit_jax.tgz -C vit_jax && cd vit_jax
python3 -m venv .venv
.venv/bin/pip install --quiet -r requirements.txt gcsfs 'jax[tpu]'
exec .venv/bin/python $(printf '%q ' "$@")"
