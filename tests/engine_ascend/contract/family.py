"""What the two families of vllm-ascend have under different names, and pass in different ways."""

import runpy
from pathlib import Path
from typing import Any

import vllm_ascend
import vllm_ascend.ops
from packaging.version import Version
from torch import Tensor
from vllm_ascend.attention.dsa_v1 import AscendDSAImpl, AscendDSAMetadataBuilder
from vllm_ascend.attention.utils import AscendCommonAttentionMetadata

from vllm_dsv4_indexer.contract import RATIO
from vllm_dsv4_indexer.engines.vllm_ascend import found, loading
from vllm_dsv4_indexer.engines.vllm_ascend.indexer import Keys

FIRST = loading.family().__name__.endswith("family1")
if FIRST:
    from vllm_ascend.attention.dsa_v1 import AscendDSABackend as Backend
    from vllm_ascend.models.deepseek_v4 import AscendDeepseekV4ForCausalLM, DeepseekV4Attention
    from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig
else:
    from vllm_ascend.attention.dsa_v1 import AscendDSAC4Backend as Backend
    from vllm_ascend.models.deepseek_v4.model import (
        AscendDeepseekV4ForCausalLM,
        DeepseekV4Attention,
    )
    from vllm_ascend.quantization.configs.modelslim_config import AscendModelSlimConfig

    # A worker's patch for the name "fp8", from 0.29 on. Others import what is absent here.
    patch = Path(vllm_ascend.__file__).parent / "patch/worker/patch_kv_cache_dtype.py"
    if patch.exists():
        runpy.run_path(str(patch))

__all__ = ["AscendDeepseekV4ForCausalLM", "AscendModelSlimConfig", "Backend", "DeepseekV4Attention"]
# The caches of a layer, in the order in which the first family's attention gets their metadata.
CACHES = (
    "attn",
    "compressor.state_cache",
    "indexer.compressor.state_cache",
    "indexer.k_cache",
    "swa_cache",
)

BEFORE_0_28 = Version(found().vllm_ascend) < Version("0.28.0rc1")
READS_THE_KEYS = (
    "npu_vllm_quant_lightning_indexer" if BEFORE_0_28 else "npu_quant_lightning_indexer_v2"
)


def entries_of_page(spec: Any) -> int:
    """How many keys a page of the K cache holds. From 0.27 on a block is counted in tokens."""
    return spec.block_size if FIRST else spec.block_size // RATIO


def build(
    builder: AscendDSAMetadataBuilder,
    common: AscendCommonAttentionMetadata,
    requests: int,
    block_size: int,
    shared: dict[str, dict],
) -> Any:
    """A cache's metadata of a step, by its real builder. `shared`: with the step's other caches."""
    if not FIRST:
        return builder.build(
            0, common, num_actual_reqs=requests, common_ratio_to_sas_metadata=shared["common"]
        )
    names = {f"{kind}_ratio_to_sas_metadata": made for kind, made in shared.items()}
    return builder.build(0, common, num_reqs_actual=requests, block_size=block_size, **names)


def as_the_attention_gets_them(prefix: str, metadata: list) -> Any:
    """A layer's metadata, one for each of CACHES."""
    if FIRST:
        return metadata
    return {f"{prefix}.{name}": part for name, part in zip(CACHES, metadata)}


def update_context_parallel(attention: Any, prefix: str, x: Tensor, kv_cache, metadata) -> None:
    """The one step of context parallelism's `_forward` that is ours; before and after it ranks
    talk."""
    if FIRST:
        starts = metadata[0].req_metadata.query_start_loc
        attention._update_indexer_cache(x, kv_cache, metadata, starts)
        return
    of_layer = attention._get_layer_metadata(f"{prefix}.attn", metadata)
    starts = of_layer.compressor_cache.req_metadata.query_start_loc
    attention._update_indexer_cache(
        x=x, kv_cache=kv_cache, metadata=of_layer, actual_seq_lengths_query=starts
    )


def keys(attention: AscendDSAImpl) -> Keys | None:
    """Ours, None if its indexer's are stock's."""
    return getattr(attention if FIRST else attention.indexer, "keys", None)
