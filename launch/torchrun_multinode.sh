#!/usr/bin/env bash
# Train on several machines: start the same command on each of them, within ten minutes. Run on two network hosts without
# GPUs (tests/launch/test_network.py), not at scale.
#
#   HEAD=HOST[:PORT] NNODES=N|MIN:MAX [NPROC=P] [RESTARTS=R] launch/torchrun_multinode.sh CONFIG [key.path=value ...]
#
# HEAD      the machine where all meet, as the others know it; PORT is 29400 unless given
# NNODES    number of machines, or MIN:MAX: as many as come, and more later
# NPROC     processes on this machine; one per GPU unless given (one where there is none)
# RESTARTS  failures after which the run is started again; 3 unless given
#
# The code, the data and run.dir must be found under the same paths on every machine; run.dir must be shared. HEAD unpickles
# what it is sent on PORT: let nobody else reach it.
set -euo pipefail

if [ $# -eq 0 ] || [ -z "${HEAD:-}" ] || [ -z "${NNODES:-}" ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
exec python -m bigbatch launch ${NPROC:+--nproc "$NPROC"} --nnodes "$NNODES" --head "$HEAD" \
    --max-restarts "${RESTARTS:-3}" "$@"
