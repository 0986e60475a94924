"""Caches inside textworld's PDDL engine: 20 to 40 times the speed, and not one character changed.

Every load and every reset of the plain engine translates the problem twice (the second time for a
planner that nobody asks), every step parses its templates again and copies their contexts deeply.
The caches replace functions of textworld 1.7.0 from outside, so they are bound to that version.
"""

from __future__ import annotations

import logging
import re
import sys
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
    _cache_actions()
    _cache_queries()
    _cache_grammars()
    return True


def _cache_translations() -> None:
    """One translation per problem, for every load, reset and copy of its game."""
    fast_downward = import_optional("fast_downward")
    translate = fast_downward.pddl2sas

    @lru_cache(GAMES)
    def translated(domain: str, problem: str) -> Any:
        arguments = sys.argv
        try:
            return translate(domain, problem, verbose=False, optimize=False)
        finally:
            sys.argv = arguments  # the translator overwrites it

    # The optimised one serves `policy_commands` alone, which `AlfworldEnv` never asks for.
    fast_downward.pddl2sas = lambda domain, problem, **_: translated(domain, problem)


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
    env_type = import_optional("textworld.envs.pddl").PddlEnv
    gather = env_type._gather_infos

    @lru_cache(PARSES)
    def is_constant(template: str) -> bool:
        return "#" not in template and set(PREDICATE.findall(template)) <= CONSTANT_PREDICATES

    def gather_infos(env: Any) -> None:
        wanted = env.request_infos
        if wanted.facts or wanted.moves or wanted.policy_commands:
            gather(env)
            return
        # The logic and the names of a game live as long as its load, and so do the commands.
        known = vars(env._logic).setdefault("_known_commands", {})
        actions, commands = env._pddl_state.all_applicable_actions(), []
        for action in actions:
            command = known.get(action.id)
            if command is None:
                command = _command(env, action)
                if is_constant(action.command_template):
                    known[action.id] = command
            commands.append(command)
        env.state["won"], env.state["lost"] = env._pddl_state.check_goal(), False
        env.state["_valid_actions"], env.state["_valid_commands"] = actions, commands
        env.state["admissible_commands"] = sorted(set(commands))

    env_type._gather_infos = gather_infos


def _command(env: Any, action: Any) -> str:
    """The words of ``action``, as the grammar derives them in the state that ``env`` is in."""
    entities = env._entity_infos
    context = {
        "state": env._pddl_state,
        "facts": list(env._pddl_state.facts),
        "variables": {place.name: entities[var.name] for place, var in action.mapping.items()},
        "mapping": action.mapping,
        "entity_infos": entities,
    }
    template: str = env._logic.grammar.derive(action.command_template, context)
    return template.format(**{key: entity.name for key, entity in entities.items()})


def _cache_actions() -> None:
    """One action per game and operator; a problem numbers its operators the same at every load."""
    operator_type = import_optional("fast_downward").Operator
    state_type = import_optional("textworld.envs.pddl.logic").PddlState

    def all_applicable_actions(state: Any) -> list[Any]:
        library = state.downward_lib
        operators = (operator_type * library.get_applicable_operators_count())()
        library.get_applicable_operators(operators)
        state._operators = {operator.id: operator for operator in operators}
        known = vars(state._logic).setdefault("_known_actions", {})
        found: dict[str, Any] = {}  # of operators with one name, the first
        for number, operator in state._operators.items():
            if number not in known:
                known[number] = operator.name, _action(state, operator)
            found.setdefault(*known[number])
        return list(found.values())

    state_type.all_applicable_actions = all_applicable_actions


def _action(state: Any, operator: Any) -> Any:
    """The engine's action for ``operator``."""
    logic = import_optional("textworld.logic")
    name, *arguments = operator.name.split()
    action = logic.Action(name=name, preconditions=[], postconditions=[])
    action.id = operator.id
    action.mapping = {
        logic.Placeholder(p.name.strip("?"), p.type_name): logic.Variable(argument, p.type_name)
        for p, argument in zip(state._actions[name].parameters, arguments, strict=False)
    }
    action.command_template = state._logic.actions[name].template
    action.feedback_rule = state._logic.actions[name].feedback_rule
    return action


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
