"""Caches inside textworld's PDDL engine: 20 to 40 times the speed, and not one character changed.

Every load and every reset of the plain engine translates the problem twice (the second time for a
planner that nobody asks), every step parses its templates again and copies their contexts deeply.
The caches replace functions of textworld 1.7.0 from outside, so they are bound to that version.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any

from aem_lightning.envs.alfworld.library import use_trimmed_library
from aem_lightning.envs.alfworld.package import import_optional

logger = logging.getLogger(__name__)

TEXTWORLD = "1.7.0"
GAMES = 64
PARSES = 4096
# A goal in plain words; anything else might mean something to the grammar.
PLAIN_GOAL = re.compile(r'"Your task is to: ([A-Za-z0-9 ,\'-]+)\."')
STAND_IN = "some goal"
PREDICATE = re.compile(r"(\w+)\(")
# No action of alfred.pddl has an effect on where receptacles stand.
CONSTANT_PREDICATES = frozenset({"receptacleatlocation"})


@cache
def apply_engine_caches() -> bool:
    """Put the caches into this process's textworld; a second call does nothing.

    Returns:
        Whether they are in place: another version of textworld is left as it is, with a warning.
    """
    import_optional("textworld")
    found = version("textworld")
    if found != TEXTWORLD:
        logger.warning(
            "textworld %s is installed; the caches know %s, so the plain engine runs, 20 times "
            "slower. Type: pip install 'aem-lightning[alfworld]'",
            found,
            TEXTWORLD,
        )
        return False
    use_trimmed_library()
    _cache_translations()
    _cache_templates()
    _cache_commands()
    _cache_queries()
    _cache_grammars()
    return True


def _cache_translations() -> None:
    """One translation per problem, for every load, reset and copy of its game."""
    fast_downward = import_optional("fast_downward")
    translate = fast_downward.pddl2sas
    known: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def pddl2sas(domain: str, problem: str, verbose: bool = False, optimize: bool = False) -> Any:
        # The optimised one serves `policy_commands` alone, which `AlfworldEnv` never asks for.
        key = (domain, problem)
        if key not in known:
            arguments = sys.argv
            try:
                known[key] = translate(domain, problem, verbose=verbose, optimize=False)
            finally:
                sys.argv = arguments  # the translator overwrites it
        known.move_to_end(key)
        if len(known) > GAMES:
            known.popitem(last=False)
        return known[key]

    fast_downward.pddl2sas = pddl2sas


def _cache_templates() -> None:
    """One parse per template; contexts copied one level deep, since nothing below is written."""
    textgen = import_optional("textworld.envs.pddl.textgen")
    parse = textgen._parse_and_convert

    @lru_cache(PARSES)
    def parsed(text: str, rule_name: str) -> Any:
        return parse(text, rule_name=rule_name)

    def clone(symbols: Any) -> Any:
        """Symbols that a context can be written into; the contexts they have are only read."""
        if isinstance(symbols, list):
            return [clone(symbol) for symbol in symbols]
        if not isinstance(symbols, textgen.Symbol):
            return symbols
        fresh = object.__new__(type(symbols))
        for name, value in vars(symbols).items():
            setattr(fresh, name, value if name == "context" else clone(value))
        return fresh

    def parse_and_convert(text: str, rule_name: str = "symbols", **_: Any) -> Any:
        return clone(parsed(text, rule_name))

    def copy_context(context: dict[str, Any]) -> dict[str, Any]:
        return context | {
            "variables": dict(context["variables"]),
            "mapping": dict(context["mapping"]),
        }

    textgen._parse_and_convert = parse_and_convert
    textgen.copy_context = copy_context
    textgen.deepcopy = clone
    textgen.check_flag = cache(textgen.check_flag)  # debugging flags, asked for at every symbol


def _cache_commands() -> None:
    """One derivation per game and command, where all that it asks of the state never changes."""
    grammar_type = import_optional("textworld.envs.pddl.textgen").ContextSensitiveGrammar
    derive = grammar_type.derive

    @lru_cache(PARSES)
    def is_constant(template: str) -> bool:
        return "#" not in template and set(PREDICATE.findall(template)) <= CONSTANT_PREDICATES

    def derive_once(grammar: Any, start: str, context: dict[str, Any]) -> Any:
        if not is_constant(start):
            return derive(grammar, start, context)
        known = vars(grammar).setdefault("_known_commands", {})  # a grammar lives as long as a load
        key = (start, *(variable.name for variable in context["mapping"].values()))
        if key not in known:
            known[key] = derive(grammar, start, context)
        return known[key]

    grammar_type.derive = derive_once


def _cache_queries() -> None:
    """One parse per condition of the grammar."""
    rule = import_optional("textworld.logic").Rule
    parse: Callable[..., Any] = rule.parse_conjunctive_query.__func__
    parsed = lru_cache(PARSES)(lambda expression: parse(rule, expression))
    rule.parse_conjunctive_query = staticmethod(parsed)


def _cache_grammars() -> None:
    """One parse for all grammars that differ in the goal's sentence alone."""
    logic = import_optional("textworld.envs.pddl.logic")
    parsed = lru_cache(GAMES)(logic._parse_and_convert)

    def parse_and_convert(text: str, rule_name: str = "pddlStart") -> Any:
        goals = PLAIN_GOAL.findall(text)
        if len(goals) != 1:
            return parsed(text, rule_name=rule_name)
        actions, grammar = parsed(
            PLAIN_GOAL.sub(f'"Your task is to: {STAND_IN}."', text), rule_name=rule_name
        )
        return actions, _with_goal(grammar, goals[0])

    logic._parse_and_convert = parse_and_convert


def _with_goal(grammar: Any, goal: str) -> Any:
    """A copy of ``grammar`` whose rule "task" tells ``goal``."""
    (rule,) = grammar._rules["task"]
    (sentence,) = rule.rhs
    told, told_rule, told_grammar = copy(sentence), copy(rule), copy(grammar)
    told.symbol = sentence.symbol.replace(STAND_IN, goal)
    told_rule.rhs = [told]
    told_grammar._rules = copy(grammar._rules)
    told_grammar._rules["task"] = [told_rule]
    return told_grammar
