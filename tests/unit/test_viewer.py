"""The episode viewer: what it lists, what it shows, and that no episode can act through it."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
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
from aem_lightning.card import ORIGIN, RunCard
from aem_lightning.types import Task, Trajectory, Turn
from aem_lightning.viewer import Wish, chosen, episode_view, list_view, page, read_episodes
from aem_lightning.viewer.__main__ import main
from aem_lightning.viewer.episodes import Part, groups, parting, prompts, read_part
from aem_lightning.viewer.serve import server

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


def data_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(re.findall('id="data">(.*)</script>\n', text)[0])
    return found


def test_no_text_of_an_episode_leaves_the_data_of_the_page(tmp_path: Path) -> None:
    text = page(hostile(tmp_path / "hostile.jsonl"), "</script>")
    text.encode()
    assert text.count("</script>") == 2, "of the data, and of the code"
    data = data_of(text)
    assert data["title"] == "</script>"
    assert data["episodes"][0]["number"] == 1
    assert data["episodes"][0]["turns"][0]["response"] == HOSTILE.replace("\ud83d", "?")


def test_a_page_loads_nothing(file: Path) -> None:
    text = page(chosen(read_episodes(file), Wish()), "t")
    assert set(re.findall(r"\w+://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|<img|<iframe|src=|@import|url\(|innerHTML", text)


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), "")
needs_browser = pytest.mark.skipif(not BROWSER, reason=f"no browser here: {BROWSERS}")


def dumped(address: str, folder: Path, wait: str = "--virtual-time-budget=5000") -> str:
    """What a browser makes of a page, without its data and scripts."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--disable-gcm", wait]
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={folder / 'browser'}", address],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout, done.stderr
    return done.stdout.partition("<script")[0]


@needs_browser
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
    main_part = dom.partition('<div id="episode">')[2]
    assert "episode 9 · return 0 · 1 turns" in main_part
    assert main_part.count("&lt;b&gt;bold&lt;/b&gt;") == 5, "type, error and the turn's three texts"
    assert "<b>bold</b>" not in dom
    assert "entropy of each response" in main_part


def group(size: int, turns: int, at: int, iteration: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Records of copies that do the same up to turn ``at``, in other words from turn 1 on."""

    def played(copy: int, i: int) -> Turn:
        response = f"{copy if i else 'all'} {'word ' * 30}"
        return turn(f"go {copy if i >= at else 0}", response=response, observation="a room " * 40)

    task = Task(f"game-{iteration}", "pick", "train")
    made = (
        Trajectory(task, 0, copy, turns=[played(copy, i) for i in range(turns)])
        for copy in range(size)
    )
    return [{"stage": "train", "iteration": iteration, **more, **episode_record(t)} for t in made]


@needs_browser
def test_ten_thousand_turns_open_in_two_seconds_copies_side_by_side(
    tmp_path: Path,
) -> None:
    records = [record for number in range(25) for record in group(8, 50, 3, number)]
    assert sum(len(record["turns"]) for record in records) == 10_000
    target = tmp_path / "page.html"
    target.write_text(page(dict(enumerate(records, 1)), "t", RunCard("a", command="python <b>")))
    took = []
    for _ in range(5):  # a busy machine
        dom = dumped(f"{target.as_uri()}#19", tmp_path, "--force-device-scale-factor=1")
        took += [int(found) for found in re.findall('data-ready="([0-9]+)"', dom)]
        if took and took[-1] < 2000:
            break
    assert took, "the page never got ready"
    assert took[-1] < 2000, took
    assert "200 episodes, 0 of 200 won" in dom
    assert dom.count("<button") < 70, "those of the list that can be seen, and some more"
    assert "8 copies part at turn 3, their words at turn 1" in dom
    before, _, after = dom.partition('<div class="part">part at turn 3</div>')
    assert before.count("<article") == 8 * 3, "columns: turns 0 to 2 of each copy"
    assert after.startswith('<article data-turn="3" class="differs">')
    assert after.count("<article") == 8 * 27, "then what is near the screen"
    assert "<dd>python &lt;b&gt;</dd>" in dom


@needs_browser
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
    assert [each["number"] for each in data_of(target.read_text())["episodes"]] == [3, 4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: there is no such file. Training writes logs/"),
        (["{file}", "--episode", "5"], "--episode 5: allowed is 1 to 4"),
        (["{file}", "--stage", "x"], "--stage: evaluate, train"),
        (["{empty}"], "no episode is in it yet"),
        (["{other}"], "other.jsonl:2: no episode: each line is a JSON object with task, "),
        (["{file}", "--html", "{file}/x"], "Not a directory"),
        (["{file}", "--group"], "no two episodes are copies of one group"),
        (["{file}", "--serve", "--group"], "are chosen in the page"),
        (["nowhere", "--serve"], "nowhere: there is no such folder"),
        (["{file}", "--serve", "--port", "70000"], "--port 70000 cannot be had"),
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


def test_groups_and_where_their_copies_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again, other = group(2, 4, 4), group(3, 4, 2, 1)
    shorter = {**other[0], "iteration": 2, "turns": other[0]["turns"][:1]}
    longer = {**other[1], "iteration": 2, "turns": other[0]["turns"]}
    path = tmp_path / "transcripts.jsonl"
    for record in (*group(2, 4, 3), *again, *other, shorter, longer, group(1, 1, 1, 3)[0]):
        append_json_line(path, record)
    found = groups(dict(enumerate(read_episodes(path), 1)))
    assert [[*each] for each in found] == [[1, 2], [3, 4], [5, 6, 7], [8, 9], [10]]
    assert [parting(each.values()) for each in found] == [3, None, 2, 1, None]
    main([str(path), "--group"])
    said = capsys.readouterr().out
    assert re.search("1 2 .*0/2 +part at turn 3, their words at turn 1", said)
    assert re.search("3 4 .* the same throughout, their words at turn 1", said)
    assert " 10 " not in said
    main([str(path), "--group", "--episode", "6"])
    said = capsys.readouterr().out
    assert "3 copies: part at turn 2" in said
    assert re.search("▸ 2 +go 0 +go 1 +go 2", said)
    with pytest.raises(SystemExit, match=r"no other copy of its group.*transcripts.every=1"):
        main([str(path), "--group", "--episode", "10"])


def test_a_live_file_is_read_line_by_line_and_a_shorter_one_from_its_beginning(
    tmp_path: Path,
) -> None:
    path, records = tmp_path / "transcripts.jsonl", group(3, 2, 1)
    assert read_part(path, 0, 0) == Part()
    append_json_line(path, records[0])
    size = path.stat().st_size
    with path.open("a") as file:
        file.write(json.dumps(records[1])[:50])
    first = read_part(path, 0, 0)
    assert (list(first.episodes), first.offset, first.more) == ([1], size, True)
    assert read_part(path, first.offset, 1) == Part({}, 1, size, False)
    append_json_line(path, records[1])  # of a resumed run: the half line goes
    with path.open("a") as file:
        file.write('{"no": "episode"}\n')
    append_json_line(path, records[2])
    second = read_part(path, first.offset, 1, limit=1)
    assert (list(second.episodes), second.more) == ([2], True)
    third = read_part(path, second.offset, second.number)
    assert (dict(third.episodes), third.unreadable, third.more) == ({3: records[2]}, 1, False)
    path.write_text("")
    append_json_line(path, records[2])
    anew = read_part(path, third.offset, third.number)
    assert (anew.reset, dict(anew.episodes)) == (True, {1: records[2]})


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder that a server follows, and the server's address."""
    with server(tmp_path, 0, Wish(stage="train")) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def asked(address: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        return json.loads(answer.read())


def test_the_server_tells_what_a_run_appends_to_this_machine_alone(
    served: tuple[Path, str],
) -> None:
    folder, address = served
    (folder / ORIGIN).write_text('{"command": "python train.py </script>"}')
    before = asked(f"{address}/episodes?offset=0&number=0")
    assert (before["episodes"], before["offset"]) == ([], 0)
    assert before["card"]["lines"] == [["command", "python train.py </script>"]]
    records = hostile(folder / "transcripts.jsonl")
    append_json_line(folder / "transcripts.jsonl", {**records[1], "stage": "evaluate"})
    after = asked(f"{address}/episodes?offset={before['offset']}&number={before['number']}")
    assert [each["number"] for each in after["episodes"]] == [1], "the other is not wished for"
    assert (after["number"], after["offset"]) == (2, (folder / "transcripts.jsonl").stat().st_size)
    for path, headers, status in (
        ("/episodes?offset=-1", {}, 400),
        ("/../transcripts.jsonl", {}, 404),
        ("/", {"Host": "elsewhere.example:80"}, 403),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            asked(address + path, **headers)
        assert caught.value.code == status


@needs_browser
def test_a_browser_follows_a_live_run(served: tuple[Path, str]) -> None:
    folder, address = served
    file = folder / "transcripts.jsonl"
    for record in group(2, 2, 1):
        append_json_line(file, record)
    hostile(file)
    with file.open("a") as appended:
        appended.write('{"half')
    dom = dumped(address, folder)
    assert "3 episodes, 0 of 2 won" in dom
    assert "episode 3 · " in dom.partition('<div id="episode">')[2], (
        "the newest, until one is chosen"
    )
    assert "<b>bold</b>" not in dom


def test_a_served_run_ends_quietly(tmp_path: Path) -> None:
    words = ["-u", "-m", "aem_lightning.viewer", str(tmp_path), "--serve", "--port=0"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background ignores Ctrl-C, and so would what is started from it.
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen([sys.executable, *words], env=COMMAND_ENVIRONMENT, **pipes)
    try:
        port = running.stdout.readline().split()[0].rpartition(":")[2]
        with pytest.raises(SystemExit, match=f"--port {port} is taken: type another"):
            main([str(tmp_path), "--serve", "--port", port])
    finally:
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=30)
    assert (running.returncode, said) == (0, "")


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
