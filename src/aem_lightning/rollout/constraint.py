"""Constrained decoding: of the tokens that may come next, those that can still spell an action.

``action=constrained`` decides which token is drawn, and nothing else. Log-probabilities and
entropies stay those of the policy over its whole vocabulary, for three reasons. The update scores
the whole vocabulary, so numerator and denominator of the importance ratio are one function of the
weights and the ratio is 1 before the first step. AEM's entropy is the policy's own uncertainty, not
what the list of actions leaves of it. And the policy learns to write admissible actions by itself,
so that it can be played with ``action=free``. The price: for the constrained player, whose
probabilities are the policy's divided by the mass Z of what was allowed, the gradient has the extra
term A * grad log Z, which moves mass onto the actions listed where the advantage is positive. It
vanishes as the policy learns to stay within the list (Z = 1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from aem_lightning.rollout.prompt import outside_thoughts

OPEN, CLOSE = "<action>", "</action>"
BLANK = re.compile(r"<[^<>]+>")
# Tokens in which the tag that opens an action is looked for: it is a few, however it is cut.
_TAIL = 16


class Cursor(Protocol):
    """Where one response stands."""

    def allowed(self) -> Sequence[int] | None:
        """The tokens that may come next; ``None`` for all."""
        ...

    def take(self, token: int) -> None:
        """Go on by a token that was drawn."""
        ...


class Constraint(Protocol):
    """What the responses to one prompt may be; requests of a group share it."""

    def begin(self) -> Cursor:
        """A cursor at the start of a response."""
        ...

    def structured_outputs(self) -> dict[str, Any]:
        """The same in the words of a vLLM server."""
        ...


def trie(sequences: Iterable[Sequence[int]]) -> TrieCursor:
    """Some token sequences by their common beginnings, at the first token.

    Example:
        >>> cursor = trie([[7, 8, 0], [7, 9, 0]])
        >>> cursor.allowed()
        [7]
        >>> cursor.take(7)
        >>> cursor.allowed()
        [8, 9]
    """
    root: dict[int, Any] = {}
    for sequence in sequences:
        node = root
        for token in sequence:
            node = node.setdefault(token, {})
    return TrieCursor(root)


@dataclass(slots=True)
class TrieCursor:
    """A place in a `trie`."""

    node: dict[int, Any]

    def allowed(self) -> list[int] | None:
        """Sorted; ``None`` behind the end of a sequence."""
        return sorted(self.node) or None

    def take(self, token: int) -> None:
        """Raise ``KeyError`` for a token that is not allowed."""
        self.node = self.node[token] if self.node else {}


@dataclass(frozen=True)
class PlainActions:
    """The whole response is an action (``prompt.action=plain``).

    Args:
        actions: The actions.
        responses: Each as token ids, its end token included.
    """

    actions: tuple[str, ...]
    responses: tuple[tuple[int, ...], ...]

    @cached_property
    def _start(self) -> TrieCursor:
        return trie(self.responses)

    def begin(self) -> TrieCursor:
        """At the first token."""
        return replace(self._start)

    def structured_outputs(self) -> dict[str, Any]:
        """One of the actions, word by word."""
        return {"choice": list(self.actions)}


@dataclass(frozen=True)
class TaggedActions:
    """Free until an action tag opens outside of think tags, then an action (``tagged``).

    A token may reach over the end of the tag; what it spells of an action already is kept.

    Args:
        actions: The actions.
        encode: Text to token ids.
        decode: Token ids to text.
        stop_ids: Tokens that end a response.
    """

    actions: tuple[str, ...]
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...]

    def begin(self) -> TaggedCursor:
        """At the first token, where everything is allowed."""
        return TaggedCursor(self)

    def endings(self, begun: str) -> TrieCursor:
        """What may follow the tag and the text ``begun``; nothing where no action begins so."""
        begun = begun.lstrip()
        return trie(
            [*self.encode(action[len(begun) :] + CLOSE), *self.stop_ids[:1]]
            for action in self.actions
            if action.startswith(begun)
        )

    def structured_outputs(self) -> dict[str, Any]:
        """Anything, then one of the actions in tags."""
        spelt = "|".join(re.escape(action) for action in self.actions)
        return {"regex": rf"(.|\n)*{OPEN}({spelt}){CLOSE}"}


@dataclass(slots=True)
class TaggedCursor:
    """A place in a response of `TaggedActions`."""

    actions: TaggedActions
    tokens: list[int] = field(default_factory=list)
    inside: TrieCursor | None = None

    def allowed(self) -> list[int] | None:
        """``None`` before the tag."""
        return None if self.inside is None else self.inside.allowed()

    def take(self, token: int) -> None:
        """Look for the tag, then follow the action."""
        if self.inside is not None:
            self.inside.take(token)
            return
        self.tokens.append(token)
        decode = self.actions.decode
        if OPEN not in decode(self.tokens[-_TAIL:]).lower():
            return
        _, tag, begun = outside_thoughts(decode(self.tokens)).partition(OPEN)
        if tag:
            self.inside = self.actions.endings(begun)
