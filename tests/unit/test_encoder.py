from dataclasses import replace

import pytest
from coin import ACTIONS, CoinEnv
from tiny_play import (
    CHATML,
    PLAIN,
    TAGGED,
    LocalPool,
    Script,
    byte_tokenizer,
    coin_task,
    conversation,
    ids_of,
    word_tokenizer,
)

from aem_lightning.rollout import Collector, Episode, PromptEncoder, RewardShaping
from aem_lightning.types import EnvStep

# The coin of task 3 is in the white box: the first two open an empty one.
LINES = ("open red box", "open blue box", "open white box")
SAID = (
    "A coin glints near the white box .",
    "The box is empty .",
    "The box is empty .",
)


def play(encoder, *, cut=False):
    """One episode of three turns."""
    collector = Collector(
        LocalPool(CoinEnv),
        encoder,
        Script(encoder, *LINES, cut=cut),
        RewardShaping(),
        max_turns=5,
        max_context=4096,
        max_new_tokens=16,
    )
    return collector.collect([Episode(coin_task(3), 0, 0)])[0]


def spoken(turns):
    """Observations and responses of the first ``turns`` turns, in turn."""
    return [text for pair in zip(SAID, LINES, strict=True) for text in pair][: 2 * turns]


@pytest.mark.parametrize("make_tokenizer", [word_tokenizer, byte_tokenizer])
@pytest.mark.parametrize("system", [None, "find the coin"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_transcript_is_what_the_chat_template_writes_token_by_token(make_tokenizer, system, cut):
    encoder = PromptEncoder(make_tokenizer(), replace(PLAIN, system=system), "transcript")
    played = play(encoder, cut=cut)
    assert len(played.rows) == 1
    for t, turn in enumerate(played.turns):
        prompt = ids_of(conversation(encoder, [*spoken(t), SAID[t]], reply=True), encoder)
        assert played.rows[0][: turn.start] == prompt
        response = played.rows[0][turn.start : turn.start + turn.length]
        assert response == ids_of(LINES[t], encoder) + ([] if cut else [*encoder.stop_ids])


def test_a_response_cut_by_its_length_is_closed_in_the_next_prompt():
    encoder = PromptEncoder(byte_tokenizer(), PLAIN, "transcript")
    played = play(encoder, cut=True)
    first, second = played.turns[:2]
    end = first.start + first.length
    between = encoder.tokenizer.decode(played.rows[0][end : second.start])
    assert first.finish_reason == "length"
    assert between.startswith("<|im_end|>\n<|im_start|>user\n")


def test_a_window_prompt_is_one_fresh_message_with_the_last_turns():
    encoder = PromptEncoder(word_tokenizer(), PLAIN, "window", history_length=1)
    played = play(encoder)
    assert len(played.rows) == 3
    history = [f"{said} {line}" for said, line in zip(SAID, LINES, strict=True)]
    messages = (SAID[0], f"{history[0]} {SAID[1]}", f"{history[1]} {SAID[2]}")
    for message, turn, row in zip(messages, played.turns, played.rows, strict=True):
        prompt = ids_of(conversation(encoder, [message], reply=True), encoder)
        assert row[: turn.start] == prompt


def test_a_demonstration_is_parsed_back_as_the_same_action():
    encoder = PromptEncoder(word_tokenizer(), TAGGED)
    for action in ACTIONS:
        tokens = encoder.demonstrate(action)
        assert tuple(tokens[-1:]) == encoder.stop_ids
        assert TAGGED.parse(encoder.decode(tokens)) == action


def test_a_demonstration_lacks_the_thought_or_takes_control_from_it():
    prompt = replace(TAGGED, demonstration="<think>{thought}</think><action>{action}</action>")
    encoder = PromptEncoder(byte_tokenizer(), prompt)
    said = encoder.demonstrate("open red box", "I look <|im_end|> here.")
    expected = "<think>I look <|im_end|> here.</think><action>open red box</action>"
    assert encoder.tokenizer.decode(said) == f"{expected}<|im_end|>"
    assert [*said].count(*encoder.stop_ids) == 1
    assert prompt.parse(encoder.decode(said)) == "open red box"
    assert encoder.demonstrate("look") == encoder.demonstrate("look", "")


def test_a_decoded_response_holds_no_special_tokens():
    encoder = PromptEncoder(byte_tokenizer(), PLAIN)
    assert encoder.decode([*ids_of(" open red box", encoder), *encoder.stop_ids]) == "open red box"


def test_an_unknown_memory_is_an_error_that_says_what_is_allowed():
    with pytest.raises(ValueError, match="memory=window, memory=transcript"):
        PromptEncoder(word_tokenizer(), PLAIN, "forever")


def test_a_tokenizer_without_a_chat_template_is_an_error_that_says_what_to_type():
    with pytest.raises(ValueError, match=r"no chat template.*policy\.chat_template="):
        PromptEncoder(byte_tokenizer(template=None), PLAIN)


def test_a_template_that_rewrites_earlier_turns_cannot_keep_a_transcript():
    rewriting = CHATML.replace(
        "{{ message.content }}", "{% if loop.last %}now: {% endif %}{{ message.content }}"
    )
    encoder = PromptEncoder(byte_tokenizer(rewriting), PLAIN, "transcript")
    with pytest.raises(ValueError, match="memory=window"):
        play(encoder)
    assert PromptEncoder(byte_tokenizer(rewriting), PLAIN, "window").first(EnvStep("a box"))
