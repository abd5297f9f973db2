"""Which source token an output word stands for."""

from __future__ import annotations

from collections.abc import Sequence


def align(tokens: Sequence[str], words: Sequence[str]) -> list[int | None]:
    """For each output word the source token it is matched with, None if it was inserted.

    Minimum edit distance with unit costs (Needleman-Wunsch, as TANL uses it), traced back from the end; on equal
    cost a match or substitution is preferred, then skipping a source token, then skipping a word.
    """
    n, m = len(tokens), len(words)
    out: list[int | None] = [None] * m
    while n and m and tokens[n - 1] == words[m - 1]:  # the trace would take these anyway: equal ends cost nothing
        n, m = n - 1, m - 1
        out[m] = n
    if not n or not m:
        return out
    previous = list(range(m + 1))
    table = [previous]
    for i in range(1, n + 1):
        token, row = tokens[i - 1], [i]
        left = i
        for j in range(1, m + 1):
            best = previous[j - 1] + (token != words[j - 1])
            up = previous[j] + 1
            if up < best:
                best = up
            if left + 1 < best:
                best = left + 1
            left = best
            row.append(best)
        table.append(row)
        previous = row
    i, j = n, m
    while i and j:
        here = table[i][j]
        if here == table[i - 1][j - 1] + (tokens[i - 1] != words[j - 1]):
            i, j = i - 1, j - 1
            out[j] = i
        elif here == table[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    return out
