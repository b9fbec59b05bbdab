"""Global minimisers of many sums of one-sided parabolas, the loss of a ReLU layer along its coordinates.

    φ(t) = Σ_{n: z_n + t x_n > 0} a_n t² + b_n t + c_n

The sum is continuous, with a breakpoint −z_n / x_nj per term: between two breakpoints it is one parabola. Terms with
x > 0 take part to the right of their breakpoint, those with x < 0 to the left. Sort, prefix and suffix sums (no
difference of sums, so nothing cancels), best vertex: O(N log N) per coordinate.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

UNROLLED = 24  # up to this many terms a sorting network of whole-tensor operations beats sorting row by row
MANY = 2048  # from this many coordinates on: for fewer, starting the operations takes longer than they do


def minimise_pieces(x: Tensor, z: Tensor, terms: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the global minimiser t of φ for every coordinate; 0 where no t is better than 0.

    Args:
        x: N × ..., slopes, broadcast with z; a term with x = 0 does not depend on t and is left out.
        z: N × ..., values at t = 0.
        terms: a / x², b / x, c, each N × ..., broadcast with x; a ≥ 0, and b = c = 0 where a = 0.

    Returns:
        t, of the broadcast shape without its first dimension, at most `longest`.
    """
    moves, right = (x != 0).to(x.dtype), (x > 0).to(x.dtype)
    # A term with x = 0 gets the breakpoint 0: it splits a piece and takes part in none.
    inverse = torch.nan_to_num(1 / torch.where(x != 0, x, torch.inf))
    bound = longest(x)
    edges = (z * -inverse).clamp_(-bound, bound)
    shape = edges.shape[1:]
    stacked = edges.new_empty(len(edges), 4, *shape)
    torch.mul(terms[0], x.square(), out=stacked[:, 0])
    torch.mul(terms[1], x, out=stacked[:, 1])
    torch.mul(terms[2], moves, out=stacked[:, 2])
    stacked[:, 3] = right
    base = (terms[2] * (z > 0).to(x.dtype) * moves).sum(dim=0).reshape(-1)
    edges, stacked = edges.reshape(len(edges), -1), stacked.reshape(len(edges), 4, -1)
    unroll = len(edges) <= UNROLLED and edges.shape[1] >= MANY
    best, t = (_unrolled if unroll else _batched)(edges, stacked)
    better = best < base - 4 * torch.finfo(base.dtype).eps * base.abs()
    return t.mul_(better).reshape(shape)


def _unrolled(edges: Tensor, stacked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest value and where it is; loops over the terms, vectorised over coordinates."""
    keys, rows = list(edges.unbind()), list(stacked.unbind())
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[edges.element_size()]
    sign = torch.tensor(8 * edges.element_size() - 1, dtype=integer, device=edges.device)
    bits = [row.view(integer) for row in rows]
    for i, j in _network(len(keys)):
        # The sign of the difference, spread over all bits, says where to exchange: exact and without a branch.
        mask = (keys[j] - keys[i]).view(integer).bitwise_right_shift_(sign)
        keys[i], keys[j] = torch.minimum(keys[i], keys[j]), torch.maximum(keys[i], keys[j])
        change = (bits[i] ^ bits[j]).bitwise_and_(mask)
        bits[i] ^= change
        bits[j] ^= change
    # After sum k come the terms that are active to the left of breakpoint k, before it those to the right.
    ahead = [torch.zeros_like(rows[0][:3])]
    for row in reversed(rows):
        passed = row[:3] * row[3]
        ahead.append(ahead[-1] + row[:3].sub_(passed))
        row[:3] = passed
    passed = torch.zeros_like(ahead[0])
    last = torch.full_like(keys[0], longest(keys[0]))
    best, t = torch.full_like(keys[0], torch.inf), torch.zeros_like(keys[0])
    for k in range(len(keys) + 1):
        if k:
            passed += rows[k - 1][:3]
        sums = ahead.pop().add_(passed)
        value, vertex = _vertex(sums, keys[k - 1] if k else -last, keys[k] if k < len(keys) else last)
        t = torch.lerp(t, vertex, (best - value).gt_(0))
        best = torch.minimum(best, value)
    return best, t


def _batched(edges: Tensor, stacked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for any number of terms, vectorised over these, too."""
    edges, order = edges.sort(dim=0)
    stacked = stacked.gather(0, order[:, None].expand_as(stacked))
    passed = stacked[:, :3] * stacked[:, 3:]
    ahead = stacked[:, :3].sub_(passed).flip(0).cumsum_(dim=0).flip(0)
    sums = F.pad(ahead, (0, 0, 0, 0, 0, 1))
    sums[1:] += passed.cumsum_(dim=0)
    del stacked, passed, ahead, order
    last = longest(edges)
    low, high = F.pad(edges, (0, 0, 1, 0), value=-last), F.pad(edges, (0, 0, 0, 1), value=last)
    value, vertex = _vertex(sums.movedim(1, 0), low, high)
    best, piece = value.min(dim=0)
    return best, vertex.gather(0, piece[None])[0]


def longest(like: Tensor) -> float:
    """Return the longest step of a search: its square does not overflow."""
    return float(torch.finfo(like.dtype).max ** 0.25)


def _vertex(sums: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest value of a t² + b t + c on [low, high] and where it is; a = 0 only if b = 0."""
    a, b, c = sums.unbind()
    t = (b / a.clamp_min(torch.finfo(a.dtype).tiny)).mul_(-0.5).clamp_(low, high)
    return torch.addcmul(c, torch.addcmul(b, a, t), t), t


@cache
def _network(size: int) -> list[tuple[int, int]]:
    """Return the comparators of Batcher's odd-even merge sort."""
    pairs, width = [], 1
    while width < size:
        gap = width
        while gap:
            for start in range(gap % width, size - gap, 2 * gap):
                for i in range(start, min(start + gap, size - gap)):
                    if i // (2 * width) == (i + gap) // (2 * width):
                        pairs.append((i, i + gap))
            gap //= 2
        width *= 2
    return pairs


class PiecewiseSearch:
    """Global minimiser of φ behind a ReLU, see `minimise_pieces`.

    A sample with z + t x > 0 adds ½ h x² t² + x (p + h z) t + z (p + ½ h z), p = g − h relu(z), up to a constant.

    Args:
        x: N × d inputs of the layer, d = 1 and ones for a bias.
        z: N × m outputs of the layer.
        gradient: N × m, G at relu(z).
        curvature: N × m, H at relu(z), at least 0. A sample without takes no part; a neuron without any (an absolute
            loss) takes the gradient step.
    """

    def __init__(self, x: Tensor, z: Tensor, gradient: Tensor, curvature: Tensor) -> None:
        slope = (gradient - curvature * z.relu()) * (curvature > 0)
        self._x, self._z = x, z
        self._terms = (curvature / 2, slope + curvature * z, z * (slope + curvature * z / 2))
        self._straight = (curvature == 0).all(dim=0, keepdim=True)
        # 14 numbers per term when unrolled, 25 when sorted by rows, 6 more when the tables have to be copied.
        self.row, self.coordinate_bytes, self.costly = x.shape[1], 31 * len(x) * x.element_size(), True

    def steps(self, index: slice | Tensor, gradient: Tensor) -> Tensor:
        """Return t, see `Search`; 0 where no point is better than t = 0."""
        x, tables = self._x, (self._z, *self._terms, self._straight)
        rows = whole_rows(index, self.row)
        if rows is not None:  # outer products instead of copies of the tables
            x, z, *terms, straight = x[:, None, :], *(table[:, rows, None] for table in tables)
        else:
            index = positions(index, gradient)
            neuron = index.div(self.row, rounding_mode="floor")
            x, z, *terms, straight = x[:, index % self.row], *(table[:, neuron] for table in tables)
        t = minimise_pieces(x, z, (terms[0], terms[1], terms[2]))
        return torch.where(straight[0], -gradient.reshape(t.shape), t).reshape(-1)


def whole_rows(index: slice | Tensor, row: int) -> slice | None:
    """Return the rows, `row` entries each, that a range of flat positions covers; None if it covers parts."""
    if isinstance(index, slice) and index.start % row == 0 == index.stop % row:
        return slice(index.start // row, index.stop // row)
    return None


def positions(index: slice | Tensor, like: Tensor) -> Tensor:
    """Return flat positions as a tensor on the device of `like`."""
    return index if isinstance(index, Tensor) else torch.arange(index.start, index.stop, device=like.device)
