"""A capture: the inputs of one layer of one step, in a file of safetensors.

What is captured is what the step can read: of the state the pages of its windows, of the table of
cosines the rows of its entries. `Capture.call` puts them back where they were, in caches of the
same size, of which only the pages that are touched take memory.
"""

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import __version__
from .contract import (
    FP8_ENTRY_BYTES,
    FP8_PAGE_ENTRIES,
    RATIO,
    ROPE_DIM,
    ROW_WIDTH,
    WINDOW,
    Call,
    Extents,
    Layer,
    Step,
    check_call,
)
from .errors import UserError

K_FORMAT = "fp8_pow2"  # of vLLM's CPU engine, the only one that captures
FORMAT = "1"  # changes when the tensors do
MOST_BYTES = 256 << 20  # of a file
_MOST_CACHE_BYTES = 1 << 44
_TENSORS = (
    *("kv_score", "ape", "norm_weight"),
    *Step._fields,
    *("kept_pages", "kept_rows", "kept_positions", "kept_cos_sin"),
)


class Capture(NamedTuple):
    """`tensors`: of _TENSORS. `notes`: what was captured, when and why."""

    tensors: Mapping[str, Tensor]
    extents: Extents
    eps: float
    notes: Mapping[str, str]

    @staticmethod
    def of(
        layer: Layer, step: Step, kv_score: Tensor, eps: float, notes: Mapping[str, str]
    ) -> "Capture":
        """The values may be wrong: what lies outside of a cache or table is left out."""
        extents, table = Extents.of(layer), step.inner_state_block_table
        pages = _pages_of(step, extents)
        columns = int(step.positions.max()) // extents.state_page + 1  # that the step can ask for
        rows = step.positions[step.positions % RATIO == RATIO - 1] - RATIO + 1
        rows = rows[(rows >= 0) & (rows < extents.max_pos)].unique()
        tensors = step._asdict() | dict(
            inner_state_block_table=table[:, : max(columns, 1)],
            kv_score=kv_score,
            ape=layer.ape,
            norm_weight=layer.norm_weight,
            kept_pages=pages,
            kept_rows=layer.inner_state_cache[pages],
            kept_positions=rows,
            kept_cos_sin=layer.cos_sin_cache[rows],
        )
        return Capture(tensors, extents, eps, notes)

    def save(self, file: Path) -> None:
        """The file appears whole or not at all. Raises UserError if it would be too large, or
        cannot be written."""
        from safetensors.torch import save_file

        size = sum(tensor.nbytes for tensor in self.tensors.values())
        if size > MOST_BYTES:
            raise UserError(f"{file} would have {size} bytes; a capture has at most {MOST_BYTES}")
        numbers = {name: str(number) for name, number in self.extents._asdict().items()}
        about = {"dsv4_indexer_capture": FORMAT, "version": __version__, "eps": str(self.eps)}
        copies = {name: tensor.clone().contiguous() for name, tensor in self.tensors.items()}
        new = file.with_name(f".{file.name}.new")
        try:
            save_file(copies, new, metadata={**self.notes, **numbers, **about})
            new.replace(file)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error}") from None
        finally:
            new.unlink(missing_ok=True)

    @staticmethod
    def load(file: Path) -> "Capture":
        """Raises UserError unless the file is a capture. What its tensors say is checked by
        `call`, and by the op."""
        from safetensors import SafetensorError, safe_open

        try:
            if file.stat().st_size > MOST_BYTES + (1 << 20):
                raise UserError(f"{file} is larger than a capture can be")
            with safe_open(file, "pt") as opened:
                notes = dict(opened.metadata() or {})
                tensors = {name: opened.get_tensor(name) for name in _TENSORS}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read as a capture: {error}") from None
        if (found := notes.pop("dsv4_indexer_capture", "none")) != FORMAT:
            raise UserError(f"{file} is a capture of format {found}; this version reads {FORMAT}")
        try:
            extents = Extents(*(int(notes.pop(name)) for name in Extents._fields))
            return Capture(tensors, extents, float(notes.pop("eps")), notes)
        except (KeyError, ValueError):
            raise UserError(f"{file} is no capture: its header lacks a number") from None

    def call(self) -> Call:
        """The call on caches of its own, which are zero where nothing was captured. Raises
        ContractError, or UserError for sizes that no cache has."""
        t, extents = self.tensors, self.extents
        state = _sparse(extents.state_pages, extents.state_page, ROW_WIDTH, kind=torch.float32)
        cos_sin = _sparse(extents.max_pos, ROPE_DIM, kind=torch.float32)
        k_cache = _sparse(
            extents.k_entries // FP8_PAGE_ENTRIES,
            FP8_PAGE_ENTRIES,
            FP8_ENTRY_BYTES,
            kind=torch.uint8,
        )
        _put(state, t["kept_pages"], t["kept_rows"])
        _put(cos_sin, t["kept_positions"], t["kept_cos_sin"])
        layer = Layer(t["ape"], t["norm_weight"], cos_sin, state, k_cache)
        step = Step(*(t[name] for name in Step._fields))
        call = Call(kv_score=t["kv_score"], **layer._asdict(), **step._asdict())
        check_call(call, K_FORMAT)
        return call


def _pages_of(step: Step, extents: Extents) -> Tensor:
    """The state pages of all windows that end with a token of the step, and of all its slots."""
    table, page = step.inner_state_block_table, extents.state_page
    back = torch.arange(0, WINDOW + page, page)
    column = (step.positions[:, None] - back) // page
    request = step.token_to_req.long()[:, None].expand_as(column)
    inside = (column >= 0) & (column < table.shape[1]) & (request >= 0) & (request < len(table))
    pages = torch.cat(
        [table[request[inside], column[inside]].long(), step.inner_state_slot_mapping // page]
    )
    return pages[(pages >= 0) & (pages < extents.state_pages)].unique()


def _sparse(*shape: int, kind: torch.dtype) -> Tensor:
    """Zeros that take memory where they are touched."""
    size = math.prod(shape) * kind.itemsize
    if min(shape) < 0 or size > _MOST_CACHE_BYTES:
        raise UserError(f"the capture is damaged: a cache of the shape {list(shape)}")
    noreserve = 0x4000  # of Linux; the module names it from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
    if not size:
        return torch.zeros(shape, dtype=kind)
    return torch.frombuffer(mmap.mmap(-1, size, flags), dtype=kind).view(shape)


def _put(cache: Tensor, where: Tensor, rows: Tensor) -> None:
    """cache[where] = rows, of which none is believed."""
    fits = where.dtype is torch.int64 and rows.dtype is cache.dtype and where.dim() == 1
    fits = fits and rows.shape == (len(where), *cache.shape[1:])
    if not fits or (len(where) and not 0 <= where.min() <= where.max() < len(cache)):
        raise UserError("the capture is damaged: pages lie outside of their cache")
    cache[where] = rows
