#!/usr/bin/env bash
# What there is to know of a card in less than ten minutes: the accelerator tests, `toast benchmark` in bfloat16
# with compiled models, and the demonstration, as one JSON file with the card's name.
#
#     scripts/accelerator_check.sh [--device DEVICE] [--wheels FOLDER] [--out FOLDER] [--small]
#
#   --device   auto (the accelerator that is there), cuda, xpu, mps or cpu. Default: auto.
#   --wheels   Wheels of all dependencies (pip download ".[dev]" bitsandbytes): a virtual environment is made of
#              them in OUT, without a network. Default: the python on PATH, which has to have the dependencies.
#   --out      Folder for everything that is written. Default: accelerator-check.
#   --small    Tiny models, some of the tests and few pictures, to see that it runs.
#
# Each part has a time limit, the benchmark what is left of ten minutes; measures that it has finished by then are
# kept. On a CPU the limits are five times as long. The exit status is 0 if every part ended well.
set -euo pipefail

device=auto wheels="" out=accelerator-check small=""
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:?--device needs a name}; shift 2 ;;
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        --out) out=${2:?--out needs a folder}; shift 2 ;;
        --small) small=yes; shift ;;
        *) echo "usage: $0 [--device DEVICE] [--wheels FOLDER] [--out FOLDER] [--small]; got $1" >&2; exit 2 ;;
    esac
done
out=$(mkdir -p "$out" && cd "$out" && pwd)
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd)
cd "$(dirname "$0")/.."
if [ -n "$wheels" ]; then
    python3 -m venv "$out/venv"
    . "$out/venv/bin/activate"
    pip install --quiet --no-index --find-links "$wheels" -e ".[dev]"
    pip install --quiet --no-index --find-links "$wheels" bitsandbytes || echo "no bitsandbytes: not tested" >&2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# A device that is not there is an error now, and not in every part.
device=$(python -c "import sys; from toast.benchmark.suite import place_of
print(place_of(sys.argv[1], 'float32', False).device.type)" "$device")
[ "$device" != cpu ] || export ACCELERATE_USE_CPU=true # which the demonstration goes by
export TOAST_TEST_DEVICE=$device

factor=1
[ "$device" != cpu ] || factor=5
parts=()
part() { # NAME SECONDS COMMAND...: runs a part, notes its exit status and its time
    local name=$1 limit=$2 began=$SECONDS status=0
    shift 2
    echo "+ $*"
    timeout --kill-after 10 "$limit" "$@" || status=$?
    parts+=("$name=$status:$((SECONDS - began))")
}

tests=(-m pytest -n 0 -q -m accelerator tests/accelerator "--junitxml=$out/tests.xml")
measures=(--device "$device" --dtype bfloat16 --compile --out "$out/benchmark")
demo=(--out "$out/demo")
if [ -n "$small" ]; then
    tests+=(-k "not compil and not memory")
    measures+=(--small --rounds 1 --only forward)
    demo+=(--train 64 --test 20 --generic 64 --share 0.01)
else
    # The most wanted first: a compiled contender takes up to a minute until it runs.
    for name in forward step-16 memory decode waits; do measures+=(--only "$name"); done
    measures+=(--rounds 3)
    demo+=(--share 0.34)
fi
rm -rf "$out/tests.xml" "$out/benchmark" "$out/demo" # of an earlier call
part tests $((210 * factor)) python "${tests[@]}"
part demo $((120 * factor)) python -m toast demo "${demo[@]}"
left=$((580 * factor - SECONDS))
part benchmark $((left > 60 ? left : 60)) python -m toast benchmark "${measures[@]}"
python scripts/accelerator_results.py "$out" "$device" "${parts[@]}"
