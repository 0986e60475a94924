"""Texts with every word that a catalogue's pages can show, for building a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from aem_lightning.envs.webshop import pages
from aem_lightning.envs.webshop.catalogue import FOUND, Catalogue
from aem_lightning.envs.webshop.env import SEARCH_HINT
from aem_lightning.envs.webshop.pages import Page, Part


def vocabulary_texts(catalogue: Catalogue, separator: str = " [SEP] ") -> list[str]:
    """Every page of every product, every goal, and every action on them, at least once.

    The words are as many as the catalogue's, so this is for catalogues of thousands. The separator
    stands between the strings of ``text``.
    """
    shown = [
        pages.search_page("goal"),
        *(pages.results_page("", [], page, FOUND, set()) for page in (1, 2)),
        Page((Part("", "product", clicked=True), Part(".", "option", clicked=True))),
    ]
    for number in range(catalogue.num_products):
        product = catalogue.product(number)
        shown += [
            pages.results_page("", [product], 1, 1, set()),
            pages.item_page("", product, {}, show_attributes=True),
            *(pages.sub_page("", product, name) for name in (*pages.SUB_PAGES, pages.ATTRIBUTES)),
        ]
    texts = [separator, SEARCH_HINT, " ".join(map(str, range(FOUND + 1)))]
    texts += [text for page in shown for text in _texts(page)]
    goals = [catalogue.goal(number).instruction for number in range(catalogue.num_goals)]
    # A search may begin with any of their words.
    texts += [*goals, *(f"search[{word}]" for goal in goals for word in goal.split())]
    return sorted(set(texts))


def _texts(page: Page) -> Sequence[str]:
    """The page in both modes, with strings apart from each other, and the clicks on it."""
    clicks = [f"click[{name}]" for name in page.clickables()]
    return [page.render("text", "\n"), page.render("text_rich", ""), *clicks, "search[x]"]
