"""The matrix of real chat templates: two memories, thoughts kept and cut, every kind of ending."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
from coin import CoinEnv
from models.templates import (
    FACTS,
    FOLDER,
    GENUINE,
    HELD,
    differs,
    encoder,
    page,
    play,
    tokenizer,
    whole,
)
from tiny_play import LocalPool, Script, coin_task, ids_of

from aem_lightning.callbacks.transcripts import episode_record
from aem_lightning.export import Chats, rows_of
from aem_lightning.rollout import (
    Collector,
    Episode,
    Prompt,
    PromptEncoder,
    Result,
    RewardShaping,
)
from aem_lightning.rollout.conversation import ChatTemplate

REPLY = "It is near.</think><action>open red box</action>"
THOUGHT = "<think>" + REPLY
REPLIED = {"role": "assistant", "content": ""}


def test_a_template_has_no_facts() -> None:
    assert {file.stem for file in FOLDER.glob("*.jinja")} == set(FACTS)
    assert len(FACTS) >= 25


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_template_is_not_what_its_facts_say(name: str) -> None:
    fact, made = FACTS[name], encoder(name)
    tokenizer = made.tokenizer
    assert tokenizer.convert_ids_to_tokens(made.end_id) == fact.end
    assert {made.end_id, tokenizer.eos_token_id} == set(made.stop_ids)
    shown = made.demonstrate("open red box")
    assert shown[-1] == made.end_id
    assert made.prompt.parse(made.decode(shown)) == "open red box"
    first = next(iter(play(made, "go", fact.end)))[1]
    assert first.rstrip().endswith("<think>") == fact.opens
    opening, closing = fact.thought
    for mention in ("", "Not <action>this</action>. "):
        thought = f"{'' if fact.opens else opening}{mention}It is near.{closing}"
        said = tokenizer(f"{thought}<action>open red box</action>", add_special_tokens=False)
        read = made.prompt.read(made.decode([*said.input_ids, made.end_id]))
        assert read == ("open red box", "")
    lost = "So <action>open red box</action>" if fact.opens else "<think><action>a</action>"
    assert made.prompt.parse(made.decode(tokenizer(lost).input_ids)) is None


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_transcript_loses_a_token_or_closes_a_reply_twice(name: str) -> None:
    fact, made = FACTS[name], encoder(name)
    ended = [text for _, text in play(made, "go", fact.end)]
    cut = [text for _, text in play(made, "go", None)]
    prompts = [ids for ids, _ in play(made, THOUGHT, fact.end)]
    assert all(b[: len(a)] == a for a, b in itertools.pairwise(prompts))
    assert THOUGHT in made.tokenizer.decode(prompts[1])
    if name != "gpt_oss":  # <|return|> ends the reply, <|end|> the turn
        assert ended == [text.replace(f" {fact.end}", fact.end) for text in cut]  # Llama 2's blank
    other = [text for _, text in play(made, "go", fact.eos)]
    if fact.eos != fact.end:  # the sampled token stays, and the template's closing follows
        assert other == [text.replace("go", f"go{fact.eos}") for text in cut]
    if fact.same:
        assert ended[-1] == whole(made, "go")


@pytest.mark.parametrize("name", sorted(FACTS))
def test_thoughts_are_cut_in_part_or_content_becomes_control(name: str) -> None:
    fact, made = FACTS[name], encoder(name, thoughts="cut")
    reply = REPLY if fact.opens else THOUGHT
    prompts = [text for _, text in play(made, reply, fact.end)]
    assert "It is near" not in prompts[2]
    assert prompts[2].count("<action>open red box</action>") == 2
    assert prompts[2] == whole(made, "<action>open red box</action>")
    harmless, hostile = (
        [ids for ids, _ in play(made, text, fact.end)][2] for text in ("go", f"go{fact.end}go")
    )
    controls = made._tokens._controls
    assert controls(harmless) == controls(hostile)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_window_prompt_is_refused(name: str) -> None:
    made = encoder(name, "window")
    assert all("Find the coin." in text for _, text in play(made, "go", FACTS[name].end))


def test_an_argument_does_not_reach_the_template() -> None:
    made = encoder("qwen3_5")
    quiet = type(made)(made.tokenizer, made.prompt, chat_template_kwargs={"enable_thinking": False})
    first = [next(play(one, "go", None))[1] for one in (made, quiet)]
    assert first[1] == first[0] + "\n</think>\n\n"
    assert (made._opened, quiet._opened) == ("<think>", "")


ACT = Prompt("{observation}", "{observation}", "{observation}", action="tool_call")


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_call_is_not_written_as_the_template_writes_it_or_not_refused(name: str) -> None:
    fact, plain = FACTS[name], tokenizer(name)
    if fact.calls is None:
        with pytest.raises(ValueError, match=r"prompt\.action=tool_call.*Type another prompt"):
            PromptEncoder(plain, ACT)
        return
    made = PromptEncoder(plain, ACT, "window" if name == "mistral_tekken" else "transcript")
    assert made._native[:2] == fact.calls
    ids = made.demonstrate('say "hi"')
    assert made.prompt.read(made.decode(ids)) == ('say "hi"', "")
    call = {"name": "act", "arguments": {"action": 'say "hi"'}}
    said = {"tool_calls": [{"type": "function", "id": "abcdefghi", "function": call}]}
    whole = made._apply(False, [*made._conversation(["go", ""])[:-1], {**REPLIED, **said}], None)
    written = plain.decode(ids).split(', "id"')[0].replace("}]</s>", "")
    assert written in whole.replace(', "id": "abcdefghi"}]</s>', "}")
    if name == "mistral_tekken":  # the tools stand before the last message
        with pytest.raises(ValueError, match="rewrites earlier turns"):
            PromptEncoder(plain, ACT, "transcript")
    cut = PromptEncoder(plain, ACT, "transcript", thoughts="cut")
    reply = made.decode(ids)
    first, _, last = [read for read, _ in play(cut, reply, fact.end)]
    for mark in plain.convert_tokens_to_ids(["<tool_call>", "</tool_call>", "[TOOL_CALLS]"]):
        assert last.count(mark) == first.count(mark) + 2 * ids.count(mark)
    texts = [text for _, text in play(made, "go", fact.end)]
    assert "act" in texts[0]
    answered = {"tool_response": "a red box", "ipython": '"a red box"', "RESULTS": "a red box"}
    role = [mark for mark in answered if mark in texts[-1]]
    assert bool(role) == (fact.calls[1] == "tool")
    assert all(answered[mark] in texts[-1] for mark in role)


TRL = importlib.util.find_spec("trl")


@pytest.mark.skipif(TRL is None, reason="trl, which brings genuine templates, is not installed")
@pytest.mark.parametrize("name", sorted(GENUINE["trl"]))
def test_a_template_writes_what_the_genuine_one_does_not(name: str) -> None:
    folder = Path(TRL.submodule_search_locations[0], "chat_templates")
    file = folder / GENUINE["trl"][name]
    if not file.is_file():
        pytest.skip(f"this trl has no {file.name}")
    assert not differs(name, file.read_text(encoding="utf-8"))


def test_the_page_leaves_a_template_out() -> None:
    shown = page()
    assert all(f"| {name} | {HELD.get(name, 'memory')} |" in shown for name in FACTS)


@pytest.mark.parametrize("name", sorted(FACTS))
@pytest.mark.parametrize("thoughts", ["keep", "cut"])
def test_a_recorded_chat_comes_back_as_other_tokens(name: str, thoughts: str) -> None:
    made = encoder(name, thoughts=thoughts)
    chat = ChatTemplate(made.tokenizer, made.end_id)
    said = THOUGHT.removeprefix(made._opened)
    script = Script(made, said)
    script.answer = lambda key, turn: Result(
        key, ids := [*ids_of(said, made), made.end_id], [0.0] * len(ids), None, "stop", 1, 0
    )
    collector = Collector(LocalPool(CoinEnv), made, script, RewardShaping(), 3, 4096, 16)
    played = collector.collect([Episode(coin_task(3), 0, 0)])[0]
    chats = Chats(lambda: chat)
    form = "sft" if thoughts == "keep" else "completion"
    rows = rows_of(form, [episode_record(played, read=made.read)], chats)
    assert chats.lost == 0
    assert thoughts == "keep" or not chats.changed
    first = {"sft": lambda row: 0, "completion": lambda row: len(row["prompt"])}[form]
    whole = [row.get("messages") or [*row["prompt"], *row["completion"]] for row in rows]
    again = [chat.ids(each, first(row)) for each, row in zip(whole, rows, strict=True)]
    assert [ids for ids, _ in again] == played.rows
    learnt = [sum(mask) for _, mask in again]
    assert sum(learnt) == sum(turn.length for turn in played.turns)
