"""Episodes that leave a run as data sets of chats, and come back as demonstrations."""

import json
from dataclasses import replace

import datasets
import pytest
import torch
from coin import CoinEnv
from local_coin import LocalCoin
from test_warm_start import LIMITS, SETTINGS, TRAINER
from tiny_play import PLAIN, SMALL, LocalPool, Script, byte_tokenizer, coin_task
from torch.utils.tensorboard import SummaryWriter

from aem_lightning.callbacks.transcripts import append_json_line, episode_record
from aem_lightning.export.__main__ import main
from aem_lightning.export.curves import MIXED, NAMES
from aem_lightning.modules import Policy, build_tiny_model
from aem_lightning.modules.warm_start import RESPONSE
from aem_lightning.rollout import Collector, Episode, PromptEncoder, RewardShaping
from aem_lightning.runner.demonstrations import fingerprint, read_demonstrations
from aem_lightning.runner.early import demonstration_files
from aem_lightning.runner.warm_start import run_warm_start

WON = ("open red box", "open blue box", "open white box")
LOST = ("open red box", "open green box")


def encoder_of(memory="transcript"):
    return PromptEncoder(byte_tokenizer(), replace(PLAIN, system="find the coin"), memory)


def make_run(folder, memory="transcript", plays=(WON, LOST), encoder=None):
    """A run's folder with copies of one task; the episodes in it."""
    encoder = encoder or encoder_of(memory)
    played = []
    for copy, lines in enumerate(plays):
        collector = Collector(
            LocalPool(CoinEnv), encoder, Script(encoder, *lines), RewardShaping(), 4, 4096, 16
        )
        played += collector.collect([Episode(coin_task(3), 0, copy)])
        record = episode_record(played[-1], read=encoder.read)
        append_json_line(folder / "transcripts.jsonl", {"stage": "train", "iteration": 0, **record})
    encoder.tokenizer.save_pretrained(str(folder / "adapter"))
    return played


def export(folder, form, *words):
    main([str(folder), "--form", form, "--out", str(folder / form), *words])
    return datasets.load_from_disk(str(folder / form))


@pytest.mark.parametrize("memory", ["window", "transcript"])
def test_exported_games_warm_start_on_the_ids_that_were_sampled(tmp_path, memory):
    played = make_run(tmp_path, memory)
    assert [trajectory.won for trajectory in played] == [True, False]
    rows = export(tmp_path, "sft", "--outcome", "won")
    assert [m["role"] for m in rows[0]["messages"]][:3] == ["system", "user", "assistant"]
    read = read_demonstrations(str(tmp_path / "sft"), encoder_of(memory), 4096)
    assert read["input_ids"] == played[0].rows
    for turn in played[0].turns:
        said = slice(turn.start, turn.start + turn.length)
        assert read["kind"][turn.row][said] == [RESPONSE] * turn.length
    assert sum(kind.count(RESPONSE) for kind in read["kind"]) == played[0].response_tokens


def test_a_pair_is_where_copies_part_and_prefers_what_led_to_more(tmp_path, capsys):
    make_run(tmp_path)
    (pair,) = export(tmp_path, "preference")
    assert [message["content"] for message in pair["prompt"]][-2:] == [WON[0], "The box is empty ."]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == (WON[1], LOST[1])
    assert pair["chosen_return"] > pair["rejected_return"]
    assert "1 rows of 2 episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("form", "words", "told"),
    [
        ("preference", [], "callbacks.transcripts.every=1"),
        ("sft", ["--min-return", "99"], "--min-return 99.0: the best of 1 earned"),
        ("sft", ["--outcome", "lost"], "None of 1 episodes is wanted"),
        ("rl-doctor", [], "no TensorBoard files"),
    ],
)
def test_what_cannot_be_exported_is_told(tmp_path, form, words, told):
    make_run(tmp_path, plays=(WON,))
    with pytest.raises(SystemExit, match=told):
        export(tmp_path, form, *words)
    assert not (tmp_path / form).exists()


def test_verifiers_reads_what_it_is_given(tmp_path):
    saved = pytest.importorskip("verifiers.utils.save_utils")
    make_run(tmp_path)
    main([str(tmp_path), "--form", "verifiers", "--out", str(tmp_path / "results")])
    won, lost = saved.load_outputs(tmp_path / "results")
    assert [m["content"] for m in won["completion"] if m["role"] == "assistant"] == [*WON]
    assert won["reward"] > lost["reward"]
    assert won["example_id"] == lost["example_id"]


def test_rl_doctor_reads_the_curves_of_a_run(tmp_path):
    doctor = pytest.importorskip("rl_doctor")
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(40):
            for name in (*NAMES.values(), MIXED):
                writer.add_scalar(name, 0.05 if name == MIXED else 1.0 + step, step)
    main([str(tmp_path), "--form", "rl-doctor", "--out", str(tmp_path / "run.jsonl")])
    run = doctor.load_run(str(tmp_path / "run.jsonl"))
    assert not run.unmapped_keys
    assert {"reward_mean", "eval_score", "kl", "response_len_mean"} <= set(run.series)
    assert "Zero-variance groups (wasted rollouts)" in [
        found.title for found in doctor.diagnose(run).problems
    ]


def chats(*conversations):
    return "".join(json.dumps({"messages": each}) + "\n" for each in conversations)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def test_recorded_chats_take_the_place_of_expert_play(tmp_path):
    file = tmp_path / "games.jsonl"
    parts = [{"type": "text", "text": "A coin glints near the red box ."}]
    game = [user(parts), said("open red box")]
    file.write_text(chats(game, [*game[:1], said(" ".join(WON * 40))]))
    data = LocalCoin()
    data.make_expert = lambda *_: pytest.fail("an expert played")
    tokenizer = byte_tokenizer()
    base = Policy(build_tiny_model(tokenizer, SMALL, 0), tokenizer)
    settings = replace(SETTINGS, demonstrations_from=str(file))
    places = {"folder": tmp_path / "model", "trainer": TRAINER}
    options = {"rewards": RewardShaping(), "limits": LIMITS, **places}
    encoder = PromptEncoder(base.tokenizer, PLAIN, "transcript")
    done = run_warm_start(base, data, encoder, settings, **options)
    assert done.report["demonstrations"] == 1  # the other is too long
    before = fingerprint(str(file))
    file.write_text(chats(game))
    assert fingerprint(str(file)) != before


def test_chats_of_other_makes_are_the_same_rows(tmp_path):
    game = [("human", "user", "A coin glints near the red box ."), ("gpt", "assistant", "open it")]
    made = {
        "messages": [{"role": role, "content": text} for _, role, text in game],
        "conversations": [{"from": sender, "value": text} for sender, _, text in game],
    }
    rows = [{name: chat} for name, chat in made.items()]
    rows += [{"prompt": made["messages"][:1], "completion": made["messages"][1:]}]
    rows += [{"prompt": game[0][2], "completion": game[1][2]}]
    read = []
    for number, row in enumerate(rows):
        file = tmp_path / f"{number}.parquet"
        datasets.Dataset.from_list([row]).to_parquet(file)
        read.append(read_demonstrations(str(file), encoder_of(), 96)[0])
    assert all(each == read[0] for each in read)
    assert RESPONSE in read[0]["kind"]


def test_replies_that_a_template_has_changed_are_not_trained_as_said(tmp_path):
    encoder = PromptEncoder(byte_tokenizer(), PLAIN, "transcript", thoughts="cut")
    lines = [f"<think>so</think>{action}" for action in WON]
    make_run(tmp_path, encoder=encoder, plays=(lines,))
    with pytest.raises(SystemExit, match="Type --form completion"):
        export(tmp_path, "sft")
    rows = export(tmp_path, "completion")
    assert [row["completion"][0]["content"] for row in rows] == lines
    assert [message["content"] for message in rows[2]["prompt"][1::2]] == [*WON[:2]]


def test_messages_that_an_endpoint_was_sent_need_no_tokenizer(tmp_path):
    played = make_run(tmp_path, plays=(WON,))
    chat = []
    for turn in played[0].turns:
        chat.append(user(turn.observation))
        turn.messages = [*chat]
        chat.append(said(turn.response))
    (tmp_path / "api").mkdir()
    append_json_line(tmp_path / "api" / "transcripts.jsonl", episode_record(played[0]))
    assert export(tmp_path / "api", "sft")[0]["messages"] == chat


def test_calls_in_messages_are_lost_or_written_twice(tmp_path):
    (played,) = make_run(tmp_path, plays=(WON,))
    function = {"name": "add", "arguments": {"a": "Ä"}}
    call = '<tool_call>\n{"name": "add", "arguments": {"a": "Ä"}}\n</tool_call>'
    for turn, content in zip(played.turns, ("", "I add.", f"So: {call}"), strict=True):
        calls = [{"type": "function", "function": function}]
        turn.messages = [user("a"), said(content) | {"tool_calls": calls}, user("b")]
    (tmp_path / "api").mkdir()
    append_json_line(tmp_path / "api" / "transcripts.jsonl", episode_record(played))
    rows = export(tmp_path / "api", "completion")
    told = [row["prompt"][1]["content"] for row in rows]
    assert told == [call, f"I add.\n{call}", f"So: {call}"]


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (chats([user("a"), user("b")]), "row 1: there is no assistant message in it"),
        (chats([said("a")]), "row 1: message 0 is an assistant's, and answers nothing"),
        (chats([{"role": "human", "content": "a"}]), "role one of system, user, assistant, tool"),
        (chats([user("a"), said("b") | {"tool_calls": [{}]}]), "write the calls of tools into"),
        ('{"text": "a"}\n', "its columns are text. Allowed: messages"),
        (chats([user("a " * 900), said("b")]), r"at most max_context=96 tokens. Type max_context="),
    ],
)
def test_demonstrations_that_cannot_be_learnt_are_told_with_their_row(tmp_path, written, told):
    (tmp_path / "games.jsonl").write_text(written)
    with pytest.raises(ValueError, match=told):
        read_demonstrations(str(tmp_path), encoder_of(), 96)


def test_demonstrations_that_are_not_there_are_told_before_anything_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"demonstrations_from=.*save_to_disk"):
        demonstration_files(str(tmp_path))


@pytest.mark.parametrize("form", ["sft", "completion", "preference"])
def test_trl_trains_on_what_is_exported(tmp_path, form):
    trl = pytest.importorskip("trl")
    make_run(tmp_path)
    rows = export(tmp_path, form)
    tokenizer = byte_tokenizer()
    kind = "DPO" if form == "preference" else "SFT"
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to=[], bf16=False
    )
    model = build_tiny_model(tokenizer, SMALL, 0)
    if kind == "DPO":  # which loads its reference from where the model came from
        model.save_pretrained(tmp_path / "model")
        model = type(model).from_pretrained(tmp_path / "model")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, args=settings, train_dataset=rows, processing_class=tokenizer
    )
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
