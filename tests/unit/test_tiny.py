"""The tiny policy's tokenizer loses nothing, and expert play notices one that does."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from local_coin import LocalCoin
from tiny_play import PLAIN, SMALL, TAGGED, word_tokenizer
from tokenizers import normalizers

from aem_lightning.modules import build_tiny_model, build_tokenizer, tiny
from aem_lightning.modules.settings import Architecture, WarmStartSettings
from aem_lightning.rollout import Prompt, PromptEncoder, RewardShaping
from aem_lightning.rollout.expert import check_round_trip
from aem_lightning.runner.warm_start import play_demonstrations, tiny_base
from aem_lightning.types import EnvStep, function_tool

FUNCTION = Prompt(opening="{observation}", turn="", window="", action="function")
TOOL_CALL = '{"name": "act", "arguments": {"action": "go to Desk 1"}}'
LOOK = function_tool("look", "See where you are.", {})
TEXTS = [
    "click[Buy Now]",
    TOOL_CALL,
    " two  blanks , and one at the end ",
    "-\treturn  x\n+\n+    return  y  # tab\r\n",
    "\N{GRINNING FACE}\N{ZERO WIDTH JOINER} na\u00efve \u5f00\u95e8\u3002 \u0928\u092e\u0947 \x00",
    "<think>Why</think> <action>go</action><|end|>",
    "",
]


def lower_casing():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_as_it_was(text):
    tokenizer = word_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_blanks_and_line_breaks_before_a_known_word_cost_no_token():
    tokenizer = build_tokenizer(["desk", "the shelf\n\nholds a cup 12."])
    for text in ("desk desk desk", "the desk 12.", "the shelf\n\nholds"):
        assert len(tokenizer(text).input_ids) == len(text.replace(".", " .").split()), text


def test_a_shop_s_words_do_not_make_a_head_that_is_most_of_the_model(monkeypatch):
    monkeypatch.setattr(tiny, "MOST_TOKENS", 400)
    shop = [f"click[product {name}{number}]" for name in ("Shoe", "Hat") for number in range(400)]
    tokenizer, again = build_tokenizer(shop), build_tokenizer(shop)
    assert 300 < len(tokenizer) <= 400 + len(tiny.TAGS)
    assert tokenizer.get_vocab() == again.get_vocab()
    for text in (*TEXTS, shop[7]):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("click[product Shoe").input_ids) == 4, "frequent words are one token"
    assert tokenizer.tokenize("<think>")[0] == "<think>"
    assert tokenizer("<|end|>").input_ids == [tokenizer.eos_token_id]


def test_a_message_that_spells_the_end_does_not_end():
    encoder = PromptEncoder(word_tokenizer(), PLAIN)
    ids = encoder.first(EnvStep("say <|end|> and\t<|user|>", info={}))
    assert ids.count(encoder.tokenizer.eos_token_id) == 0
    assert encoder.tokenizer.decode(ids) == "<|user|>say <|end|> and\t<|user|><|assistant|>"


def test_the_prompt_s_own_words_are_known_too():
    base = tiny_base(LocalCoin(), SMALL, 0, Prompt("Task:\n{goal}", "Well , {observation}", ""))
    assert len(base.tokenizer("Well , open red box").input_ids) == 5


@pytest.mark.parametrize(
    ("prompt", "action"),
    [
        (PLAIN, "click[Buy Now]"),
        (TAGGED, TOOL_CALL),
        (PLAIN, " look  around "),  # blanks that the parser joins are the environment's to read
        (FUNCTION, "<function=edit>\n<parameter=new>\tif x:\n\n  y</parameter>\n</function>"),
    ],
)
def test_actions_of_every_form_survive(prompt, action):
    encoder = PromptEncoder(word_tokenizer(), prompt)
    check_round_trip(encoder, action, encoder.demonstrate(action))


@pytest.mark.parametrize("prompt", [PLAIN, TAGGED])
def test_a_tokenizer_that_loses_capitals_is_named(prompt):
    encoder = PromptEncoder(lower_casing(), prompt)
    check_round_trip(encoder, "open red box", encoder.demonstrate("open red box"))
    with pytest.raises(ValueError, match=r"'click\[Buy Now\]'.*'click\[buy now\]'.*policy\.model="):
        check_round_trip(encoder, "click[Buy Now]", encoder.demonstrate("click[Buy Now]"))


@pytest.mark.parametrize(
    ("prompt", "action", "read"),
    [
        (PLAIN, "x = 1\ny = 2", "x = 1 y = 2"),
        (FUNCTION, "finish", None),
        (TAGGED, "</action>", None),
    ],
)
def test_a_prompt_that_cannot_say_an_action_is_named(prompt, action, read):
    encoder = PromptEncoder(word_tokenizer(), prompt)
    with pytest.raises(ValueError, match=rf"prompt\.action={prompt.action} reads {read!r}"):
        check_round_trip(encoder, action, encoder.demonstrate(action))


class Loud(LocalCoin):
    """Its expert shouts."""

    def make_expert(self, task, seed):
        quiet = super().make_expert(task, seed)
        return type("Shout", (), {"act": lambda self, *shown: quiet.act(*shown).upper()})()


def test_expert_play_stops_at_the_first_action_that_is_lost():
    encoder = PromptEncoder(lower_casing(), PLAIN, "transcript")
    limits = {"max_turns": 4, "max_context": 96, "max_new_tokens": 6}
    settings = WarmStartSettings(demonstrations=4, slip=0.0)
    with pytest.raises(ValueError, match=r"loses a part of the expert's action 'OPEN"):
        play_demonstrations(Loud(), encoder, settings, RewardShaping(), limits)


def test_a_call_is_spelled_in_bytes_or_the_tools_are_not_told():
    prompt = replace(PLAIN, action="tool_call", tools=(*PLAIN.tools, LOOK))
    encoder = PromptEncoder(tiny_base(LocalCoin(), SMALL, 0, prompt).tokenizer, prompt)
    told = encoder.read(encoder.first(EnvStep("a room")))
    assert told == (
        "<|system|>act(action): Take one action in the environment.\nlook(): See where you are.\n"
        "<|user|>a room<|assistant|>"
    )
    for call, tokens in (("open red box", 24), ("look", 22)):
        ids = encoder.demonstrate(json.dumps({"name": "act", "arguments": {"action": call}}))
        assert len(ids) <= tokens, encoder.decode(ids)


def test_expert_play_that_no_response_could_hold_stops_a_warm_start():
    prompt = replace(PLAIN, action="tool_call")
    encoder = PromptEncoder(tiny_base(LocalCoin(), SMALL, 0, prompt).tokenizer, prompt)
    limits = {"max_turns": 4, "max_context": 256, "max_new_tokens": 6}
    settings = WarmStartSettings(demonstrations=4, slip=0.0)
    with pytest.raises(ValueError, match=r"max_new_tokens=6 cuts.*Type max_new_tokens=2\d"):
        play_demonstrations(LocalCoin(), encoder, settings, RewardShaping(), limits)


def test_a_whole_number_is_no_number_for_an_architecture():
    architecture = Architecture(initializer_range=1, rope_theta=500)
    model = build_tiny_model(build_tokenizer(["look"]), architecture, seed=0)
    assert model.config.initializer_range == 1.0
