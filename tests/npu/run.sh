#!/bin/sh
# `make ascend-test`: everything that wants an NPU, on the machine that has one. Not yet run by us.
#   PYTHON   the interpreter that has torch_npu, vLLM and vllm-ascend, as in the images of docker/ (default: python3)
#   MODEL    a DeepSeek-V4 checkpoint for the engine (default: the demo checkpoint)
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}

echo "== the machine"
"$PYTHON" tests/npu/machine.py
architecture=$("$PYTHON" tests/npu/machine.py architecture)

echo "== building the library for dav-$architecture"
SKBUILD_CMAKE_DEFINE="DSV4_ASCEND_ARCH=$architecture" "$PYTHON" -m pip install --no-deps -e .

echo "== the op against the reference, and the engine against the stock compressor"
"$PYTHON" -m pytest -o python_files='check_*.py' -o pythonpath='tests/op tests/engine' --durations=10 tests/npu

echo "== the cost of the three algorithms"
"$PYTHON" tests/npu/cost.py
