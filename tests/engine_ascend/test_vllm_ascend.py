"""The vllm-ascend engine against the real packages: `contract/` in a process of its own for each
pair and product.

That process has the pair first on its path, stubs for the device's libraries, and no other plugin
of vLLM's: those of vllm-ascend's own that are left out register models and connectors, and import
what is not installed here.

Others are tested by name, whether the table of engines has them or not. They are fetched
as set-up fetches these: TEST_VLLM_ASCEND=0.28.0rc1,0.29.0rc1 pytest tests/engine_ascend
"""

import os

import pytest
from pairs import run_contract

WHOLE = ("A2", ".")
# Selection and steps are the same for all products.
RUNS = {
    "0.30.0rc2": [WHOLE, ("A5", "check_layer.py check_prefix.py check_second_family.py")],
    "0.26.0rc1": [("A5", "check_layer.py check_prefix.py")],
    "0.23.0.post1": [WHOLE],
}
if named := os.environ.get("TEST_VLLM_ASCEND"):
    RUNS = dict.fromkeys(named.split(","), RUNS["0.30.0rc2"])


@pytest.mark.parametrize(
    "version, product, files",
    [(version, *run) for version, runs in RUNS.items() for run in runs],
)
def test_the_engine_keeps_its_contract_with_vllm_ascend(version: str, product: str, files: str):
    passed, printed = run_contract(version, product, files.split())
    assert passed, printed
