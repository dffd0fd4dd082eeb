"""Which source of `data.mix` each position of the data comes from, and which row of it.

Positions are cut into blocks of a step's size. In block b the sources are found by systematic sampling: with one
uniform number u of the block, its P points (i + u) / P fall into the intervals of the sources' shares. So a block has
P w of a source with share w, rounded up or down, and on average exactly that many. The points' order is a permutation
of the block. A source's rows come epoch by epoch, each in a permutation of its own.

All of that is a function of the seed, the labels and the position, so a run that resumes draws the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from grpo.randomness import Stream, key, permutation, uniforms

AT_ONCE = 1024  # blocks that are counted together


def most_of_step(weight: float, weights: Sequence[float], size: int) -> int:
    """The most rows of a source that any ``size`` positions in a row may have: they lie in two blocks."""
    return min(size, 2 * math.ceil(size * weight / sum(weights)))


class Mixture:
    """Rows of several sources by position, without end. ``ids`` are those of each source."""

    def __init__(
        self,
        labels: Sequence[str],
        weights: Sequence[float],
        ids: Sequence[Sequence[int]],
        *,
        size: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.size, self.seed = size, seed
        self.bounds = np.cumsum(weights) / sum(weights)
        self.orders = [
            _Order(of, most_of_step(weight, weights, size), key(seed, label), shuffle)
            for label, weight, of in zip(labels, weights, ids, strict=True)
        ]
        self._counted = np.zeros((1, len(labels)), dtype=np.int64)  # rows of each source in the blocks before

    def sources_at(self, start: int) -> list[int]:
        """The sources of ``size`` positions from ``start`` on."""
        block, offset = divmod(start, self.size)
        return np.concatenate([self._block(block)[offset:], self._block(block + 1)[:offset]]).tolist()

    def rows_at(self, start: int) -> list[int]:
        """The rows of ``size`` positions from ``start`` on. None comes twice."""
        block, offset = divmod(start, self.size)
        drawn = self._before(block) + np.bincount(self._block(block)[:offset], minlength=len(self.orders))
        rows = []
        for source in self.sources_at(start):
            rows.append(self.orders[source].row(int(drawn[source])))
            drawn[source] += 1
        return rows

    def _block(self, block: int) -> np.ndarray:
        order = permutation(self.seed, Stream.MIX, block, self.size)
        return self._points(np.array([block]))[0, order]

    def _points(self, blocks: np.ndarray) -> np.ndarray:
        """The source of each point of each block."""
        start_B1 = uniforms([key(self.seed, Stream.MIX.value)], blocks)[0][:, None]
        points_BP = (np.arange(self.size) + start_B1) / self.size
        return np.minimum(np.searchsorted(self.bounds, points_BP, side="right"), len(self.bounds) - 1)

    def _before(self, block: int) -> np.ndarray:
        while len(self._counted) <= block:
            first = len(self._counted) - 1
            points_BP = self._points(np.arange(first, first + AT_ONCE))
            of_block = np.stack([(points_BP == source).sum(1) for source in range(len(self.orders))], axis=1)
            self._counted = np.concatenate([self._counted, self._counted[-1] + np.cumsum(of_block, axis=0)])
        return self._counted[block].copy()


class _Order:
    """The rows of one source, epoch by epoch, so that any ``window`` of them in a row are different ones."""

    def __init__(self, ids: Sequence[int], window: int, seed: int, shuffle: bool) -> None:
        self.ids, self.window, self.seed, self.shuffle = ids, window, seed, shuffle
        self._latest = 0, self._permutation(0)

    def row(self, index: int) -> int:
        epoch, place = divmod(index, len(self.ids))
        return self.ids[int(self._order(epoch)[place])]

    def _permutation(self, epoch: int) -> np.ndarray:
        n = len(self.ids)
        return permutation(self.seed, Stream.DATA_ORDER, epoch, n) if self.shuffle else np.arange(n)

    def _order(self, epoch: int) -> np.ndarray:
        """An epoch's permutation, in which the last rows of the epoch before come later. So it depends on that one; the
        latest is kept."""
        latest, order = self._latest
        if latest > epoch:
            latest, order = 0, self._permutation(0)
        for now in range(latest + 1, epoch + 1):
            order = self._following(order, self._permutation(now))
        self._latest = epoch, order
        return order

    def _following(self, before: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        if not self.shuffle or self.window < 2:
            return chosen
        last = before[len(before) - self.window + 1 :]
        fresh = chosen[~np.isin(chosen, last)]
        if len(fresh) < len(last):
            return np.concatenate([fresh, last])
        head = fresh[: len(last)]
        return np.concatenate([head, chosen[~np.isin(chosen, head)]])
