"""The episode viewer: what it lists, what it shows, and that no episode can act through it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from runs import COMMAND_ENVIRONMENT, process

from aem_lightning.callbacks.transcripts import (
    append_json_line,
    episode_markdown,
    episode_record,
    recorded_episode,
)
from aem_lightning.types import Task, Trajectory, Turn
from aem_lightning.viewer import Wish, chosen, episode_view, list_view, page, read_episodes
from aem_lightning.viewer.__main__ import main
from aem_lightning.viewer.episodes import prompts

HOSTILE = "[red]x[/red] </script><b>bold</b> <!-- \x1b[2J\ud83d \u2028"


def turn(action: str | None = "look", valid: bool = True, **changes: Any) -> Turn:
    made = Turn("a room", ("look",), f"I {action}", action, 0, 0, [-1.0] * 3, [0.5, 1.0, 0.75])
    made.is_valid = valid
    for name, value in changes.items():
        setattr(made, name, value)
    return made


NO_TOOL = turn(None, malformed="unknown tool 'fly'")


def episode(number: int, kind: str, *turns: Turn, **outcome: Any) -> dict[str, Any]:
    """A record with the advantage -0.25 and α 1.5 in its first turn."""
    trajectory = Trajectory(Task(f"game-{number}", kind, "train"), 0, number, turns=list(turns))
    for name, value in outcome.items():
        setattr(trajectory, name, value)
    scores = {(number, 0): (0.125, -0.25, 1.5)}
    return {"stage": "train", "iteration": number, **episode_record(trajectory, number, scores)}


def read(ids: Any) -> str:
    """Ids as a model of one-letter words reads them; 7 is a letter outside the first plane."""
    return "".join("\U0001f600" if i == 7 else chr(97 + i) for i in ids)


def with_prompts(kind: str = "pick") -> dict[str, Any]:
    """A transcript of two turns whose row is kept, then one of a window."""
    rows = [[7, 1, 2, 20, 3, 4, 21], [7, 5, 4]]
    turns = [turn(), turn(), turn()]
    for each, (row, start) in zip(turns, ((0, 3), (0, 6), (1, 2)), strict=True):
        each.row, each.start, each.logprobs = row, start, [-1.0]
    task = Task("game", kind, "train")
    return {"stage": "evaluate", **episode_record(Trajectory(task, 0, 0, turns, rows), read=read)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "transcripts.jsonl"
    for record in (
        episode(0, "pick", turn(), turn("open", reward=10.0), won=True),
        episode(1, "pick", turn("fly", valid=False), NO_TOOL, truncated=True),
        episode(2, "heat", turn(), infra_error="the worker died"),
        {**episode(3, "heat", turn(finish_reason="length")), "stage": "evaluate"},
    ):
        append_json_line(path, record)
    with path.open("a") as half:
        half.write('{"task": "of a run that was kil')
    return path


def printed(view: RenderableType) -> str:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(view: RenderableType) -> list[list[str]]:
    return [line.split() for line in printed(view).splitlines()]


def test_a_list_says_how_each_episode_ended(file: Path) -> None:
    shown = lines(list_view(chosen(read_episodes(file), Wish())))
    assert shown[1:5] == [
        ["1", "train", "0", "pick", "won", "10", "2", "0", "0.438"],
        ["2", "train", "1", "pick", "lost,", "cut", "0", "2", "2", "0.438"],
        ["3", "train", "2", "heat", "broken", "0", "1", "0", "0.125"],
        ["4", "evaluate", "3", "heat", "lost", "0", "1", "0", "0.125"],
    ]
    assert shown[5] == ["4", "episodes", "won", "1/3", "heat", "0/1", "pick", "1/2"]


def test_a_list_fits_a_terminal_of_eighty(file: Path) -> None:
    record = episode(0, "pick_two_obj_and_place", turn(), truncated=True)
    console = Console(width=80, file=io.StringIO())
    console.print(list_view({1200: {**record, "stage": "validate", "iteration": 149}}))
    assert isinstance(console.file, io.StringIO)
    rows = console.file.getvalue().splitlines()
    assert "validate 149  pick_two_obj" in rows[1]
    assert "lost, cut" in rows[1]
    assert rows[1].endswith("0.125")
    assert "1 episodes" in rows[2], "a row is one line"


@pytest.mark.parametrize(
    ("wish", "numbers"),
    [
        (Wish(), [1, 2, 3, 4]),
        (Wish(outcome="won"), [1]),
        (Wish(outcome="lost"), [2, 4]),
        (Wish(outcome="broken"), [3]),
        (Wish(task_type="ea"), [3, 4]),
        (Wish(stage="train", iteration=1), [2]),
        (Wish(outcome="lost", task_type="heat"), [4]),
    ],
)
def test_a_wish_keeps_the_numbers_of_the_file(file: Path, wish: Wish, numbers: list[int]) -> None:
    assert list(chosen(read_episodes(file), wish)) == numbers


def test_a_wish_for_nothing_there_says_what_there_is(file: Path) -> None:
    with pytest.raises(ValueError, match="None of 4 episodes is wanted") as caught:
        chosen(read_episodes(file), Wish(task_type="fly"))
    assert "--outcome: broken, lost, won" in str(caught.value)
    assert "--type: heat, pick" in str(caught.value)
    assert "--iteration: 0, 1, 2, 3" in str(caught.value)


def test_an_episode_shows_each_turn_with_what_was_recorded(file: Path) -> None:
    records = read_episodes(file)
    text = printed(episode_view(2, records[1]))
    assert "lost, cut  return 0, 2 turns" in text
    assert "pick · train · train 1" in text
    assert "turn 0  reward 0  entropy 0.125  α 1.5  A -0.25  3 tokens" in text
    assert "turn 1  reward 0  entropy 0.75  3 tokens" in text, "nothing is made up for turn 1"
    assert "▸ fly  (not admissible)" in text
    assert "▸ no action in it  (malformed: unknown tool 'fly')" in text
    written = episode_markdown(records[1])
    assert "action fly (not admissible)" in written
    assert "no action found: malformed, unknown tool 'fly'" in written
    assert recorded_episode(records[1]).turns[1].malformed == "unknown tool 'fly'"
    assert "the worker died" in printed(episode_view(3, records[2]))
    assert "3 tokens, cut" in printed(episode_view(4, records[3]))


def test_prompts_come_back_whole_and_are_shown_where_they_are_asked_for() -> None:
    record = with_prompts()
    whole = [(prompt["text"], prompt["ids"]) for prompt in prompts(record) if prompt]
    expected = [[7, 1, 2], [7, 1, 2, 20, 3, 4], [7, 5]]
    assert whole == [(read(ids), ids) for ids in expected]
    assert record["turns"][1]["prompt"]["ids"] == {"head": 3, "new": [20, 3, 4], "tail": 0}
    assert [each["ids"] for each in record["turns"]] == [[20], [21], [4]]
    folded, unfolded = (printed(episode_view(1, record, unfolded=u)) for u in (False, True))
    assert "prompt: 6 tokens (--prompts shows it)" in folded
    assert read(expected[1]) in unfolded
    assert read(expected[1]) not in folded


def test_messages_are_shown_with_their_roles() -> None:
    said = [{"role": "user", "content": "[red]hello[/red]\x1b"}]
    record = episode(0, "pick", turn(messages=said), turn(messages=[*said, *said]), turn())
    assert [p and len(p["messages"]) for p in prompts(record)] == [1, 2, None]
    text = printed(episode_view(1, record, unfolded=True))
    assert text.count("user: [red]hello[/red]·") == 3
    assert "prompt: 2 messages" in text


def hostile(path: Path) -> Mapping[int, Any]:
    bad = turn(observation=HOSTILE, response=HOSTILE, action=HOSTILE)
    append_json_line(path, episode(0, HOSTILE, bad, infra_error=HOSTILE))
    return dict(enumerate(read_episodes(path), 1))


def test_no_text_of_an_episode_steers_the_terminal(tmp_path: Path) -> None:
    episodes = hostile(tmp_path / "hostile.jsonl")
    for view in (list_view(episodes), episode_view(1, episodes[1])):
        text = printed(view)
        text.encode()
        assert "\x1b" not in text
        assert "[red]x[/red]" in text


def test_no_text_of_an_episode_leaves_the_data_of_the_page(tmp_path: Path) -> None:
    text = page(hostile(tmp_path / "hostile.jsonl"), "</script>")
    text.encode()
    assert text.count("</script>") == 1
    data = json.loads(re.findall(r"const DATA = (.*);\n", text)[0])
    assert data["title"] == "</script>"
    assert data["episodes"][0]["number"] == 1
    assert data["episodes"][0]["turns"][0]["response"] == HOSTILE.replace("\ud83d", "?")


def test_a_page_loads_nothing(file: Path) -> None:
    text = page(chosen(read_episodes(file), Wish()), "t")
    assert set(re.findall(r"\w+://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|<img|<iframe|src=|@import|url\(|innerHTML", text)


def dumped(address: str, folder: Path) -> str:
    """What a browser makes of a page, without its scripts."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    done = subprocess.run(
        ["chromium", *options, f"--user-data-dir={folder / 'browser'}", address],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.partition("<script>")[0]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser here")
def test_a_browser_lists_the_episodes_and_shows_the_one_of_the_address(
    file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "page.html"
    episodes = chosen(read_episodes(file), Wish())
    target.write_text(page({**episodes, **{9: hostile(tmp_path / "h.jsonl")[1]}}, "runs & more"))
    dom = dumped(f"{target.as_uri()}#9", tmp_path)
    assert dom.count("<button") == 5
    assert "5 episodes, 1 of 3 won (33.3 %)" in dom
    assert "<h1>runs &amp; more</h1>" in dom
    main_part = dom.partition("<main>")[2]
    assert "episode 9 · return 0 · 1 turns" in main_part
    assert main_part.count("&lt;b&gt;bold&lt;/b&gt;") == 5, "type, error and the turn's three texts"
    assert "<b>bold</b>" not in dom
    assert "entropy of each response" in main_part


@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser here")
def test_a_browser_makes_prompts_whole_and_escapes_them(tmp_path: Path) -> None:
    record, target = with_prompts(), tmp_path / "page.html"
    record["turns"].append(
        episode(0, "x", turn(messages=[{"role": "user", "content": HOSTILE}]))["turns"][0]
    )
    unfold = (
        "<script>document.querySelectorAll('details').forEach((d) => { d.open = true; });</script>"
    )
    target.write_text(page({1: record}, "t") + unfold)
    main_part = dumped(target.as_uri(), tmp_path).partition("<main>")[2]
    assert "prompt: 6 tokens, 3 of them new" in main_part
    assert f'<span class="soft">{read([7, 1, 2])}</span>{read([20, 3, 4])}' in main_part
    assert "prompt 7 1 2 20 3 4\n\nresponse 21" in main_part
    assert "prompt: 1 messages" in main_part
    assert "&lt;b&gt;bold&lt;/b&gt;" in main_part
    assert "<b>bold</b>" not in main_part


def test_the_command_lists_shows_and_writes(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(file.parent), "--outcome", "won"])
    assert "1 episodes" in capsys.readouterr().out
    main([str(file), "--episode", "2"])
    assert "turn 1" in capsys.readouterr().out
    target = tmp_path / "page.html"
    main([str(file), "--type", "heat", "--html", str(target)])
    assert f"written: {target}" in capsys.readouterr().out
    assert [
        e["number"]
        for e in json.loads(target.read_text().split("DATA = ")[1].split(";\n")[0])["episodes"]
    ] == [3, 4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: there is no such file. Training writes logs/"),
        (["{file}", "--episode", "5"], "--episode 5: allowed is 1 to 4"),
        (["{file}", "--stage", "x"], "--stage: evaluate, train"),
        (["{empty}"], "no episode is in it yet"),
        (["{other}"], "other.jsonl:2: no episode: each line is a JSON object with task, "),
        (["{file}", "--html", "{file}/x"], "Not a directory"),
    ],
)
def test_the_command_says_what_is_wrong(
    file: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    empty, other = tmp_path / "empty.jsonl", tmp_path / "other.jsonl"
    empty.write_text("")
    other.write_text(file.read_text().splitlines()[0] + '\n{"a": 1}\n')
    with pytest.raises(SystemExit) as caught:
        main([word.format(file=file, empty=empty, other=other) for word in words])
    assert said in str(caught.value.code)


def test_a_reader_that_has_seen_enough_is_no_error(file: Path) -> None:
    for number in range(2000):
        append_json_line(file, episode(number, "pick", turn()))
    viewer = f"{sys.executable} -m aem_lightning.viewer {file}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {viewer} | head -1"],
        env=COMMAND_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_viewer_starts_without_torch() -> None:
    script = (
        "import sys, aem_lightning.viewer.__main__\n"
        "print({'torch', 'lightning', 'transformers', 'hydra'} & set(sys.modules))"
    )
    done = process("-c", script)
    assert done.stdout.strip() == "set()", done.stderr
