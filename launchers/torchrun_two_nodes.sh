#!/bin/bash
# On each of two machines: HEAD=<first machine> NODE=<0 or 1> launchers/torchrun_two_nodes.sh sp.size=8 dp.size=2
# The folder that it runs in has to be shared by both.
set -euo pipefail
exec .venv/bin/torchrun --nnodes=2 --node-rank="$NODE" --nproc-per-node="${GPUS:-8}" \
    --master-addr="$HEAD" --master-port="${PORT:-29500}" run.py launch=attached "$@"
