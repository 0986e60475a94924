import pytest
from hydra.utils import instantiate
from runs import composed

from aem_lightning.rollout import Prompt
from aem_lightning.types import EnvStep, Turn

TEMPLATES = {"opening": "{observation}", "turn": "{observation}", "window": "{history}"}
STEP = EnvStep(
    "You see a box .", info={"goal": "find the coin", "admissible_actions": ("look", "open box")}
)


def make_prompt(**changes):
    return Prompt(**{**TEMPLATES, **changes})


def turn(observation, action, response="said"):
    return Turn(observation, (), response, action, 0, 0, [], None)


def test_every_field_is_filled_in_from_the_environment():
    text = "{goal}|{observation}|{admissible_actions}|{steps_taken}|{history_length}|{history}"
    prompt = make_prompt(opening=text, turn=text, window=text, history_item="{step}{action}")
    past = [turn("a", "x"), turn("b", "y")]
    actions = "'look'\n 'open box'"
    assert prompt.first_message(STEP) == f"find the coin|You see a box .|{actions}|0|0|"
    assert prompt.next_message(STEP, past) == f"find the coin|You see a box .|{actions}|2|0|"
    expected = f"find the coin|You see a box .|{actions}|2|2|1x\n2y"
    assert prompt.window_message(STEP, past, 5) == expected


@pytest.mark.parametrize(("length", "history"), [(0, ""), (1, "3:c>z"), (2, "2:b>y\n3:c>z")])
def test_a_window_holds_the_last_turns_with_their_true_numbers(length, history):
    prompt = make_prompt(history_item="{step}:{observation}>{action}")
    past = [turn("a", "x"), turn("b", "y"), turn("c", "z")]
    assert prompt.window_message(STEP, past, length) == history


def test_a_malformed_turn_stands_in_the_history_with_its_own_words():
    prompt = make_prompt(history_item="{action}")
    assert prompt.window_message(STEP, [turn("a", None, "no tags here")], 1) == "no tags here"


def test_braces_in_an_observation_are_not_read_as_fields():
    step = EnvStep("{goal} {unknown}")
    assert make_prompt().first_message(step) == "{goal} {unknown}"


@pytest.mark.parametrize(
    ("field", "template", "allowed"),
    [
        ("opening", "{observatoin}", "{observation}"),
        ("window", "{", "{history}"),
        ("turn", "{0}", "{observation}"),
        ("history_item", "{goal}", "{step}"),
        ("demonstration", "{observation}", "{action}"),
        ("demonstration", "{thoughts}{action}", "{thought}"),
    ],
)
def test_a_wrong_field_names_the_template_and_the_fields_it_may_use(field, template, allowed):
    with pytest.raises(ValueError, match=f"prompt.{field} ") as error:
        make_prompt(**{field: template})
    assert allowed in str(error.value)


def test_an_unknown_way_to_find_actions_is_an_error():
    with pytest.raises(ValueError, match="'tagged', 'plain'"):
        make_prompt(action="json")


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ("<action>open box</action>", "open box"),
        ("hm <ACTION>\n open\n  box </Action> done", "open box"),
        ("<think>or <action>look</action> ?</think><action>open box</action>", "open box"),
        ("open box", None),
        ("<action></action>", None),
        ("<action> \n </action>", None),
        ("<action>open box", None),
        ("<action>a</action><action>b</action>", None),
        ("<think><action>look</action></think>", None),
        ("", None),
    ],
)
def test_tagged_takes_exactly_one_action_outside_the_thoughts(response, action):
    assert make_prompt().parse(response) == action


@pytest.mark.parametrize(
    ("settings", "response", "action"),
    [
        ({}, "<think>why not</think><action>look</action>", "look"),
        ({}, "<think></think><action>look</action>", "look"),
        ({}, "<action>look</action>", None),
        ({}, "<think>why not <action>look</action>", None),
        ({"action": "react"}, "Thought: so\nAction: look", "look"),
        ({"action": "react"}, "Action: look", None),
        ({"action": "react"}, "Action: look\nObservation: x\nThought: so", None),
    ],
)
def test_required_thinking_makes_a_thoughtless_response_malformed(settings, response, action):
    assert make_prompt(**settings, require_thinking=True).parse(response) == action


@pytest.mark.parametrize(
    ("response", "action"), [(" open \n box ", "open box"), ("", None), (" \n", None)]
)
def test_plain_takes_the_whole_response(response, action):
    assert make_prompt(action="plain").parse(response) == action


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ("Thought: the box\nAction: open box", "open box"),
        ("thought 3: the box\n\n action 3:  open   box \n", "open box"),
        ("**Thought:** the box\n**Action:** `open box`", "open box"),
        ("- Thought: the box\n- Action: **open box**", "open box"),
        ("Thought: a\r\nAction: click[buy now]\r\n", "click[buy now]"),
        ("Action:\nopen box", "open box"),
        ("Action: open box\nSo I wait.", "open box"),
        ("Action: open box\nObservation: full\nThought: take\nAction: take it", "open box"),
        ("Thought: my action: open it", None),
        ("Action: a\nAction: b", None),
        ("Action: \n", None),
        ("Observation: open\nAction: open box", None),
        ("I open the box", None),
        ("", None),
    ],
)
def test_react_takes_the_one_action_before_what_the_model_makes_up(response, action):
    assert make_prompt(action="react").parse(response) == action


def test_a_role_and_whole_responses_reach_the_prompt():
    prompt = make_prompt(role="You cook.", opening="{role} {goal}", history_item="{response}|")
    assert prompt.first_message(STEP) == "You cook. find the coin"
    assert prompt.window_message(STEP, [turn("a", "x", "Thought: t\nAction: x")], 1) == (
        "Thought: t\nAction: x|"
    )


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("think_action", "<think>so</think><action>look</action>"),
        ("alfworld_tagged", "<think>so</think><action>look</action>"),
        ("webshop_tagged", "<think>so</think><action>look</action>"),
        ("react", "Thought: so\nAction: look"),
    ],
)
def test_a_format_asks_for_what_it_reads_and_says_what_there_is_to_know(name, fits):
    prompt = instantiate(composed([f"prompt={name}"]).prompt)
    assert prompt.parse(fits) == "look"
    assert prompt.parse(prompt.demonstration.format(action="look")) == "look"
    assert prompt.parse("look") is None
    messages = [prompt.first_message(STEP), prompt.window_message(STEP, [turn("a", "x")], 2)]
    for text in messages:
        assert text.startswith("You are a skilled agent that ")
        assert ("ALFRED" in text) == name.startswith("alfworld")
        assert ("WebShop" in text) == name.startswith("webshop")
        assert "You see a box ." in text
        assert "'open box'" in text
    assert "find the coin" in messages[1]
    assert ("find the coin" in messages[0]) == (name != "alfworld_tagged"), "ALFWorld says it"


CALL = "<function=bash>\n<parameter=cmd>if x:\n    y</parameter>\n</function>"


@pytest.mark.parametrize(
    ("response", "action"),
    [
        (f"I look.\n{CALL}\nDone.", CALL),
        (f"{CALL}{CALL.replace('x', 'z')}", CALL),
        (f"<think><function=a></function></think>{CALL}", CALL),
        (f"<function=a></function></think>{CALL}", CALL),
        ("<function=bash>", None),
        (f"<think>{CALL}</think>", None),
    ],
)
def test_function_takes_the_first_call_outside_the_thoughts_as_it_is(response, action):
    assert make_prompt(action="function").parse(response) == action
