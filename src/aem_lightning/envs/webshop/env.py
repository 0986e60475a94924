"""The shop as a `TextEnv`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aem_lightning.envs.base import Reset, Step
from aem_lightning.envs.webshop import pages
from aem_lightning.envs.webshop.catalogue import Catalogue, open_catalogue
from aem_lightning.envs.webshop.goals import Goal
from aem_lightning.envs.webshop.pages import Page, Part
from aem_lightning.envs.webshop.reward import judge

SEARCH_HINT = "search[<your query>]"
_ACTION = re.compile(r"(.+)\[(.+)\]")


def task_id(number: int) -> str:
    """The task of a goal."""
    return f"goal/{number:07d}"


@dataclass(slots=True)
class _Session:
    """One shopper: where it is, and what it has chosen."""

    number: int
    goal: Goal
    page: Page
    place: str = "search"  # or results, item, sub, done
    found: tuple[int, ...] = ()
    shown: int = 1  # number of the page of results
    product: int = -1
    chosen: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    score: float = 0.0
    clickables: dict[str, Part] = field(default_factory=dict)


class WebShopEnv:
    """A shop: search it, read its pages, choose options, buy.

    ``reset(options={"task_id": id})`` starts a goal; the seed changes nothing, since a goal is one
    start state. Actions are ``search[words]`` and ``click[what is shown]``; an action that is
    neither, or that the page does not offer, leaves everything as it is. ``buy now`` ends the
    episode with upstream's reward, in [0, 1]. ``info`` has all reserved keys but ``infra_error``:
    ``won`` is a reward of 1.0, ``score`` the reward itself. ``noun_tagger`` says what tagged the
    catalogue: with the fallback, rewards are not those of spaCy's nouns.

    ``search`` is listed among the admissible actions on the search page, as `SEARCH_HINT`; as
    upstream has it, it works on every page. Unlike upstream, no word of a query is a command, and a
    run of blanks in a click counts as one.

    Args:
        folder: The catalogue, as `prepare_catalogue` made it.
        observation: ``text`` or ``text_rich``.
        show_instruction: Show the instruction on every page, as upstream does. Without it, the
            prompt has to say the goal.
        show_attributes: Offer the page of a product's attributes.
        separator: What stands between the strings of ``text``.
        results_per_page: Products on a page of results; upstream's is 10.
        exact_actions: Take actions in upstream's exact form only. Otherwise blanks around name and
            argument are taken off.
        suggest_search: List a search for the instruction, without its price cap, in place of the
            hint: for ``action=constrained``, which can only choose among what is listed.

    Raises:
        ValueError: An argument is out of range.
        FileNotFoundError: There is no finished catalogue.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        observation: pages.Mode = "text",
        show_instruction: bool = True,
        show_attributes: bool = False,
        separator: str = " [SEP] ",
        results_per_page: int = 10,
        exact_actions: bool = True,
        suggest_search: bool = False,
    ) -> None:
        if observation not in pages.MODES:
            raise ValueError(f"observation={observation!r}; allowed: {', '.join(pages.MODES)}")
        if results_per_page < 1:
            raise ValueError(f"results_per_page={results_per_page}; allowed: at least 1")
        self._catalogue: Catalogue = open_catalogue(str(folder))
        self._product = self._catalogue.product
        self._mode, self._separator = observation, separator
        self._show_instruction, self._show_attributes = show_instruction, show_attributes
        self._per_page, self._exact = results_per_page, exact_actions
        self._suggest = suggest_search
        self._session: _Session | None = None

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start the goal ``options["task_id"]``.

        Raises:
            ValueError: No task id was given, or one that the catalogue does not have.
        """
        number = self._number((options or {}).get("task_id"))
        goal = self._catalogue.goal(number)
        self._session = session = _Session(number, goal, Page(()))
        self._open(session, "search")
        return self._shown(session, is_valid=True)

    def step(self, action: str) -> Step:
        """Do ``action``; what is over stays as it is."""
        session = self._session
        if session is None:
            raise RuntimeError("step before reset: call reset(options={'task_id': ...}) first")
        was_over = session.place == "done"
        is_valid = not was_over and self._act(session, action)
        is_over = session.place == "done"
        reward = session.score if is_over and not was_over else 0.0
        observation, info = self._shown(session, is_valid=is_valid)
        return observation, reward, is_over, False, info

    def close(self) -> None:
        """Forget the session; the catalogue stays open for others."""
        self._session = None

    def _number(self, given: object) -> int:
        count = self._catalogue.num_goals
        found = re.fullmatch(r"goal/(\d{7,})", given) if isinstance(given, str) else None
        if not found or int(found[1]) >= count:
            raise ValueError(
                f"reset(options={{'task_id': {given!r}}}): give the id of a goal, from "
                f"{task_id(0)!r} to {task_id(count - 1)!r}"
            )
        return int(found[1])

    def _act(self, session: _Session, action: str) -> bool:
        """Whether ``action`` was one of the page's."""
        name, argument = self._read(session, action)
        if name == "search" and argument:
            session.found = self._catalogue.search(argument)
            self._open(session, "results", shown=1)
            return True
        part = session.clickables.get(pages.single_blanks(argument))
        if name != "click" or part is None:
            return False
        if self._exact and argument not in (argument.strip(), part.text.lower()):
            return False
        self._click(session, part)
        return True

    def _read(self, session: _Session, action: str) -> tuple[str, str]:
        """Name and argument of ``action``; where upstream finds none, those of what is offered.

        Upstream splits at the last opening bracket of a line, and so refuses values with brackets
        or line ends, though it lists them.
        """
        found = _ACTION.match(action)
        name, argument = found.groups() if found else ("[", "")
        if is_split := "[" in name:
            name, _, rest = action.partition("[")
            argument = rest.rpartition("]")[0]
        argument = argument.lower()
        if not self._exact:
            name, argument = name.strip().lower(), argument.strip()
        if is_split and name == "search" and argument != self._suggested(session).lower():
            return "", ""
        return name, argument

    def _click(self, session: _Session, part: Part) -> None:
        """Do what ``part`` is for."""
        if part.kind == "option":
            session.chosen[part.axis] = part.text
            self._open(session, "item")
        elif part.kind == "product":
            found = [n for n in self._on_page(session) if self._product(n).asin == part.text]
            session.product, session.chosen = found[0], {}
            session.seen.add(part.text)
            self._open(session, "item")
        elif part.text == pages.BUY:
            self._buy(session)
        elif part.text == pages.BACK:
            session.seen.clear()
            self._open(session, "search")
        elif part.text == pages.NEXT:
            self._open(session, "results", shown=session.shown + 1)
        elif part.text == pages.PREVIOUS:
            # One level up: sub page, product, results, the page of results before.
            step = 1 if session.place == "results" else 0
            place = "item" if session.place == "sub" else "results"
            self._open(session, place, shown=session.shown - step)
        else:
            self._open(session, "sub", part.text)

    def _open(self, session: _Session, place: str, name: str = "", *, shown: int = 0) -> None:
        """Go to a page."""
        session.place = place
        instruction = session.goal.instruction if self._show_instruction else ""
        if place == "search":
            session.found, session.chosen = (), {}
            session.page = pages.search_page(instruction)
        elif place == "results":
            session.shown, session.chosen = shown, {}
            products = [self._product(number) for number in self._on_page(session)]
            session.page = pages.results_page(
                instruction, products, shown, len(session.found), session.seen
            )
        elif place == "item":
            session.page = pages.item_page(
                instruction,
                self._product(session.product),
                session.chosen,
                show_attributes=self._show_attributes,
            )
        else:
            session.page = pages.sub_page(instruction, self._product(session.product), name)
        session.clickables = session.page.clickables()

    def _on_page(self, session: _Session) -> tuple[int, ...]:
        first = (session.shown - 1) * self._per_page
        return session.found[first : first + self._per_page]

    def _buy(self, session: _Session) -> None:
        bought, target = self._product(session.product), self._product(session.goal.product)
        session.score = judge(bought, session.chosen, session.goal, target).reward
        session.place = "done"
        session.page = pages.done_page(bought.asin, session.chosen, session.score)
        session.clickables = {}

    def _suggested(self, session: _Session) -> str:
        """The query that is listed in place of the hint; responses are read with single blanks."""
        return pages.single_blanks(session.goal.wish) if self._suggest else ""

    def _shown(self, session: _Session, *, is_valid: bool) -> Reset:
        """The page and ``info``."""
        suggested = self._suggested(session)
        listed = f"search[{suggested}]" if suggested else SEARCH_HINT
        hint = (listed,) if session.place == "search" else ()
        info = {
            "task_id": task_id(session.number),
            "goal": session.goal.instruction,
            "admissible_actions": (*hint, *(f"click[{name}]" for name in session.clickables)),
            "is_action_valid": is_valid,
            "won": session.score == 1.0,
            "score": session.score,
            "noun_tagger": self._catalogue.tagger,
        }
        return session.page.render(self._mode, self._separator), info
