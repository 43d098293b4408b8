"""csrc/ascend/launch.asc, which calls CANN's runtime, is type-checked against the runtime's own
headers.

They are those in torch-npu's wheel. A launch, `kernel<<<...>>>(...)`, is no C++: it is read as
`configured(kernel, ...)(...)`, so that its configuration is checked as well as the kernel's
arguments. What the kernels call is the emulation's.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from emulator import COMPILER, HERE
from vllm_dsv4_indexer.ops import ascend

ASCEND = HERE.parents[1] / "csrc" / "ascend"
WHEEL = Path(sys.prefix, "beside", "torch-npu-2.10.0.post4")  # `make test` puts it there
HEADERS = WHEEL / "torch_npu/include/third_party/acl/inc"
FLAGS = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
CONFIGURED = """
#include "acl/acl.h"
template <class Kernel>
Kernel* configured(Kernel* kernel, uint32_t, void*, aclrtStream) { return kernel; }
#line 1 "launch.asc"
"""
SOURCE = (ASCEND / "launch.asc").read_text()
LAUNCH = re.compile(r"(\w+)<<<(.+?)>>>")

STRUCT = re.compile(r"^struct (\w+) \{$(.+?)^\};$", re.DOTALL | re.MULTILINE)
FIELD = re.compile(r"^  (\w+) (\w+);", re.MULTILINE)
TYPES = {"int64_t": "q", "uint64_t": "q", "float": "f"}

MISTAKES = {
    "a value for a pointer": ("aclrtGetDevice(&device)", "aclrtGetDevice(device)"),
    "a pointer to another type": ("CORE_NUM, &cores)", "CORE_NUM, &device)"),
    "a number for an enumerator": ("ACL_DEV_ATTR_VECTOR_CORE_NUM", "201"),
    "a launch on what is no stream": (
        "save_int8<<<cores, 0, stream",
        "save_int8<<<cores, 0, cores",
    ),
    "a launch of other values": (
        "save_fp8<<<cores, 0, stream>>>(a",
        "save_fp8<<<cores, 0, stream>>>(t",
    ),
    "another signature than abi.h's": ("const RunArguments* arguments", "RunArguments* arguments"),
    "no level of errors": (
        "error = aclrtGetLastError(ACL_RT_THREAD_LEVEL)",
        "error = aclrtGetLastError(0)",
    ),
}


def errors(source: str, architecture: int) -> str:
    includes = [f"-I{ASCEND}", f"-I{HERE}", "-isystem", HEADERS]
    command = [
        COMPILER,
        *FLAGS,
        f"-DDSV4_ASCEND_ARCH={architecture}",
        '-DDSV4_SOURCES=""',
        *includes,
        "-x",
        "c++",
        "-",
    ]
    text = CONFIGURED + LAUNCH.sub(r"configured(\1, \2)", source)
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    assert bool(done.returncode) == bool(done.stderr)
    return done.stderr


@pytest.mark.parametrize("architecture", [2201, 3510])
def test_the_host_code_calls_the_runtime_as_its_headers_declare_it(architecture):
    assert errors(SOURCE, architecture) == ""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_where_it_stands(mistake):
    right, wrong = MISTAKES[mistake]
    before, behind = SOURCE.split(right)
    line = before.count("\n") + 1
    assert re.search(rf"launch\.asc:{line}:\d+: error:", errors(before + wrong + behind, 3510))


def test_python_has_the_fields_of_abi_h_in_name_order_and_width():
    structs = dict(STRUCT.findall((ASCEND / "abi.h").read_text()))
    ours = {
        "PlanArguments": (ascend.PLAN_FIELDS, ascend._PLAN.format),
        "RunArguments": (
            ascend.RUN_FIELDS,
            ascend._CALL.format + ascend._LAYER.format.removesuffix("0q"),
        ),
    }
    assert set(structs) == set(ours)
    for name, (fields, widths) in ours.items():
        types, names = zip(*FIELD.findall(structs[name]))
        assert names == fields
        assert "".join(TYPES[t] for t in types) == re.sub(
            r"(\d+)q", lambda m: "q" * int(m[1]), widths
        )
