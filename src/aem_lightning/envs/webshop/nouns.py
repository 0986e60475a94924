"""The nouns of product titles, which part of the reward compares.

Upstream asks spaCy's large English model at every purchase. Here `prepare` asks it once a product.
Without spaCy there is a fallback that takes every word for a noun; its rewards differ, so what
tagged a catalogue is part of its manifest, of every ``info``, and of the names of the task types.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from aem_lightning.envs.base import import_extra
from aem_lightning.envs.webshop.analyzer import STOP_WORDS

FALLBACK = "fallback"
GIVEN = "given"  # by the data itself, as in a generated catalogue: rows have `title_nouns`
NOUN_TAGS = ("NOUN", "PROPN")
_WORD = re.compile(r"[^\W\d_]+")

Tagger = Callable[[Iterable[str]], Iterator[list[str]]]


def load_tagger(name: str) -> Tagger:
    """A function from titles to their nouns: a spaCy model's, by name or folder, or ``fallback``.

    Raises:
        MissingExtraError: spaCy is not installed.
        FileNotFoundError: spaCy does not have the model.
    """
    if name == FALLBACK:
        return lambda titles: (
            [word for word in _WORD.findall(title.lower()) if word not in STOP_WORDS]
            for title in titles
        )
    spacy = import_extra("spacy", "webshop-nouns")
    try:
        model = spacy.load(name, exclude=["ner"])
    except OSError as error:
        raise FileNotFoundError(
            f"spaCy has no model {name!r}. Fetch it: python -m spacy download {name}; or do "
            f"without, at rewards that cannot be compared: datamodule.nouns={FALLBACK}"
        ) from error

    def tag(titles: Iterable[str]) -> Iterator[list[str]]:
        for document in model.pipe(titles):
            yield [token.text.lower() for token in document if token.pos_ in NOUN_TAGS]

    return tag
