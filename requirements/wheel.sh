#!/bin/sh
# Behind `make wheel`: builds the sdist and, from it, a wheel for x86-64 and one for aarch64 into build/wheels. Then it
# checks each: auditwheel the tag, an environment with nothing but torch the first, an emulator the second.
# Needs an x86-64 machine, the Makefile's .venv and .venv/tools, a cross compiler ($AARCH64_CXX) and qemu-aarch64.
set -eu
cd "$(dirname "$0")/.."

OUT=$PWD/build/wheels
LOG=$PWD/build/wheel.log
TORCH=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements/cpu.in)
TORCH_INDEX_URL=${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}
PATH=$PWD/.venv/bin:$PWD/.venv/tools/bin:$PATH
export PATH

# The build backend's own functions: `pip` builds no sdist.
backend() {
    python -c "import scikit_build_core.build as backend; backend.$1('$2')" >>"$LOG"
}

echo "sdist and wheels into build/wheels"
rm -rf "$OUT"
mkdir -p "$OUT/raw" "$OUT/source"
: >"$LOG"
backend build_sdist "$OUT"
tar -xf "$OUT"/*.tar.gz -C "$OUT/source" --strip-components=1
(
    cd "$OUT/source"
    backend build_wheel "$OUT/raw"
    _PYTHON_HOST_PLATFORM=linux-aarch64 \
        SKBUILD_CMAKE_DEFINE="CMAKE_SYSTEM_NAME=Linux;CMAKE_SYSTEM_PROCESSOR=aarch64;CMAKE_CXX_COMPILER=$AARCH64_CXX" \
        backend build_wheel "$OUT/raw"
)

echo "tags that old Linuxes know, by auditwheel"
for machine in x86_64 aarch64; do
    auditwheel repair --wheel-dir "$OUT" "$OUT/raw"/*"$machine.whl" 2>>"$LOG"
    test -e "$OUT"/*"manylinux_2_17_$machine.whl" || { ls "$OUT" >&2; exit 1; }
done

echo "x86-64: installed beside nothing but $TORCH"
python -m venv "$OUT/env"
"$OUT/env/bin/python" -m pip install -q --only-binary :all: "$TORCH" ||
    "$OUT/env/bin/python" -m pip install -q --only-binary :all: "$TORCH" --index-url "$TORCH_INDEX_URL"
"$OUT/env/bin/python" -m pip install -q --no-index "$OUT"/*x86_64.whl
(
    cd /
    "$OUT/env/bin/vllm-dsv4-indexer" --version
    "$OUT/env/bin/python" -W ignore -c '
import torch
from vllm_dsv4_indexer.batches import make_batch
batch = make_batch([(5, 9), (0, 130), (67, 1)])
stored, expected = batch.clone().compress("cpu"), batch.compress("reference")
assert torch.equal(*(batch.inner_state_cache.view(torch.int32) for batch in (stored, expected)))
differing = sum(map(bytes.__ne__, stored.entries(), expected.entries()))
assert differing <= 1, "one rounding tie is rare, two are a fault"
print(f"the state has the bits of the reference; {differing} of {len(expected.entries())} entries differ")'
)

echo "aarch64: every byte as this machine stores it, under emulation"
make --no-print-directory build/aarch64/replay >>"$LOG"
python -m zipfile -e "$OUT"/*aarch64.whl "$OUT/aarch64"
AARCH64_LIBRARY="$OUT/aarch64/vllm_dsv4_indexer/libdsv4_indexer_cpu.so" pytest -q tests/native/aarch64.py -k "last_bit or 1-"

rm -rf "$OUT/raw" "$OUT/source" "$OUT/env" "$OUT/aarch64"
ls "$OUT"
