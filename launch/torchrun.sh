#!/usr/bin/env bash
# Train on one machine, a process per GPU (one process where there is none): bigbatch launch.
#
#   launch/torchrun.sh CONFIG [key.path=value ...]
#   NPROC=2 launch/torchrun.sh configs/digits/lars_512.yaml
#
# NPROC            processes
# RESTARTS         failures after which the run is started again; 0 unless given
# OMP_NUM_THREADS  threads of each; unless set, the cores shared out evenly
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
exec python -m bigbatch launch ${NPROC:+--nproc "$NPROC"} --max-restarts "${RESTARTS:-0}" "$@"
