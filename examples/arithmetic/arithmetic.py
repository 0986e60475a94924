"""Sums in words: a data set, its checker, and whom the tiny policy imitates."""

from itertools import product

WHO, WHAT = ("ann", "bob", "eve", "joe", "kim", "sam"), ("apples", "books", "coins", "pens")


def questions():
    """The rows."""
    rows = product(range(1, 10), range(1, 10), WHO, WHAT)
    return [dict(zip(("a", "b", "who", "what"), row, strict=True)) for row in rows]


def reward(row, answer):
    """From a row and an answer to a number."""
    return float(answer == str(row["a"] + row["b"]))


def careless(row, random):
    """An answer that is wrong two times in five."""
    return str(row["a"] + row["b"] + random.choice((0, 0, 0, 1, -1)))
