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
    GEOMETRIES,
    ROPE_DIM,
    Call,
    Extents,
    Geometry,
    Layer,
    Step,
    arguments_of_call,
    check_call,
    geometry_of,
)
from .errors import UserError

K_FORMATS = ("fp8_pow2", "fp8_ds_mla")  # of vLLM's CPU engine, the only one that captures
FORMAT = "2"  # changes when the tensors or the header do
MOST_BYTES = 256 << 20  # of a file
_MOST_WINDOW_BYTES = 4 * MOST_BYTES  # of their rows in fp32: a row is in two windows at most
_MOST_CACHE_BYTES = 1 << 44
_MARK = "dsv4_indexer_capture"
_TENSORS = (
    *("kv_score", "ape", "norm_weight"),
    *Step._fields,
    *("kept_pages", "kept_rows", "kept_positions", "kept_cos_sin"),
)


class Capture(NamedTuple):
    """`tensors`: of _TENSORS. `notes`: what was captured, when and why."""

    tensors: Mapping[str, Tensor]
    geometry: Geometry
    k_format: str
    k_page: int  # entries of a K page
    extents: Extents
    eps: float
    notes: Mapping[str, str]

    @staticmethod
    def of(
        layer: Layer,
        k_format: str,
        step: Step,
        kv_score: Tensor,
        eps: float,
        notes: Mapping[str, str],
    ) -> "Capture":
        """The values may be wrong: what lies outside of a cache or table is left out."""
        extents, table = Extents.of(layer), step.inner_state_block_table
        geometry = geometry_of(layer.ape, k_format)
        pages, ratio = _pages_of(step, extents, geometry), geometry.ratio
        columns = int(step.positions.max()) // extents.state_page + 1  # that the step can ask for
        rows = step.positions[step.closing(ratio)] - ratio + 1
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
        k_page = layer.k_cache.shape[1]
        return Capture(tensors, geometry, k_format, k_page, extents, eps, notes)

    def save(self, file: Path) -> None:
        """The file appears whole or not at all. Raises UserError if it would be too large, or
        cannot be written."""
        from safetensors.torch import save_file

        size = sum(tensor.nbytes for tensor in self.tensors.values())
        if size > MOST_BYTES:
            raise UserError(f"{file} would have {size} bytes; a capture has at most {MOST_BYTES}")
        numbers = self.geometry._asdict() | self.extents._asdict() | {"k_page": self.k_page}
        header = {name: str(number) for name, number in numbers.items()}
        header |= {"k_format": self.k_format, "eps": str(self.eps), "version": __version__}
        copies = {name: tensor.clone().contiguous() for name, tensor in self.tensors.items()}
        new = file.with_name(f".{file.name}.new")
        try:
            save_file(copies, new, metadata={**self.notes, **header, _MARK: FORMAT})
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
        if (found := notes.pop(_MARK, "none")) != FORMAT:
            raise UserError(f"{file} is a capture of format {found}; this version reads {FORMAT}")
        try:
            geometry = Geometry(*(int(notes.pop(name)) for name in Geometry._fields))
            extents = Extents(*(int(notes.pop(name)) for name in Extents._fields))
            k_format, k_page = notes.pop("k_format"), int(notes.pop("k_page"))
            eps = float(notes.pop("eps"))
        except (KeyError, ValueError):
            raise UserError(f"{file} is no capture: its header lacks a number") from None
        if k_format not in K_FORMATS or k_format not in GEOMETRIES.get(geometry, ()) or k_page < 1:
            raise UserError(
                f"{file} is no capture: no compressor has {geometry} and pages of {k_page} entries "
                f"of {k_format!r}"
            )
        return Capture(tensors, geometry, k_format, k_page, extents, eps, notes)

    def call(self) -> Call:
        """The call on caches of its own, which are zero where nothing was captured. Raises
        ContractError, or UserError for sizes that no cache has."""
        t, extents = self.tensors, self.extents
        row_width = self.geometry.row_width
        k_entry = int(arguments_of_call(self.k_format, self.geometry)["k_cache"].sizes[-1])
        state = _sparse(extents.state_pages, extents.state_page, row_width, kind=torch.float32)
        cos_sin = _sparse(extents.max_pos, ROPE_DIM, kind=torch.float32)
        k_pages = extents.k_entries // self.k_page
        k_cache = _sparse(k_pages, self.k_page, k_entry, kind=torch.uint8)
        _put(state, t["kept_pages"], t["kept_rows"])
        _put(cos_sin, t["kept_positions"], t["kept_cos_sin"])
        layer = Layer(t["ape"], t["norm_weight"], cos_sin, state, k_cache)
        step = Step(*(t[name] for name in Step._fields))
        call = Call(kv_score=t["kv_score"], **layer._asdict(), **step._asdict())
        check_call(call, self.k_format)
        windows = len(step.closing(self.geometry.ratio)) * self.geometry.window
        if windows * row_width * state.itemsize > _MOST_WINDOW_BYTES:
            raise UserError("the capture is damaged: more windows than its tokens can close")
        return call


def _pages_of(step: Step, extents: Extents, geometry: Geometry) -> Tensor:
    """The state pages of all windows that the step closes, and of all its slots."""
    table, page = step.inner_state_block_table, extents.state_page
    closing = step.closing(geometry.ratio)
    last = geometry.window - 1
    back = torch.arange(0, last + page, page).clamp(max=last)
    column = (step.positions[closing, None] - back) // page
    request = step.token_to_req[closing, None].long().expand_as(column)
    inside = (column >= 0) & (column < table.shape[1]) & (request >= 0) & (request < len(table))
    pages = torch.cat(
        [table[request[inside], column[inside]].long(), step.inner_state_slot_mapping // page]
    )
    return pages[(pages >= 0) & (pages < extents.state_pages)].unique()


def _sparse(*shape: int, kind: torch.dtype) -> Tensor:
    """Zeros that take memory where they are touched."""
    size = math.prod(shape) * kind.itemsize
    # A size of 0 would hide a huge one in the product.
    if min(shape) < 0 or max(size, *shape) > _MOST_CACHE_BYTES:
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
