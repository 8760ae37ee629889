#!/usr/bin/env bash
# Runs this code on TPU slices of a GKE cluster, as a JobSet; needs kubectl, and docker for the image.
# From the root of the repository:
#
#   scripts/gke.sh image IMAGE
#   scripts/gke.sh print NAME IMAGE SLICES --config configs/flow/imagenet_64.py:dit_xl --mode train --workdir gs://BUCKET/run
#   scripts/gke.sh run NAME IMAGE SLICES --config ... (the same)
#
# `image` builds and pushes an image of the last commit here; do it again after a change. `print`
# writes the JobSet down, `run` gives it to the cluster. SLICES is v5e:16x16, or 2xv5e:16x16 for two
# of them: the cluster has a pool of nodes for each, and the JobSet controller (jobset.sigs.k8s.io).
# GKE tells each pod its number and its slice, which --distributed reads. A run that fails is
# started again, as a whole, and goes on from the newest checkpoint; but not after wrong input.
#
# Tried: what it prints, which a test reads. Not tried: on a cluster.
set -euo pipefail

usage() {
  sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

wrong() {
  echo "error: $1" >&2
  exit 2
}

# A string as JSON has it, and so YAML.
quoted() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

jobset() {
  local name=$1 image=$2 slices=1 topology=$3
  shift 3
  if [[ $topology =~ ^([1-9][0-9]*)x(v.*)$ ]]; then
    slices=${BASH_REMATCH[1]} topology=${BASH_REMATCH[2]}
  fi
  [[ $topology =~ ^(v4|v5e|v5p|v6e):([0-9]+(x[0-9]+)+)$ ]] ||
    wrong "SLICES is a TPU and its topology, such as v5e:16x16 or 2xv5e:16x16; got $topology"
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    wrong "NAME has up to 40 of a-z, 0-9 and -, and begins with a letter; got $name"
  local accelerator chips=1 side
  case ${topology%%:*} in
    v4) accelerator=tpu-v4-podslice ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice ;;
    v6e) accelerator=tpu-v6e-slice ;;
  esac
  topology=${topology#*:}
  for side in ${topology//x/ }; do chips=$((chips * side)); done
  [ $((chips % 4)) -eq 0 ] || wrong "a slice has 4 chips on each host; $topology are $chips"
  local hosts=$((chips / 4)) argument
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: main
              operator: In
              values: [2]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
            containers:
            - name: main
              image: $(quoted "$image")
              resources:
                limits:
                  google.com/tpu: 4
              command:
              - python
              - main.py
              - --distributed
YAML
  for argument in "$@"; do
    printf '              - %s\n' "$(quoted "$argument")"
  done
}

[ $# -ge 2 ] || usage
action=$1
shift
case $action in
  image)
    git archive --format=tar HEAD | docker build --tag "$1" --file scripts/tpu.dockerfile -
    docker push "$1"
    ;;
  print | run)
    [ $# -ge 4 ] || usage
    written=$(jobset "$@")
    if [ "$action" = print ]; then echo "$written"; else kubectl apply -f - <<<"$written"; fi
    ;;
  *) usage ;;
esac
