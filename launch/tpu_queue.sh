#!/usr/bin/env bash
# Requests TPU slices, waits for them, and trains on them; after a preemption, again from the start.
# See docs/tpu_pod.md.
#
#   launch/tpu_queue.sh NAME ZONE --spot --accelerator-type=v5litepod-256 \
#       --runtime-version=v2-alpha-tpuv5-lite -- \
#       train.py --config=configs/vit_b16.py --workdir=gs://BUCKET/runs/vit_b16
#
# What is before -- goes to `gcloud compute tpus queued-resources create NAME`; --node-count=2
# requests two slices. Once the run has finished, the slices are deleted. After a user's mistake, an
# error or Ctrl-C they aren't; the same command goes on with them.
set -uo pipefail

options=() found=""
if (($# > 2)); then
    name=$1 zone=$2
    shift 2
    while (($#)); do
        if [[ $1 == -- ]]; then
            found=1
            shift
            break
        fi
        options+=("$1")
        shift
    done
fi
if [[ -z $found ]] || (($# == 0 || ${#options[@]} == 0)); then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
folder=$(dirname "$0")
case " ${options[*]}" in
    *" --node-count"*) options+=("--node-prefix=$name") ;;
    *) options+=("--node-id=$name") ;;
esac

queue() {
    local command=$1
    shift
    gcloud compute tpus queued-resources "$command" "$name" --zone="$zone" "$@"
}

state() { # such as ACTIVE; NONE: there is no such request; UNKNOWN: gcloud can't tell now
    local answer
    if answer=$(queue describe --format='value(state.state)' 2>&1); then
        echo "$answer"
    elif [[ $answer == *NOT_FOUND* ]]; then
        echo NONE
    else
        echo "$answer" >&2
        echo UNKNOWN
    fi
}

stopped=""
trap 'stopped=1' INT
failures=0
while :; do
    now=$(state)
    case $now in
        ACTIVE)
            QUEUED_RESOURCE=1 "$folder/tpu_pod.sh" "$name" "$zone" "$@"
            code=$?
            if ((code == 0)) && [[ -z $stopped ]]; then
                queue delete --force --quiet
                exit 0
            fi
            if [[ -n $stopped ]] || ((code == 2)); then
                break
            fi
            # The notice of a preemption comes before the state changes.
            sleep 60
            if [[ $(state) == ACTIVE ]]; then
                ((code == 1 || ++failures > 100)) && break
                QUEUED_RESOURCE=1 "$folder/tpu_pod.sh" "$name" "$zone" stop # what a lost ssh left
            fi
            ;;
        FAILED | SUSPENDED | SUSPENDING)
            echo "$name was preempted or couldn't be created: requesting it again" >&2
            queue describe --format='yaml(state)' >&2 # why
            if [[ $now == FAILED ]] && ((++failures > 100)); then
                code=1
                break
            fi
            queue delete --force --quiet
            sleep 10
            ;;
        NONE)
            # A failed request, such as of an unknown accelerator type, isn't repeated.
            queue create "${options[@]}" || exit 2
            ;;
        *) sleep 30 ;;
    esac
    if [[ -n $stopped ]]; then
        code=130
        break
    fi
done
echo "$name is kept: launch/tpu_queue.sh with the same arguments goes on with it; to delete it:" >&2
echo "gcloud compute tpus queued-resources delete $name --zone=$zone --force" >&2
exit "$code"
