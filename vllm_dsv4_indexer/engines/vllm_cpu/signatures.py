"""Whether the functions of vLLM that we replace, override or call take what they took when this was
written. Importing this file shows whether they exist."""

from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.models.deepseek_v4.cpu.cpu_compressor import DeepseekV4CPUCompressor
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder

from vllm_dsv4_indexer.engines import Signatures, parameters_of, require_signatures
from vllm_dsv4_indexer.engines.vllm_cpu import patches
from vllm_dsv4_indexer.engines.vllm_cpu.compressor import OnePassCompressor
from vllm_dsv4_indexer.engines.vllm_cpu.metadata import not_read_on_cpu
from vllm_dsv4_indexer.engines.vllm_cpu.projection import ExactProjection

LAUNCH_OPTIONS = {"num_warps"}  # of a Triton kernel, which has no parameter for them


def check_signatures() -> None:
    """Raise UserError that names the function of vLLM and its parameters."""
    require_signatures("vLLM", _methods() | _kernels())


def _methods() -> Signatures:
    ours = (
        (DeepseekV4CPUCompressor, OnePassCompressor.forward),
        (UnquantizedLinearMethod, ExactProjection.apply),
        (UnquantizedLinearMethod, ExactProjection.process_weights_after_loading),
        (DeepseekV4CPUSparseSWAMetadataBuilder, patches.build_tile_scheduler),
    )
    return {(owner, function.__name__): parameters_of(function) for owner, function in ours}


def _kernels() -> Signatures:
    """The kernels of metadata. vLLM passes arguments by name."""
    return {
        (owner, name): tuple(p for p in parameters_of(ours) if p not in LAUNCH_OPTIONS)
        for owner, name, ours in patches.KERNELS
        if ours is not not_read_on_cpu
    }
