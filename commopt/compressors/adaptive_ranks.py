"""How many directions each matrix of a bucket gets, where they share what equal ranks would send (after Markov et al.,
"L-GreCo: Layerwise-Adaptive Gradient Compression", MLSys 2024, with a greedy choice in the place of its dynamic program).

Energies are whole numbers, 8 log2 |q|^2 of what a direction q has transmitted: every rank finds the same ones from the same
bytes, in whatever order it adds up the squares, and all decide alike.
"""

import math

_STEP = 2  # directions that a matrix may gain or lose at a time
_WIDEST = 4  # times the rank that all have at first


def energy(square: float) -> int:
    """Of a direction with this squared norm."""
    return round(8 * math.log2(max(square, 1e-300)))


def energies(rows: list[list[float]]) -> list[list[int]]:
    """Of the squared norms of the directions of each matrix, largest first."""
    return [sorted(map(energy, squares), reverse=True) for squares in rows]


def expected(sent: list[list[int]], before: list[list[int]]) -> list[list[int]]:
    """What each matrix sends now, and behind it what it sent before with directions that it no longer has, which is believed
    a little less each time: an eighth of an octave, so that one that was given up is tried again some day."""
    return [now + [min(now[-1], old + 1) for old in known[len(now) :]] for now, known in zip(sent, before)]


def allocate(rank: int, shapes: list[tuple[int, int]], ranks: list[int], sent: list[list[int]]) -> list[int]:
    """The next ranks, at least 1, whose factors together are no larger than with `rank` for all, on either side: the
    directions that transmit the most for each value of their two vectors. sent: `energies` of what each matrix has now, and
    perhaps of more (`expected`). What is not known is guessed from how they fall off."""
    room = [rank * sum(sides) for sides in zip(*shapes)]
    chosen = [max(1, r - _STEP) for r in ranks]
    candidates = []
    for i, ((rows, columns), r, falling) in enumerate(zip(shapes, ranks, sent)):
        most = min(r + _STEP, _WIDEST * rank, max(1, rows * columns // (2 * (rows + columns))))
        fall = max(1, (falling[0] - falling[r - 1]) // (r - 1)) if r > 1 else 3
        guessed = falling + [falling[-1] - fall * (j + 1) for j in range(most - len(falling))]
        price = round(8 * math.log2(rows + columns))
        candidates += [(price - guessed[j], j, i) for j in range(chosen[i], most)]
    left = [whole - sum(r * side for r, side in zip(chosen, sides)) for whole, sides in zip(room, zip(*shapes))]
    for _, j, i in sorted(candidates):
        if j == chosen[i] and all(side <= free for side, free in zip(shapes[i], left)):
            chosen[i] += 1
            left = [free - side for side, free in zip(shapes[i], left)]
    return chosen
