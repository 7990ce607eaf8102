#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: see benchmarks/gpu.py for what it measures.
#
#   bash benchmarks/gpu.sh [--wheels DIR] [--smoke] [--budget SECONDS] [--out DIR] [--model DIR]
#
# --wheels DIR   install the wheels in DIR beside the packages that are there, without a network
# --smoke        every part on a CPU, with tiny models and a stand-in for the kernel
# --budget N     end within N seconds (default 440); what does not fit is left out, and said so
# --out DIR      where results.json, table.md and log.txt go (default: a new folder under /tmp)
# --model DIR    a small model to run the displacement grid on
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
rest=()
while [ $# -gt 0 ]; do
    if [ "$1" = --wheels ]; then
        site=$(mktemp -d)
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$2"/*.whl
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
        shift 2
    else
        rest+=("$1")
        shift
    fi
done
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
exec "$python" "$root/benchmarks/gpu.py" ${rest[@]+"${rest[@]}"}
