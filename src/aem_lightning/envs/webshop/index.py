"""Ranked search equal to Lucene 8's BM25 as Anserini sets it up (k1 = 0.9, b = 0.4).

An index is made of chunks, so that it can be built piece by piece: `invert` turns texts into one,
`merge` joins them into arrays on disk, and `Index` searches those through memory-mapping.

A document's score is the sum over the query's terms of ``w - w / (1 + tf * inv)`` in float32, with
``w = count * idf``, ``idf = ln(1 + (N - df + 0.5) / (df + 0.5))`` and
``inv = 1 / (k1 * ((1 - b) + b * L / mean L))``, where ``L`` is the document's length after Lucene's
rounding to one byte. Equal scores are ranked by document id. Source: Lucene 8's ``BM25Similarity``
and ``SmallFloat``; Anserini's ``SimpleSearcher``.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aem_lightning.envs.webshop.analyzer import Analyzer

K1, B = np.float32(0.9), np.float32(0.4)
POSTINGS = ("starts", "documents", "counts", "lengths")
ARRAYS = ("starts", "documents", "scaled", "idf", "rank", "term_ends")
TERMS = "terms.bin"


def _four_bits(number: int) -> int:
    """Lucene's ``SmallFloat.longToInt4``: three bits of mantissa and an exponent."""
    bits = number.bit_length()
    if bits < 4:
        return number
    shift = bits - 4
    return ((number >> shift) & 7) | ((shift + 1) << 3)


def _from_four_bits(code: int) -> int:
    shift = (code >> 3) - 1
    return code & 7 if shift < 0 else ((code & 7) | 8) << shift


_EXACT = 255 - _four_bits(2**31 - 1)  # lengths below are kept as they are
LENGTHS = np.array(
    [code if code < _EXACT else _EXACT + _from_four_bits(code - _EXACT) for code in range(256)],
    dtype=np.float32,
)


def length_code(length: int) -> int:
    """The byte that Lucene keeps of a document's length; `LENGTHS` says what it stands for."""
    return length if length < _EXACT else _EXACT + _four_bits(length - _EXACT)


@dataclass(frozen=True, slots=True)
class Chunk:
    """An inverted piece of the collection.

    Attributes:
        terms: Its terms, sorted.
        starts: Where each term's postings start, and where the last ones end; [terms + 1].
        documents: Documents of the postings, from 0 in every chunk, ascending within a term.
        counts: How often the term occurs in each.
        lengths: Terms of each document.
    """

    terms: list[str]
    starts: NDArray[np.int64]
    documents: NDArray[np.int32]
    counts: NDArray[np.int32]
    lengths: NDArray[np.int32]

    def save(self, path: Path) -> None:
        """Write the chunk to ``path`` (``.npz``)."""
        terms = np.frombuffer("\n".join(self.terms).encode(), dtype=np.uint8)
        np.savez(path, terms=terms, **{name: getattr(self, name) for name in POSTINGS})

    @classmethod
    def load(cls, path: Path) -> Chunk:
        """The chunk that `save` left at ``path``."""
        with np.load(path) as file:
            terms = file["terms"].tobytes().decode()
            arrays = {name: file[name] for name in POSTINGS}
        return cls(terms=terms.split("\n") if terms else [], **arrays)


def invert(texts: Iterable[str], analyze: Callable[[str], list[str]]) -> Chunk:
    """The chunk of ``texts``, document 0 first."""
    numbers: dict[str, int] = {}
    terms, documents, counts, lengths = array("i"), array("i"), array("i"), array("i")
    for document, text in enumerate(texts):
        found = analyze(text)
        lengths.append(len(found))
        for term, count in Counter(found).items():
            terms.append(numbers.setdefault(term, len(numbers)))
            documents.append(document)
            counts.append(count)
    ordered = sorted(numbers)
    place = np.empty(len(ordered), dtype=np.int64)
    for position, term in enumerate(ordered):
        place[numbers[term]] = position
    term_of = place[np.array(terms, dtype=np.int64)]
    order = np.argsort(term_of, kind="stable")
    return Chunk(
        terms=ordered,
        starts=np.searchsorted(term_of[order], np.arange(len(ordered) + 1)).astype(np.int64),
        documents=np.array(documents, dtype=np.int32)[order],
        counts=np.array(counts, dtype=np.int32)[order],
        lengths=np.array(lengths, dtype=np.int32),
    )


def merge(chunks: Sequence[Callable[[], Chunk]], ids: Sequence[str], folder: Path) -> None:
    """Write the index of ``chunks`` to an empty folder; one chunk is in memory at a time.

    Equal scores are ranked by the ``ids`` of all documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    frequency: Counter[str] = Counter()
    lengths = []
    for load in chunks:
        chunk = load()
        frequency.update(dict(zip(chunk.terms, np.diff(chunk.starts).tolist(), strict=True)))
        lengths.append(chunk.lengths)
    terms = sorted(frequency)
    df = np.array([frequency[term] for term in terms], dtype=np.int64)
    length = np.concatenate([np.zeros(0, dtype=np.int32), *lengths])
    starts = np.concatenate([[0], np.cumsum(df)]).astype(np.int64)
    _write_postings(chunks, {term: i for i, term in enumerate(terms)}, starts, length, folder)
    n = int((length > 0).sum())
    rank = np.empty(len(ids), dtype=np.int32)
    rank[np.argsort(np.array(ids, dtype=np.str_))] = np.arange(len(ids))
    encoded = [term.encode() for term in terms]
    (folder / TERMS).write_bytes(b"".join(encoded))
    np.save(folder / "term_ends.npy", np.cumsum([0, *map(len, encoded)]).astype(np.int64))
    np.save(folder / "starts.npy", starts)
    np.save(folder / "idf.npy", np.log(1 + (n - df + 0.5) / (df + 0.5)).astype(np.float32))
    np.save(folder / "rank.npy", rank)


def _write_postings(
    chunks: Sequence[Callable[[], Chunk]],
    number: dict[str, int],
    starts: NDArray[np.int64],
    length: NDArray[np.int32],
    folder: Path,
) -> None:
    """Documents and scaled counts (tf * inv) of every term, straight into mapped files."""
    code_of = np.array([length_code(int(v)) for v in range(int(length.max(initial=0)) + 1)])
    # A collection without a word has no mean, and no postings that it would matter to.
    mean = np.float32(max(1, length.sum(dtype=np.int64)) / max(1, int((length > 0).sum())))
    one = np.float32(1)
    inverse = (one / (K1 * ((one - B) + B * LENGTHS / mean))).astype(np.float32)
    shape = (int(starts[-1]),)
    documents = _mapped(folder / "documents.npy", np.int32, shape)
    scaled = _mapped(folder / "scaled.npy", np.float32, shape)
    filled, first = starts[:-1].copy(), 0
    for load in chunks:
        chunk = load()
        terms = np.array([number[term] for term in chunk.terms], dtype=np.int64)
        counts = np.diff(chunk.starts)
        target = np.repeat(filled[terms] - chunk.starts[:-1], counts) + np.arange(counts.sum())
        norm = inverse[code_of[chunk.lengths[chunk.documents]]]
        documents[target] = chunk.documents + first
        scaled[target] = chunk.counts.astype(np.float32) * norm
        filled[terms] += counts
        first += len(chunk.lengths)


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    if not shape[0]:  # nothing to map
        np.save(path, np.zeros(shape, dtype=dtype))
        return np.zeros(shape, dtype=dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


class Index:
    """A searchable index in a folder that `merge` filled: processes that open it share its map."""

    def __init__(self, folder: Path) -> None:
        self._starts, self._documents, self._scaled, self._idf, self._rank, self._term_ends = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS
        )
        # A file of no bytes cannot be mapped.
        self._terms = (
            np.memmap(folder / TERMS, dtype=np.uint8, mode="r")
            if (folder / TERMS).stat().st_size
            else np.zeros(0, dtype=np.uint8)
        )
        self._analyze = Analyzer()
        self._number = lru_cache(maxsize=1 << 16)(self._find)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self._rank)

    def search(self, query: str, k: int = 50) -> list[tuple[int, float]]:
        """The best ``k`` documents for ``query``, best first, with their scores."""
        found = [(self._number(term), n) for term, n in Counter(self._analyze(query)).items()]
        parts = [self._scores(number, count) for number, count in found if number is not None]
        if not parts:
            return []
        # Lucene adds the terms' float32 scores as doubles, too.
        total = np.bincount(
            np.concatenate([documents for documents, _ in parts]),
            weights=np.concatenate([scores for _, scores in parts]),
            minlength=len(self),
        ).astype(np.float32)
        if len(self) > k:
            least = np.partition(total, len(total) - k)[len(total) - k]
            best = np.flatnonzero(total >= least if least > 0 else total > 0)
        else:
            best = np.flatnonzero(total > 0)
        order = np.lexsort((self._rank[best], -total[best]))[:k]
        return [(int(best[i]), float(total[best[i]])) for i in order]

    def _scores(self, number: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        start, end = self._starts[number], self._starts[number + 1]
        weight = np.float32(self._idf[number] * np.float32(count))
        scores = weight - weight / (np.float32(1) + self._scaled[start:end])
        return self._documents[start:end], scores

    def _find(self, term: str) -> int | None:
        """The number of ``term``, by bisection of the sorted terms."""
        wanted = term.encode()
        at = bisect_left(range(len(self._idf)), wanted, key=self._term)
        return at if at < len(self._idf) and self._term(at) == wanted else None

    def _term(self, number: int) -> bytes:
        start, end = self._term_ends[number], self._term_ends[number + 1]
        return self._terms[start:end].tobytes()
