#!/usr/bin/env bash
# Digits at a global batch of 32 with SGD, then at 512 with LARS on two processes, for the same number of epochs, and both
# results side by side. Trains afresh every time, into runs/demo.
#
#   launch/demo.sh [DURATION]        DURATION is 30ep unless given
set -euo pipefail
cd "$(dirname "$0")/.."

duration=${1:-30ep}
# Pictures of 8×8 pixels are too small to share out: threads would only wait for one another.
export OMP_NUM_THREADS=1
rm -rf runs/demo

echo "1/2  batch 32, SGD, one process"
python -m bigbatch train configs/digits/sgd_32.yaml run.dir=runs/demo/sgd_32 duration="$duration"

echo "2/2  batch 512, LARS, two processes"
torchrun --standalone --nproc-per-node 2 -m bigbatch train configs/digits/lars_512.yaml \
    run.dir=runs/demo/lars_512 duration="$duration"

python launch/compare.py runs/demo/sgd_32 runs/demo/lars_512
