#!/usr/bin/env bash
# Train on several machines: start the same command on each of them, within a few minutes. Not run at this scale.
#
#   HEAD=HOST[:PORT] NNODES=N [NPROC=P] launch/torchrun_multinode.sh CONFIG [key.path=value ...]
#
# HEAD    a machine of the run that all others reach, as they know it; PORT is 29400 unless given
# NNODES  number of machines
# NPROC   processes on this machine; one per GPU unless given (one where there is none)
# RUN_ID  tells runs apart that use the same HEAD at the same time; "bigbatch" unless given
#
# The code, the data and run.dir must be found under the same paths on every machine; run.dir must be shared.
set -euo pipefail

if [ $# -eq 0 ] || [ -z "${HEAD:-}" ] || [ -z "${NNODES:-}" ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
NPROC=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
share=$(($(nproc) / NPROC))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
echo "torchrun: $NPROC processes here of $NNODES machines, head $HEAD, OMP_NUM_THREADS=$OMP_NUM_THREADS" >&2

exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC" --rdzv-backend c10d --rdzv-endpoint "$HEAD" \
    --rdzv-id "${RUN_ID:-bigbatch}" -m bigbatch train "$@"
