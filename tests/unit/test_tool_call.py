"""Native tool calls: what is read as a call, why not, and which templates may show tools."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from models.templates import FOLDER
from runs import composed
from tiny_play import CHATML, byte_tokenizer

from aem_lightning.datamodules import SweDataModule, WebShopDataModule
from aem_lightning.envs.swe import SweSettings
from aem_lightning.envs.swe.tools import parse_call, write_call
from aem_lightning.rollout import Prompt, PromptEncoder
from aem_lightning.rollout.tool_call import STYLES
from aem_lightning.runner.build import build_prompt
from aem_lightning.types import MALFORMED, EnvStep, Turn, function_tool, malformed_kinds

TEXTS = {"opening": "{observation}", "turn": "{observation}", "window": "{history}"}
ACT = Prompt(**TEXTS, action="tool_call")
SCHEMAS = {"path": {"type": "string"}, "line": {"type": "integer"}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": SCHEMAS, "required": ["path"]},
        },
    }
    for name in ("view", "edit")
]
SEVERAL = replace(ACT, tools=TOOLS)
GOOD = '<tool_call>\n{"name": "act", "arguments": {"action": "go"}}\n</tool_call>'


def call(**fields: object) -> str:
    return f"<tool_call>{json.dumps(fields)}</tool_call>"


@pytest.mark.parametrize(
    "reply",
    [
        GOOD,
        f"I go there. {GOOD}",
        f"<think>maybe {call(name='act', arguments={'action': 'no'})}</think>{GOOD}",
        '{"name": "act", "parameters": {"action": "go"}}',
        '<|python_tag|>{"name": "act", "arguments": {"action": "go"}}',
        '[TOOL_CALLS][{"name": "act", "arguments": {"action": "go"}, "id": "1"}]',
        'So: [TOOL_CALLS]act[CALL_ID]1[ARGS]{"action": "go"}',
        "<tool_call><function=act>\n<parameter=action>\ngo\n</parameter>\n</function></tool_call>",
    ],
)
def test_a_call_is_not_read(reply: str) -> None:
    assert ACT.parse(reply) == "go"
    assert ACT.malformed(reply) == ""


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("go", "no call"),
        (f"<think>{GOOD}</think>", "no call"),
        (f"<think>{GOOD}", "no call"),
        (GOOD.removesuffix("</tool_call>"), "no call"),
        (GOOD + GOOD, "several calls"),
        ("<tool_call>{'name': 'act'}</tool_call>", "not JSON"),
        ('<tool_call>{"name": "act", "arguments": {"action": "\\ud800"}}</tool_call>', "not JSON"),
        (f"<tool_call>{'[' * 200_000}</tool_call>", "not JSON"),
        ("<tool_call>[1]</tool_call>", "no object"),
        (call(name="fly", arguments={"action": "go"}), "unknown tool 'fly'"),
        (call(name=["act"]), "unknown tool ['act']"),
        ("[TOOL_CALLS]a{}[TOOL_CALLS]b{}", "several calls"),
        ("[TOOL_CALLS]", "not JSON"),
        (call(name="act"), "missing argument 'action'"),
        (call(name="act", arguments="go"), "wrong argument: no object"),
        (call(name="act", arguments={"action": 3}), "wrong argument 'action': not of type string"),
        (call(name="act", arguments={"action": "a", "b": "c"}), "unknown argument 'b'"),
        (call(name="act", arguments={"action": " "}), "empty argument 'action'"),
    ],
)
def test_a_malformed_call_is_read_or_takes_another_reason(reply: str, reason: str) -> None:
    assert ACT.parse(reply) is None
    assert ACT.malformed(reply) == reason


ACTIONS = (
    "click[Buy Now]",
    'say "a\\b" {x}',
    "frage nach Äpfeln 🍎",
    "write </tool_call><think>",
    "two\nlines",
)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_demonstration_loses_its_action(action: str) -> None:
    for demonstration in ("{action}", "<think>{thought}</think>{action}"):
        prompt = replace(ACT, demonstration=demonstration)
        assert prompt.parse(prompt.demonstrated(action, "so")) == action


def test_one_of_several_tools_is_not_the_whole_call() -> None:
    chosen = {"name": "edit", "arguments": {"path": "a.py", "line": 3}}
    assert json.loads(str(SEVERAL.parse(call(**chosen)))) == chosen
    shown = json.dumps(chosen)
    assert SEVERAL.parse(SEVERAL.demonstrated(shown)) == shown
    wrong = call(name="edit", arguments={"path": "a.py", "line": True})
    assert SEVERAL.malformed(wrong) == "wrong argument 'line': not of type integer"


def test_null_is_refused_where_a_schema_is_nullable() -> None:
    tool = function_tool("view", "", {"path": "where"})
    tool["function"]["parameters"]["properties"]["line"] = {"type": "integer", "nullable": True}
    prompt = replace(ACT, tools=[tool])
    said = {"name": "view", "arguments": {"path": "a", "line": None}}
    assert json.loads(str(prompt.parse(call(**said)))) == said
    said["arguments"]["line"] = "1"
    assert prompt.malformed(call(**said)) == "wrong argument 'line': not of type integer|null"


def test_an_environment_s_own_words_are_lost_in_its_tools() -> None:
    shop = replace(ACT, tools=WebShopDataModule.tools(None))
    swe = replace(ACT, tools=SweDataModule.tools(SimpleNamespace(play=SweSettings())))
    walk = function_tool("walk", "", {"to": "where"}, action="go to {to}")
    look = replace(ACT, tools=[function_tool("look", "", {}, action="look"), walk])
    changed = write_call("file_editor", command="view", path="/a", view_range="[1, 2]")
    for style in STYLES:
        for prompt, action in (
            (shop, "search[red {shoes}]"),
            (shop, "click[buy now]"),
            (look, "look"),
            (look, "go to desk 1"),
        ):
            assert prompt.parse(prompt.demonstrated(action, "", style)) == action
        for action in (changed, write_call("finish"), write_call("bash", cmd="a\n  b 'c' \"d\"")):
            called = swe.parse(
                swe.demonstrated(action.replace("=bash", "=execute_bash"), "", style)
            )
            assert parse_call(str(called)) == parse_call(action)
    assert shop.malformed(shop.demonstrated("jump")) == "unknown tool ''"


def test_a_reason_has_no_kind() -> None:
    replies = ["go", GOOD, call(name="fly"), call(name="run"), call(name="act", arguments=3)]
    reads = [ACT.read(reply) for reply in replies]
    turns = [Turn("", (), "", action, 0, 0, [], None, malformed=why) for action, why in reads]
    assert malformed_kinds(turns) == {"no call": 1, "unknown tool": 2, "wrong argument": 1}
    assert set(malformed_kinds(turns)) <= set(MALFORMED)


@pytest.mark.parametrize("tools", [[], [{"name": "act"}], [TOOLS[0], TOOLS[0]]])
def test_tools_that_are_none_are_taken(tools: list[object]) -> None:
    with pytest.raises(ValueError, match=r"prompt\.tools has to list tools"):
        replace(ACT, tools=tools)


def test_a_template_does_not_show_the_tools_or_the_call_is_lost_in_ids() -> None:
    qwen = byte_tokenizer((FOLDER / "qwen2_5.jinja").read_text())
    hermes = byte_tokenizer(
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML
    )
    for tokenizer in (qwen, hermes):
        for prompt, name in ((ACT, "act"), (SEVERAL, "edit")):
            made = PromptEncoder(tokenizer, prompt)
            assert f'"name": "{name}"' in made.read(made.first(EnvStep("a room")))
        made = PromptEncoder(tokenizer, ACT)
        assert made._native == ("hermes", "user" if tokenizer is hermes else "tool", False)
        for action in ACTIONS:
            assert ACT.parse(made.decode(made.demonstrate(action))) == action
        without = PromptEncoder(tokenizer, replace(ACT, action="plain"))
        assert '"act"' not in without.read(without.first(EnvStep("a room")))


def test_what_cannot_show_tools_takes_them() -> None:
    with pytest.raises(ValueError, match="no place for tools"):
        PromptEncoder(byte_tokenizer(), ACT)
    other = "{% if tools %}Call them in <|tool_call|>: {{ tools | tojson }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match=r"not read here: 'with <\|tool_call\|>'.*hermes"):
        PromptEncoder(byte_tokenizer(other), ACT)
    with pytest.raises(ValueError, match=r"action=constrained.*prompt\.action=tool_call"):
        PromptEncoder(byte_tokenizer(), ACT, action="constrained")


def test_tool_calls_cannot_be_typed() -> None:
    words = ["experiment=quickstart", "prompt=tool_call"]
    cfg, look = composed(words), [function_tool("look", "See.", {})]
    assert (cfg.max_new_tokens, composed(words[:1]).max_new_tokens) == (36, 12)
    data = SimpleNamespace(tools=lambda: look)
    assert build_prompt(cfg, data).tools == look
    prompt = build_prompt(cfg, SimpleNamespace(tools=list))
    assert prompt.parse(prompt.demonstrated("go to desk 1")) == "go to desk 1"
    parameters = "parameters:{type:object,properties:{path:{type:string}},required:[path]}"
    tools = f"+prompt.tools=[{{type:function,function:{{name:edit,{parameters}}}}}]"
    own = build_prompt(composed([*words, tools]), data)
    made = PromptEncoder(byte_tokenizer((FOLDER / "qwen2_5.jinja").read_text()), own)
    assert '"name": "edit"' in made.read(made.first(EnvStep("a room")))
