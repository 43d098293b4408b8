"""What vllm-ascend needs of the device to be imported and run on a machine that has none.

`torch_npu`, `acl` and `torchair` are modules whose every attribute exists: classes without behaviour, and functions that
return None. vllm-ascend's model runner is one, too: importing it asks for more packages than are installed for tests.
"""

import importlib.machinery
import sys
import types

import torch

ABSENT = ("torch_npu", "acl", "torchair")


class Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {}) if name.strip("_")[0].isupper() else Stub(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs) -> None:
        return None


class StubFinder:
    """Finds every module below those that are absent."""

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec) -> Stub:
        return Stub(spec.name)

    def exec_module(self, module) -> None:
        pass


def install() -> None:
    sys.meta_path.insert(0, StubFinder())
    import torch_npu
    import torch_npu._C  # noqa: F401
    import torch_npu.npu

    torch.utils.rename_privateuse1_backend("npu")  # so that torch.device("npu") is one
    torch.npu = torch_npu.npu
    torch.npu.is_available = lambda: False  # transformers asks
    sys.modules["vllm_ascend.worker.model_runner_v1"] = Stub("vllm_ascend.worker.model_runner_v1")
