#!/usr/bin/env bash
# CIFAR-10 from images to a measured model, as configs/edm/cifar10.py:fast plans it for ten minutes
# of one GPU of the H100's class:
#
#   scripts/cifar10_fast.sh FOLDER
#   scripts/cifar10_fast.sh FOLDER --quick    all of it with a tiny network, on a CPU
#
# FOLDER holds train/<class>/ and test/<class>/, or tar files of them, which are unpacked. It trains,
# and measures the bits/dim of the test images, and how far 10,000 samples are from the training
# images. Everything goes to runs/edm/cifar10-fast (--quick: cifar10-quick), or to WORKDIR: its
# index.html shows the numbers and a grid of samples. Interrupted, it may be given again as it was.
#
# FEATURES=inception measures FID, with weights that are downloaded, or read from INCEPTION; by
# default samples are compared by their pixels. PYTHON names the interpreter.
set -euo pipefail

usage() {
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# -eq 1 ] || { [ $# -eq 2 ] && [ "$2" = --quick ]; } || usage
[ -d "$1" ] || { echo "error: $1 is not a folder" >&2; usage; }
images=$(realpath "$1")
name=cifar10-fast changes=()
if [ $# -eq 2 ]; then
  name=cifar10-quick
  changes=(
    --config.model.nf=8 '--config.model.ch_mult=(1,)' --config.model.num_res_blocks=1
    --config.model.dtype=float32 --config.training.batch_size=8 --config.training.n_iters=40
    --config.training.snapshot_freq=40 --config.training.snapshot_freq_for_preemption=10
    --config.training.log_freq=10 --config.training.eval_freq=20 --config.optim.warmup=80
    --config.ema.half_life=80.0 --config.eval.batch_size=16 --config.eval.num_samples=32
    --config.sampling.num_steps=6
  )
fi
[ -z "${WORKDIR:-}" ] || WORKDIR=$(realpath -m "$WORKDIR")
cd "$(dirname "$0")/.."
workdir=${WORKDIR:-$PWD/runs/edm/$name}

if [ ! -d "$images/train" ]; then
  archives=("$images"/*.tar)
  [ -e "${archives[0]}" ] || {
    echo "error: $images holds neither train/ and test/, nor tar files of them" >&2
    exit 2
  }
  images=$workdir/images
  if [ ! -d "$images" ]; then  # it is there once it is whole
    rm -rf "$images.part"
    mkdir -p "$images.part"
    for archive in "${archives[@]}"; do tar -xf "$archive" -C "$images.part"; done
    mv "$images.part" "$images"
  fi
fi

run() {
  "${PYTHON:-python3}" main.py --config configs/edm/cifar10.py:fast --workdir "$workdir" \
    --config.data.dataset=folder "--config.data.path=$images" \
    "--config.eval.features=${FEATURES:-pixels}" "--config.eval.stats_path=$workdir/stats.npz" \
    ${INCEPTION:+"--config.eval.inception_path=$INCEPTION"} "${changes[@]}" "$@"
}

run --mode train
run --mode stats
# Likelihoods need all digits of float32; samples are multiplied as model.precision says.
run --mode eval --config.model.dtype=float32
echo "Numbers and samples: $workdir/index.html"
