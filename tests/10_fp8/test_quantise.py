"""Graded checks of chapter 10, quantise.py: exact on any machine, against fa_reference.fp8 and torch's own cast."""

import ast

import torch
from torch import Tensor

from fa_reference import fp8
from fa_reference.grading import CheckFailed, check
from fa_reference.grading.answer import Answer
from fa_reference.grading.properties import close, fresh_seed
from fa_reference.inputs import KINDS

FILE = "quantise.py"
CODES = torch.arange(256, dtype=torch.uint8)


def draw(*shape: int, kind: str = "outliers", seed: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(fresh_seed() if seed is None else seed)
    return KINDS[kind](shape, generator)


def tensor(value: object, what: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckFailed(f"{what} must be a tensor; it is a {type(value).__name__}")
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        raise CheckFailed(f"{what} must be {dtype} {tuple(shape)}; it is {value.dtype} {tuple(value.shape)}")
    return value


def by_hand(answer: Answer, function: str) -> None:
    """CheckFailed if the function leaves the work to torch's cast."""
    tree = ast.parse((answer.folder / FILE).read_text(encoding="utf-8", errors="replace"))
    body = next((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function), None)
    names = {getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(body)} if body else set()
    if used := {name for name in names if name.startswith("float8")}:
        raise CheckFailed(f"{function} uses torch.{used.pop()}: by hand, please, from the bits or by rounding")


def same_codes(answer: Answer, x: Tensor, about: str) -> None:
    codes = tensor(answer.call(FILE, "encode_e4m3", x), "encode_e4m3(x)", x.shape, torch.uint8)
    right = fp8.encode_e4m3(x)
    wrong = codes != right
    if wrong.any():
        i = int(wrong.flatten().nonzero()[0])
        value, mine, theirs = (float(t.flatten()[i]) for t in (x, codes, right))
        raise CheckFailed(
            f"{about}: encode_e4m3({value!r}) must be {int(theirs):#04x}, "
            f"{float(fp8.decode_e4m3(right).flatten()[i])}; it is {int(mine):#04x}, "
            f"{float(fp8.decode_e4m3(codes).flatten()[i])}; {int(wrong.sum())} of {x.numel()} are wrong"
        )


@check("decode: all 256 codes", points=1)
def test_decode(answer: Answer) -> None:
    value = tensor(answer.call(FILE, "decode_e4m3", CODES), "decode_e4m3(codes)", CODES.shape, torch.float32)
    right = CODES.view(torch.float8_e4m3fn).float()
    wrong = (value.view(torch.int32) != right.view(torch.int32)) & ~(value.isnan() & right.isnan())
    if wrong.any():
        code = int(wrong.nonzero()[0])
        raise CheckFailed(
            f"decode_e4m3({code:#04x}) must be {float(right[code])}; it is {float(value[code])} (sign "
            f"{code >> 7}, exponent {code >> 3 & 15}, mantissa {code & 7}); {int(wrong.sum())} of 256 are wrong"
        )
    by_hand(answer, "decode_e4m3")


@check("encode: every value that e4m3 has", points=1)
def test_encode_exact(answer: Answer) -> None:
    same_codes(answer, fp8.decode_e4m3(CODES[(CODES & 0x7F) != 0x7F]), "a value that e4m3 has")
    by_hand(answer, "encode_e4m3")


@check("encode: halfway to the even code, otherwise to the nearer one", points=2)
def test_encode_rounds(answer: Answer) -> None:
    values = fp8.decode_e4m3(CODES[:0x7F])
    halfway = (values[1:] + values[:-1]) / 2
    below, above = (torch.nextafter(halfway, torch.tensor(end)) for end in (0.0, torch.inf))
    for sign in (1, -1):
        same_codes(answer, sign * halfway, "halfway between two values: the code whose last bit is 0")
        same_codes(answer, sign * below, "just below halfway")
        same_codes(answer, sign * above, "just above halfway")
    bits = torch.randint(-(2**31), 2**31, (50_000,), generator=torch.Generator().manual_seed(fresh_seed()))
    x = bits.to(torch.int32).view(torch.float32)
    same_codes(answer, x[~x.isnan()], "any float32")
    same_codes(
        answer, torch.exp2(torch.rand(50_000) * 24 - 14) * (torch.randint(0, 2, (50_000,)) * 2 - 1), "any number"
    )


@check("encode: beyond the largest, infinity, NaN, signed zeros", points=1)
def test_encode_ends(answer: Answer) -> None:
    x = torch.tensor([448.0, 463.9, 464.0, 1e30, torch.inf])
    same_codes(answer, torch.cat((x, -x)), "beyond 448: saturates")
    same_codes(answer, torch.tensor([torch.nan, -torch.nan]), "NaN")
    small = torch.tensor([0.0, 2.0**-10, 1e-45, 2.0**-10 * 1.001])
    same_codes(answer, torch.cat((small, -small)), "so small that it rounds to zero, or hardly not; the sign stays")


@check("scales: the largest magnitude of each block over 448", points=1)
def test_scales(answer: Answer) -> None:
    for shape, block in (((1, 1, 128, 64), 128), ((2, 3, 300, 64), 128), ((1, 2, 5, 8), 2), ((2, 2, 70, 128), None)):
        x = draw(*shape)
        value = answer.call(FILE, "block_scales", x, block)
        right, _ = fp8.amax_scale(x, "head" if block is None else "block", block)
        words = f"block_scales of x {shape} with block {block}"
        tensor(value, words, right.shape, torch.float32)
        close(value / right, torch.ones_like(right), f"{words}, over what it must be,", tolerance=1e-6)


@check("scales: zeros and the smallest numbers", points=1)
def test_scales_of_zeros(answer: Answer) -> None:
    x = draw(1, 1, 256, 64)
    x[:, :, :128] = 0
    value = tensor(answer.call(FILE, "block_scales", x, 128), "block_scales", (1, 1, 2), torch.float32)
    if float(value[0, 0, 0]) != 1:
        raise CheckFailed(f"a block of zeros must have scale 1; it has {float(value[0, 0, 0])}")
    tiny = answer.call(FILE, "block_scales", torch.full((1, 1, 4, 8), 1e-45), 4)
    if not float(tiny.min()) >= 2.0**-126:
        raise CheckFailed(f"a block of 1e-45 must have scale 2^-126, the smallest normal number; it has {tiny.item()}")


@check("quantise: codes and scales of ragged blocks", points=1)
def test_quantise(answer: Answer) -> None:
    for shape, block in (((1, 1, 16, 64), 16), ((2, 3, 300, 64), 128), ((2, 2, 70, 128), None)):
        for kind in ("normal", "outliers"):
            x = draw(*shape, kind=kind)
            value = answer.call(FILE, "quantise", x, block)
            if not isinstance(value, tuple) or len(value) != 2:
                raise CheckFailed("quantise must return the pair (codes, scales)")
            right = fp8.quantize(x, "head" if block is None else "block", block)
            codes = tensor(value[0], "the codes", shape, torch.uint8)
            scales = tensor(value[1], "the scales", right.scale.shape, torch.float32)
            close(scales / right.scale, torch.ones_like(scales), "the scales, over what they must be,", tolerance=1e-6)
            # Dividing by the scale and multiplying by its inverse differ in the last bit: a code may go the other way.
            wrong = (codes != right.data.view(torch.uint8)).double().mean()
            if wrong > 0.01:
                raise CheckFailed(
                    f"{float(wrong):.0%} of the codes of x {shape} with block {block} are wrong: they are "
                    "encode_e4m3(x / scale of the row's block)"
                )


@check("quantise: zeros stay zeros, NaN and infinity are refused", points=1)
def test_quantise_ends(answer: Answer) -> None:
    codes, scales = answer.call(FILE, "quantise", torch.zeros(1, 1, 130, 64), 128)
    if not (fp8.decode_e4m3(codes) == 0).all() or not scales.isfinite().all():
        found = f"codes mean {fp8.decode_e4m3(codes).unique().tolist()}, scales are {scales.unique().tolist()}"
        raise CheckFailed(f"zeros must become codes of 0 with finite scales (0 / 0 is NaN); the {found}")
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = draw(1, 2, 40, 64)
        x[0, 1, 20, 5] = bad
        answer.refusal(FILE, "quantise", x, 16)


@check("rotation: Q K^T is unchanged, norms are kept", points=2)
def test_rotation(answer: Answer) -> None:
    for head_dim in (64, 128, 256):
        q, k = draw(2, 5, head_dim).double(), draw(2, 7, head_dim).double()
        signs = fp8.random_signs(head_dim, fresh_seed()).double()
        turned = [
            tensor(answer.call(FILE, "rotate", x, signs), "rotate(x, signs)", x.shape, torch.float64) for x in (q, k)
        ]
        close(turned[0].norm(dim=-1) / q.norm(dim=-1), torch.ones(2, 5), "the norm of a rotated row, over the row's,")
        close(turned[0] @ turned[1].mT, q @ k.mT, f"Q K^T of rotated Q and K (d {head_dim})", tolerance=1e-9)
        close(turned[0], fp8.rotate(q, signs), "rotate(x, signs): x D H / sqrt(d),", tolerance=1e-9)


@check("rotation: an outlier is spread over all channels", points=1)
def test_outlier(answer: Answer) -> None:
    signs = fp8.random_signs(128, fresh_seed())
    for channel in (0, 5, 127):
        x = torch.zeros(1, 128)
        x[0, channel] = 100.0
        value = answer.call(FILE, "rotate", x, signs)
        close(value.abs(), torch.full((1, 128), 100 / 128**0.5), f"|rotate| of 100 in channel {channel} alone")


@check("rotation: the fast transform, its inverse, other sizes refused", points=1)
def test_inverse(answer: Answer) -> None:
    for size in (1, 2, 8, 64):
        close(
            answer.call(FILE, "hadamard", torch.eye(size).double()),
            fp8.hadamard_transform(torch.eye(size).double()),
            f"hadamard of the unit matrix (d {size}): the entries are (-1)^(ones in i & j) / sqrt(d),",
            tolerance=1e-12,
        )
    x, signs = draw(3, 128).double(), fp8.random_signs(128, fresh_seed()).double()
    turned = fp8.rotate(x, signs)
    close(answer.call(FILE, "unrotate", turned, signs), x, "unrotate(rotate(x))", tolerance=1e-9)
    answer.refusal(FILE, "hadamard", torch.zeros(2, 96))
