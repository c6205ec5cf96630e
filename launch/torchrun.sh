#!/usr/bin/env bash
# Train on one machine, a process per GPU (one process where there is none).
#
#   launch/torchrun.sh CONFIG [key.path=value ...]
#   NPROC=2 launch/torchrun.sh configs/digits/lars_512.yaml
#
# NPROC            processes
# OMP_NUM_THREADS  threads of each; unless set, the cores shared out evenly
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
NPROC=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
share=$(($(nproc) / NPROC))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
echo "torchrun: $NPROC processes, OMP_NUM_THREADS=$OMP_NUM_THREADS" >&2

exec torchrun --standalone --nproc-per-node "$NPROC" -m bigbatch train "$@"
