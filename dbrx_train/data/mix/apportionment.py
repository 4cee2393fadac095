"""Share samples out among sources, exactly and in closed form: the arithmetic under ``MixSchedule``.

A source's weights are integers over ``DENOMINATOR``, constant on short pieces of time, so its integral is
piecewise linear with exact values. Sources are the leaves of a binary tree. A tree node that has received m
samples passes floor(V(m) + phase) of them to its left child and the rest to its right; V(m) is the left
child's integral at the moment when the node's own reaches m. V never falls and never rises by more than one a
sample. So each sample goes to exactly one leaf, counts never fall, and they sum to the time.

With phase 1/2 a split errs by at most 1/2, and a child hands its error down in proportion. Canonical nodes
run the same pieces with phases (p + 1/2) / C, of mean 1/2, for p a permutation of 0 … C - 1. For two sources
Hermite's identity Σ floor(x + p/C) = floor(Cx) makes all nodes together err by at most 1/2 *in total*. Each
level of the tree has a permutation of its own (Halton's sequence), lest errors add up along a path.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["DENOMINATOR", "Apportionment", "Floats", "Ints", "integer_weights"]

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Tree: TypeAlias = "int | tuple[Tree, Tree]"

DENOMINATOR: Final = 10**9
"""Weights are integers over this; at times up to 9·10⁹ every integral then fits an int64."""

_BASES = (2, 3, 5, 7, 11, 13)


def integer_weights(shares: Floats) -> Ints:
    """Scale rows that sum to 1 to integers that sum to DENOMINATOR (largest remainder): [pieces, sources]."""
    exact = shares * DENOMINATOR
    weights: Ints = np.floor(exact).astype(np.int64)
    missing = DENOMINATOR - weights.sum(1)
    rank = np.argsort(np.argsort(weights - exact, axis=1, kind="stable"), axis=1, kind="stable")
    weights += rank < missing[:, None]
    return weights


class Apportionment:
    """How many samples each source has given on each canonical node, from a moment with known counts on.

    Arguments: ``times`` [pieces], the first tick of each piece; ``weights`` [pieces, sources], integers;
    ``integral`` [sources] and ``counts`` [canonical nodes, sources], which hold at the first tick;
    ``extremes`` [moments, sources], the shares between which the weights move, for which a tree is chosen.
    """

    def __init__(self, times: Ints, weights: Ints, integral: Ints, counts: Ints, extremes: Floats) -> None:
        self.times, self.weights, self.start = times, weights, counts
        grown = np.cumsum(weights[:-1] * np.diff(times)[:, None], 0)
        self.integrals = integral + np.vstack([np.zeros_like(integral), grown])
        self.tree, self.max_deviation = _best_tree(extremes)
        self._splits: dict[Tree, _Split] = {}

    def integral(self, tick: Ints) -> Ints:
        """Samples that each source should have given, in units of 1/DENOMINATOR: [..., sources]."""
        piece = np.searchsorted(self.times, tick, "right") - 1
        since = np.asarray(tick - self.times[piece])[..., None]
        result: Ints = self.integrals[piece] + self.weights[piece] * since
        return result

    def counts(self, tick: Ints, node: Ints) -> Ints:
        """Samples that each source has given; ticks and canonical nodes have one shape: [..., sources]."""
        result = np.empty((*tick.shape, len(self.start[0])), np.int64)
        self._deal(self.tree, 0, tick, node, result)
        return result

    def _deal(self, tree: Tree, depth: int, received: Ints, node: Ints, result: Ints) -> None:
        if isinstance(tree, int):
            result[..., tree] = received
            return
        target = self._split(tree).passed_left(received, _phases(len(self.start), depth)[node])
        # What was served before the first tick stays served: the target is approached from there.
        before = self.start[:, _leaves(tree)].sum(1)[node]
        before_left = self.start[:, _leaves(tree[0])].sum(1)[node]
        left = np.clip(target, before_left, before_left + received - before)
        self._deal(tree[0], depth + 1, left, node, result)
        self._deal(tree[1], depth + 1, received - left, node, result)

    def _split(self, tree: tuple[Tree, Tree]) -> _Split:
        if tree not in self._splits:
            leaves, left = _leaves(tree), _leaves(tree[0])
            weight = self.weights[:, leaves].sum(1)
            active = weight > 0 if weight.any() else np.arange(len(weight)) == 0
            self._splits[tree] = _Split(
                reached=self.integrals[active][:, leaves].sum(1),
                left=self.integrals[active][:, left].sum(1),
                weight=np.maximum(weight[active], 1),
                left_weight=self.weights[active][:, left].sum(1),
            )
        return self._splits[tree]


@dataclass(frozen=True)
class _Split:
    """A tree node's V, piece by piece; pieces in which the node has no weight are left out.

    ``reached`` is the node's integral where a piece begins and ``left`` the left child's, both in units of
    1/DENOMINATOR; ``weight`` and ``left_weight`` are their slopes. All are [pieces].
    """

    reached: Ints
    left: Ints
    weight: Ints
    left_weight: Ints

    def passed_left(self, received: Ints, phase: Ints) -> Ints:
        """How many of the node's ``received`` samples go to its left child."""
        integral = received * DENOMINATOR
        piece = np.maximum(np.searchsorted(self.reached, integral, "right") - 1, 0)
        weight, left_weight = self.weight[piece], self.left_weight[piece]
        # (whole · weight + rest) · left_weight / weight, without a product that overflows.
        whole, rest = np.divmod(integral - self.reached[piece], weight)
        left: Ints = self.left[piece] + whole * left_weight + rest * left_weight // weight
        return (left + phase) // DENOMINATOR


@functools.cache
def _phases(nodes: int, depth: int) -> Ints:
    """Phases of a level's splits on every canonical node, in units of 1/DENOMINATOR: [canonical nodes]."""
    node = np.arange(nodes)
    rank = node
    if depth:
        base = _BASES[(depth - 1) % len(_BASES)]
        mirrored = np.array([_radical_inverse(int(i), base) for i in node])
        rank = np.argsort(np.argsort(mirrored, kind="stable"), kind="stable")
    return DENOMINATOR * (2 * rank + 1) // (2 * nodes)


def _radical_inverse(number: int, base: int) -> float:
    """The number's digits mirrored at the radix point (van der Corput's sequence)."""
    result, place = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        place /= base
        result += digit * place
    return result


def _leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else _leaves(tree[0]) + _leaves(tree[1])


def _insertions(tree: Tree, leaf: int) -> Iterator[Tree]:
    """Every tree that comes of hanging a new leaf beside a node of ``tree``."""
    yield (tree, leaf)
    if not isinstance(tree, int):
        yield from ((left, tree[1]) for left in _insertions(tree[0], leaf))
        yield from ((tree[0], right) for right in _insertions(tree[1], leaf))


def _deviation(tree: Tree, shares: Floats, inherited: float = 0.0) -> float:
    """Bound on a leaf's error: every split adds 1/2 and hands on what it inherited in proportion."""
    if isinstance(tree, int):
        return inherited
    total = shares[:, _leaves(tree)].sum(1)
    active = total > 0
    worst = 0.0
    for child in tree:
        ratio = (shares[active][:, _leaves(child)].sum(1) / total[active]).max(initial=0.0)
        worst = max(worst, _deviation(child, shares, 0.5 + float(ratio) * inherited))
    return worst


def _best_tree(shares: Floats) -> tuple[Tree, float]:
    """A tree of low deviation for shares [moments, sources], and that deviation in samples.

    Sources are inserted one by one where that costs least, in three orders. With up to four sources the
    result is at most 1 whatever the shares do; with more it is near 1 for a constant mix. Figures are
    compared rounded, so that the last bit of a float never decides what a run sees.
    """
    candidates: list[tuple[float, Tree]] = []
    for key in (-shares.max(0), -shares.mean(0), shares.mean(0)):
        order = [int(leaf) for leaf in np.argsort(np.round(key, 9), kind="stable")]
        tree: Tree = order[0]
        for leaf in order[1:]:
            tree = min(_insertions(tree, leaf), key=lambda tree: round(_deviation(tree, shares), 9))
        candidates.append((round(_deviation(tree, shares), 9), tree))
    deviation, tree = min(candidates, key=lambda candidate: candidate[0])
    return tree, deviation
