"""Name the likely bug: compare a wrong output with the outputs of well-known wrong attentions.

Each suspect is attention with exactly one mistake, computed in float64. If the learner's output is much closer to a
suspect than to the truth, the suspect's name goes into the failure message.
"""

from collections.abc import Callable, Iterator
from itertools import product
from math import ceil, e, log2

import torch
from torch import Tensor

from fa_reference.gold import default_scale, gold_attention, softmax_times_values, visible

BLOCKS = (16, 32, 48, 64, 96, 128)
# A suspect is named if the output lies this many times closer to it than to the truth.
CLOSER = 8.0
# Masks of blocks are many to try: not on large problems, where a smaller one has passed.
LARGEST_BY_BLOCKS = 512 * 512
LONGEST_ONE_BY_ONE = 128  # keys; a block of one key is a step in Python
ZEROS = "O is all zeros"
NOTHING_SEEN = f"{ZEROS} and lse is -inf: no key was visited (are only whole blocks of keys visited, and is this less?)"


class Problem:
    """One attention problem in float64 with keys and values repeated to the query heads, and its masked scores."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> None:
        group = q.shape[1] // k.shape[1]
        self.q, self.causal, self.heads_kv = q.double(), causal, k.shape[1]
        self.k = k.double().repeat_interleave(group, dim=1)
        self.v = v.double().repeat_interleave(group, dim=1)
        self.swapped = [x.double().repeat(1, group, 1, 1) for x in (k, v)]
        self.scale = default_scale(q.shape[-1]) if scale is None else scale
        self.len_q, self.len_k = q.shape[2], k.shape[2]
        self.scores = self.q @ self.k.mT * self.scale
        if causal:
            self.scores.masked_fill_(~visible(range(self.len_q), self.len_q, self.len_k), -torch.inf)

    def attention(
        self,
        *,
        scale: float | None = None,
        offset: int | None = None,
        masked: bool = True,
        numbered_from_0: int | None = None,
        mask: Tensor | None = None,
        keys: slice = slice(None),
        zero_keys: int = 0,
        kv: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(o, lse) with chosen mistakes: another scale or causal offset, a causal mask that numbers the keys of
        every block of `numbered_from_0` from 0, another `mask` (True: seen), fewer keys, `zero_keys` extra keys of
        score 0.
        """
        k, v = kv or (self.k, self.v)
        scores = self.q @ k.mT * (self.scale if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif self.causal and masked:
            offset = self.len_k - self.len_q if offset is None else offset
            i = torch.arange(self.len_q)[:, None]
            j = torch.arange(self.len_k)[None, :] % (numbered_from_0 or max(1, self.len_k))
            scores = scores.masked_fill(j > i + offset, -torch.inf)
        scores, v = scores[..., keys], v[..., keys, :]
        if zero_keys:
            scores = torch.nn.functional.pad(scores, (0, zero_keys))
            v = torch.nn.functional.pad(v, (0, 0, 0, zero_keys))
        return softmax_times_values(scores, v)

    def mask_by_blocks(self, block_q: int, block_k: int, wrong: str) -> Tensor:
        """The causal mask (True: seen) of a kernel that skips blocks and masks only where needed, done wrong.

        "top-left" forgets len_k - len_q; "rows from 0" and "keys from 0" number them from 0 in every block that is
        masked; "last block" masks only the last block that is visited; "last row" leaves a block unmasked if the last
        row sees all of it.
        """
        true = visible(range(self.len_q), self.len_q, self.len_k)
        mask, gap = torch.zeros_like(true), self.len_k - self.len_q
        for r in range(0, self.len_q, block_q):
            columns = [c for c in range(0, self.len_k, block_k) if true[r : r + block_q, c : c + block_k].any()]
            for c in columns:
                part = true[r : r + block_q, c : c + block_k]
                i, j = torch.arange(part.shape[0])[:, None], torch.arange(part.shape[1])
                whole = wrong == "last row" and part[-1].all() and part.shape[1] == block_k
                if whole or wrong == "last block" and c != columns[-1]:
                    part = torch.ones_like(part)
                elif wrong == "top-left" and not part.all():
                    part = j + c <= i + r
                elif wrong == "rows from 0" and not part.all():
                    part = j + c <= i + gap
                elif wrong == "keys from 0" and not part.all():
                    part = j <= i + r + gap
                mask[r : r + block_q, c : c + block_k] = part
        return mask

    def undivided(self) -> Tensor:
        """o without its division: the sum of exp(S - m) V, with m the row's maximum."""
        o, lse = softmax_times_values(self.scores, self.v)
        m = self.scores.amax(-1).nan_to_num(neginf=0.0)
        return o * torch.exp(lse - m)[..., None]

    def online(
        self,
        block: int,
        *,
        rescale_o: bool = True,
        rescale_l: bool = True,
        inverted: bool = False,
        divided: bool = False,
        descending: bool = False,
    ) -> Tensor:
        """o of a blockwise online softmax with the rescaling of O, of l, or its sign broken; `divided`: O is divided by
        l in every block, and rescaled as if it were not. `descending`: from the last block to the first.
        """
        m = torch.full((*self.q.shape[:3], 1), -torch.inf, dtype=torch.float64)
        l, o = torch.zeros_like(m), torch.zeros_like(self.q)
        starts = range(0, self.len_k, block)
        for start in reversed(starts) if descending else starts:
            s = self.scores[..., start : start + block]
            m_new = torch.maximum(m, s.amax(-1, keepdim=True))
            safe = m_new.nan_to_num(neginf=0.0)
            p, alpha = torch.exp(s - safe), torch.exp(m - safe)
            if inverted:
                alpha = torch.where(alpha > 0, 1 / alpha, alpha)
            l = l * (alpha if rescale_l else 1) + p.sum(-1, keepdim=True)
            o = o * (alpha if rescale_o else 1) + p @ self.v[..., start : start + block, :]
            if divided:
                o = o / torch.where(l == 0, 1, l)
            m = m_new
        if divided:
            return o
        return o / torch.where(l == 0, 1, l)


Suspect = tuple[str, Callable[[], tuple[Tensor | None, Tensor | None]]]


def suspects(p: Problem) -> Iterator[Suspect]:
    """The wrong attentions worth comparing with on this problem: (name of the bug, how to compute its o and lse)."""
    gap = p.len_k - p.len_q
    yield ZEROS, lambda: (torch.zeros_like(p.q), None)
    if abs(p.scale - 1) > 1e-6:
        yield "the scale is missing: multiply the scores by `scale`", lambda: p.attention(scale=1.0)
        yield "the scale is applied twice", lambda: p.attention(scale=p.scale**2)
        yield (
            "exp2 of scores that are meant for exp: multiply them by log2(e)",
            lambda: p.attention(scale=p.scale / log2(e)),
        )
        yield "exp of scores that are meant for exp2: log2(e) is for exp2", lambda: p.attention(scale=p.scale * log2(e))
        usual = default_scale(p.q.shape[-1])
        if abs(p.scale - usual) > 1e-6:
            yield "the `scale` argument is ignored: 1/sqrt(d) is used", lambda: p.attention(scale=usual)
    if p.causal:
        yield "the causal mask is missing", lambda: p.attention(masked=False)
        if gap:
            yield (
                "the causal mask is aligned top-left (j <= i); bottom-right is wanted (j <= i + len_k - len_q)",
                lambda: p.attention(offset=0),
            )
            words = "the sign of the causal offset is wrong: j <= i + len_k - len_q is wanted"
            yield words, lambda: p.attention(offset=-gap)
        yield "the causal mask is off by one: the diagonal is hidden too", lambda: p.attention(offset=gap - 1)
        yield "the causal mask is off by one: one key of the future is seen", lambda: p.attention(offset=gap + 1)
        if p.len_q * p.len_k <= LARGEST_BY_BLOCKS:
            yield from _masks_by_blocks(p)
    if p.heads_kv > 1 and p.heads_kv < p.q.shape[1]:
        yield (
            "query heads read the wrong KV head: query head h belongs to KV head h // (heads_q / heads_kv)",
            lambda: p.attention(kv=p.swapped),
        )
        for name, kv in (("K", [p.swapped[0], p.v]), ("V", [p.k, p.swapped[1]])):
            words = f"query heads read the wrong KV head of {name}, and the right one of the other"
            yield words, lambda kv=kv: p.attention(kv=kv)
    for block in BLOCKS:
        padding = -p.len_k % block
        if padding:
            yield (
                f"the tail is not masked: the last block of {block} keys is filled up with {padding} keys of score 0",
                lambda n=padding: p.attention(zero_keys=n),
            )
        if padding and p.len_k > block:
            yield (
                f"the tail is dropped: the last {p.len_k % block} keys, less than a block of {block}, are missing",
                lambda n=block: p.attention(keys=slice(p.len_k - p.len_k % n)),
            )
        last = (ceil(p.len_k / block) - 1) * block
        if last > 0 and p.causal:
            words = f"the causal mask numbers the keys from 0 in every block of {block}: add the block's first key"
            yield words, lambda n=block: p.attention(numbered_from_0=n)
        if last > 0:
            yield f"the last block of {block} keys is skipped", lambda n=last: p.attention(keys=slice(n))
            yield f"the first block of {block} keys is skipped", lambda n=block: p.attention(keys=slice(n, None))
    yield from _rescaled_wrongly(p)
    if p.len_k > 0:
        yield "O is not divided by the row sum l", lambda: (p.undivided(), None)
    yield "the last key is missing", lambda: p.attention(keys=slice(p.len_k - 1))


def _rescaled_wrongly(p: Problem) -> Iterator[Suspect]:
    one_by_one = (1,) if p.len_k <= LONGEST_ONE_BY_ONE else ()
    for block, descending in product((*one_by_one, *(b for b in BLOCKS if b < p.len_k)), (False, True)):
        order = f"blocks of {block} key{'s' * (block > 1)}{', the last one first' * descending}"
        for words, broken in (
            ("O is not rescaled when the running maximum grows", {"rescale_o": False}),
            ("l is not rescaled when the running maximum grows", {"rescale_l": False}),
            ("neither O nor l is rescaled when the running maximum grows", {"rescale_o": False, "rescale_l": False}),
            ("the rescale factor has the wrong sign: exp(m_old - m_new), not exp(m_new - m_old)", {"inverted": True}),
            ("O was divided by l before: multiply it by l_i before the new block is added", {"divided": True}),
        ):
            how = {"descending": descending, **broken}
            yield f"{words} ({order})", lambda n=block, how=how: (p.online(n, **how), None)


def _masks_by_blocks(p: Problem) -> Iterator[Suspect]:
    for wrong, words in (
        ("top-left", "the causal mask is aligned top-left (j <= i) in the blocks that are masked"),
        ("rows from 0", "the causal mask numbers the queries from 0 in every block: add the block's first query"),
        ("keys from 0", "the causal mask numbers the keys from 0 in every block: add the block's first key"),
        ("last block", "only the last block of keys is masked: the diagonal may cross several"),
        ("last row", "a block that only its last query sees whole is not masked: the first query decides"),
    ):
        for block_q in (b for b in BLOCKS if b < 2 * p.len_q):
            for block_k in (b for b in BLOCKS if b < 2 * p.len_k):
                yield words, lambda bq=block_q, bk=block_k, w=wrong: p.attention(mask=p.mask_by_blocks(bq, bk, w))


def _distance(x: Tensor, y: Tensor) -> float:
    both = (x == y) | (x.isinf() & y.isinf())
    return float(torch.where(both, 0.0, (x.double() - y.double()).abs()).nan_to_num(nan=1e30).square().mean().sqrt())


def _lse_bugs(lse: Tensor, gold: Tensor, p: Problem) -> Iterator[tuple[str, Tensor]]:
    maximum = p.scores.amax(-1) if p.len_k else torch.full_like(gold, -torch.inf)
    yield "lse is in base 2: the natural logarithm is wanted (multiply by ln 2)", gold * log2(e)
    yield "lse lacks the maximum: lse = m + log(l)", gold - maximum
    yield "lse is the maximum alone: lse = m + log(l)", maximum
    yield "lse is not the logarithm: log(l) + m is wanted, not l", gold.exp()
    yield "lse has the wrong sign", -gold
    if p.len_k == 1:  # O is v whatever the score
        yield "the scale is missing: multiply the scores by `scale`", gold / p.scale
        yield "the scale is applied twice", gold * p.scale


def _not_finite(o: Tensor, lse: Tensor, gold_lse: Tensor) -> str | None:
    bad = ~o.isfinite()
    if bad.any():
        rows = bad.any(-1).nonzero()
        empty = (gold_lse == -torch.inf) & bad.any(-1)
        if empty.any() and not (bad.any(-1) & ~empty).any():
            why = "exp(-inf - -inf) and 0 / 0 are NaN"
            return f"rows without a visible key give NaN: O must be 0 there and lse -inf ({why})"
        if bad.all():
            why = "was it written at all, or did an exponential overflow (subtract the maximum)?"
            return f"O is NaN or infinite everywhere: {why}"
        b, h, i = rows[0].tolist()
        return (
            f"O is NaN or infinite in {len(rows)} rows, first at batch {b}, head {h}, row {i}: not written, "
            "read past the end of a tensor, or an exponential overflowed (subtract the maximum)"
        )
    if lse.isnan().any():
        return "lse is NaN in some rows: a row without keys has lse = -inf"
    return None


def _not_empty(o: Tensor, gold_o: Tensor, gold_lse: Tensor) -> str | None:
    """A number in rows that see no key, in an output that is right elsewhere."""
    empty = gold_lse == -torch.inf
    if not (o[empty] != 0).any() or _distance(o[~empty], gold_o[~empty]) > 2e-2 * float(gold_o.abs().amax()):
        return None
    why = "hide keys with -inf, not with a large negative number, and mind rows in which nothing is left"
    return f"rows without a visible key must give O = 0 and lse = -inf ({why})"


def diagnose(
    o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None
) -> str | None:
    """What is behind a wrong (o, lse): "likely bug: ...", "seen: ..." or "where: ..."; None if nothing fits.

    Meant for small problems.
    """
    gold_o, gold_lse = gold_attention(q, k, v, causal=causal, scale=scale)
    broken = _not_finite(o, lse, gold_lse)
    if broken:
        return f"likely bug: {broken}"
    not_empty = _not_empty(o, gold_o, gold_lse)
    if not_empty:
        return f"likely bug: {not_empty}"
    if (lse == -torch.inf).all() and not o.any() and not (gold_lse == -torch.inf).all():
        return f"seen: {NOTHING_SEEN}"
    problem = Problem(q, k, v, causal, scale)
    off = _distance(o, gold_o)
    size = float(gold_o.square().mean().sqrt())
    if off < 2e-2 * size:
        if ((gold_lse == -torch.inf) & (lse != -torch.inf)).any():
            return "likely bug: lse must be -inf, not a finite number, in rows without a visible key"
        off_lse = _distance(lse, gold_lse)
        for words, wrong in _lse_bugs(lse, gold_lse, problem):
            if _distance(lse, wrong) * CLOSER < off_lse:
                return f"likely bug: {words}"
        if off_lse > 0.05:
            return "seen: O is right or nearly so, but lse is not: look at m and at log(l)"
        if o.dtype != torch.float32 or off < 1e-3 * size:
            return (
                "likely bug: nearly right, but not precise enough: keep scores, statistics and accumulators in float32"
            )
    best, named, off_lse = off / CLOSER, None, _distance(lse, gold_lse)
    for name, compute in suspects(problem):
        wrong_o, wrong_lse = compute()
        if wrong_lse is not None and off_lse * CLOSER < _distance(wrong_lse, gold_lse):
            continue  # lse is right, and with this bug it would not be
        distance = _distance(o, wrong_o)
        if _distance(wrong_o, gold_o) * 2 > off / 2 and distance < best:
            best, named = distance / 2, name  # of two that fit equally well, the first
    if named is None:
        return _where_it_grows(o, gold_o)
    return f"seen: {named}" if named == ZEROS else f"likely bug: {named}"


def _where_it_grows(o: Tensor, gold_o: Tensor) -> str | None:
    """Describe where the error sits: by rows, or by heads."""
    error = (o.double() - gold_o).abs().amax(-1)
    scale = float(gold_o.abs().amax())
    wrong = error > 0.02 * scale
    if not wrong.any() or wrong.float().mean() > 0.8:  # "only" would say nothing
        return None
    heads = wrong.any(-1)
    if not heads.all():
        return f"where: only some heads are wrong: (batch, head) = {heads.nonzero().tolist()[:6]}"
    rows = wrong.any(0).any(0).nonzero().flatten()
    return f"where: only {len(rows)} of {o.shape[2]} rows are wrong, from row {int(rows[0])} to row {int(rows[-1])}"
