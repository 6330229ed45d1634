#!/usr/bin/env bash
# The kernels on a GPU: their tests, then their times. At most 8 minutes; needs neither tox nor a network.
#   bash kernels/gpu_session.sh [OUT]      results in OUT: tests.txt, kernels.json, kernels.md; default reports/<GPU>
#   TINY=1 bash kernels/gpu_session.sh     the same script in Triton's interpreter; its times mean nothing
# Fails if a test or a check before a timing did; the results are kept anyway.
set -euo pipefail

begun=$SECONDS
whole=480
out=${1:+$(realpath -m "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
tests=(-q -p no:cacheprovider --color=no)

if [[ ${TINY:-} ]]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    out=${out:-$(mktemp -d)}
    tests+=(kernels/test_launch.py kernels/test_attend.py -k "launch or grid or called or refused")
    session=(--tiny)
else
    slug='import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).replace("nvidia-", ""))'
    if ! gpu=$("$python" -c "$slug" 2>/dev/null); then
        echo "PyTorch sees no GPU here; TINY=1 runs this in Triton's interpreter, where times mean nothing." >&2
        exit 2
    fi
    unset TRITON_INTERPRET
    out=${out:-reports/$gpu}
    tests+=(kernels -m gpu)
    if "$python" -c "import xdist" 2>/dev/null; then # most of the time goes to compiling
        tests+=(-n 8)
    fi
    session=()
fi
mkdir -p "$out"

failed=0
timeout -s INT -k 10 210 "$python" -m pytest "${tests[@]}" >"$out/tests.txt" 2>&1 || failed=$?
if ((failed == 124 || failed == 137)); then
    echo "The tests did not end within 3.5 minutes." >>"$out/tests.txt"
fi
tail -n 15 "$out/tests.txt"

left=$((whole - SECONDS + begun))
minutes=$("$python" -c "print(max(0.1, ($left - 30) / 60))")
timed=0
timeout -k 5 "$left" "$python" kernels/session.py --out "$out" --minutes "$minutes" "${session[@]}" || timed=$?

echo "tests: exit $failed; session: exit $timed; results in $out"
((failed == 0 && timed == 0))
