"""Which shapes are timed: the paper's grid, Llama-3-8B prefill and layers of a real model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

PAPER_TOKENS = 16384  # batch * len is constant in the paper's figures ...
PAPER_HIDDEN = 2048  # ... and so is heads * head_dim
PAPER_HEAD_DIMS = (64, 128, 256)
PAPER_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LLAMA_LENGTHS = (2048, 4096, 8192, 16384, 32768)
SMOLLM2_LAYERS = 4  # layers in the fixture of real activations
SMOLLM2_LENGTH = 2048
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
LAYOUTS = ("bnhd", "bhnd")
GRIDS = ("paper", "llama", "smollm2", "quick", "all")


@dataclass(frozen=True)
class Cell:
    """One shape of the benchmark. `layer` selects the layer of real activations, and is 0 for random input."""

    group: str
    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int
    head_dim: int
    causal: bool
    dtype: str = "bf16"
    kind: str = "normal"
    layout: str = "bnhd"  # stored (batch, len, heads, d), passed as a transposed view, as in the paper
    layer: int = 0

    @property
    def name(self) -> str:
        mask = "causal" if self.causal else "full"
        layer = f" layer {self.layer}" if self.kind == "smollm2" else ""
        length = f"N {self.len_q}" if self.len_q == self.len_k else f"N {self.len_q}x{self.len_k}"
        return f"{self.group}{layer} d {self.head_dim} {mask} {length}"

    @property
    def heads(self) -> str:
        return f"{self.heads_q}" if self.heads_q == self.heads_kv else f"{self.heads_q}/{self.heads_kv}"

    @property
    def flops(self) -> float:
        """Floating-point operations of both matmuls, 4 B H Nq Nk d, halved under a causal mask (the paper's count)."""
        from fa_reference.counts import attention_flops

        return float(attention_flops(self.batch, self.heads_q, self.len_q, self.len_k, self.head_dim, self.causal))

    @property
    def score_elements(self) -> int:
        return self.batch * self.heads_q * self.len_q * self.len_k

    def to_json(self) -> dict:
        return asdict(self) | {"name": self.name, "flops": self.flops}


def cell_from_json(data: dict) -> Cell:
    """The Cell inside a recorded cell (which also holds results)."""
    return Cell(**{key: data[key] for key in Cell.__dataclass_fields__})


def paper_cells() -> list[Cell]:
    """16k tokens in all, hidden size 2048: batch = 16384 / N, heads = 2048 / d."""
    cells = []
    for head_dim in PAPER_HEAD_DIMS:
        heads = PAPER_HIDDEN // head_dim
        for causal in (False, True):
            for n in PAPER_LENGTHS:
                cells.append(Cell("paper", PAPER_TOKENS // n, heads, heads, n, n, head_dim, causal))
    return cells


def llama_cells() -> list[Cell]:
    """Prefill of Llama-3-8B: 32 query heads share 8 key/value heads, d 128, one sequence, causal."""
    return [Cell("llama", 1, 32, 8, n, n, 128, True) for n in LLAMA_LENGTHS]


def smollm2_cells() -> list[Cell]:
    """One key/value group (3 query heads, 1 key/value head) of each layer of SmolLM2-135M in the fixture."""
    n = SMOLLM2_LENGTH
    return [Cell("smollm2", 1, 3, 1, n, n, 64, True, kind="smollm2", layer=layer) for layer in range(SMOLLM2_LAYERS)]


def quick_cells() -> list[Cell]:
    """A minute's worth: two head dimensions, two lengths, both masks, and one real layer."""
    chosen = [c for c in paper_cells() if c.head_dim in (64, 128) and c.len_q in (2048, 8192)]
    return chosen + smollm2_cells()[:1]


def select(
    grid: str,
    *,
    head_dims: Iterable[int] = (),
    lengths: Iterable[int] = (),
    causal: bool | None = None,
    dtypes: Iterable[str] = ("bf16",),
    layout: str = "bnhd",
) -> list[Cell]:
    """Cells of `grid`, restricted where a restriction is given, once per dtype.

    Raises ValueError for an unknown grid, dtype or layout, or when nothing is left.
    """
    groups = {
        "paper": paper_cells,
        "llama": llama_cells,
        "smollm2": smollm2_cells,
        "quick": quick_cells,
        "all": lambda: paper_cells() + llama_cells() + smollm2_cells(),
    }
    if grid not in groups:
        raise ValueError(f"grid: {grid!r} is unknown; allowed: {', '.join(GRIDS)}")
    head_dims, lengths = set(head_dims), set(lengths)
    chosen = [
        cell
        for cell in groups[grid]()
        if (not head_dims or cell.head_dim in head_dims)
        and (not lengths or cell.len_q in lengths)
        and (causal is None or cell.causal == causal)
    ]
    if not chosen:
        raise ValueError(
            f"grid {grid!r} has no shape with head_dim in {sorted(head_dims) or 'any'}, len in "
            f"{sorted(lengths) or 'any'}, causal {'either' if causal is None else causal}; "
            f"head dims: {PAPER_HEAD_DIMS}, lengths: {PAPER_LENGTHS + LLAMA_LENGTHS[-1:]}"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is unknown; allowed: {', '.join(LAYOUTS)}")
    cells = []
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
        cells += [replace(cell, dtype=dtype, layout=layout) for cell in chosen]
    return cells
