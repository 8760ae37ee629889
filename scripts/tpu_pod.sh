#!/usr/bin/env bash
# Runs this code on all hosts of a TPU pod slice; needs gcloud. From the root of the repository:
#
#   scripts/tpu_pod.sh setup NAME ZONE
#   scripts/tpu_pod.sh run NAME ZONE --config configs/ve/cifar10.py --mode train --workdir gs://BUCKET/run
#
# `setup` copies the last commit here to ~/score_sde of every host and installs it; do it again
# after a change. PYTHON names the hosts' Python, 3.11 or newer, by default python3. `run` starts
# main.py on all of them; interrupted, it may be given again as it was.
#
# Tried: the commands that it gives to gcloud, by a test. Not tried: on a pod.
set -euo pipefail

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# -ge 3 ] || usage
action=$1 name=$2 zone=$3
shift 3

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}

case $action in
  setup)
    folder=$(mktemp -d)
    trap 'rm -r "$folder"' EXIT
    archive=$folder/score_sde.tar.gz
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$name:" --zone "$zone" --worker=all
    on_all_hosts 'mkdir -p score_sde && tar -xzf score_sde.tar.gz -C score_sde && cd score_sde &&
      '"${PYTHON:-python3}"' -m venv .venv &&
      .venv/bin/pip install --quiet -r requirements.txt gcsfs google-cloud-storage "jax[tpu]>=0.10.0,<0.13"'
    ;;
  run)
    on_all_hosts "cd score_sde && .venv/bin/python main.py --distributed $(printf '%q ' "$@")"
    ;;
  *) usage ;;
esac
