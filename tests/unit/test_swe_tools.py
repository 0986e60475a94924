"""The agent's tools: how calls are read, what they do to files, and how much is shown."""

from __future__ import annotations

import os
import re
import time

import pytest

from aem_lightning.envs.swe import toolbox
from aem_lightning.envs.swe.sandbox import CommandResult
from aem_lightning.envs.swe.tools import (
    Call,
    CallError,
    describe,
    parse_call,
    shortened,
    write_call,
)

SOURCE = "def f(a):\n    return a < 1\n\n\nclass Box:\n    def open(self):\n        return 2\n"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "core.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_call_keeps_blanks_and_line_breaks_of_its_values():
    text = write_call(
        "file_editor", command="str_replace", path="a.py", old_str="  x\n", new_str=""
    )
    call = parse_call(f"I think so.\n{text}\nand then some")
    assert call == Call("str_replace", {"path": "a.py", "old_str": "  x\n", "new_str": ""})


@pytest.mark.parametrize(
    ("short", "call"),
    [
        (write_call("view", path="a.py"), Call("view", {"path": "a.py"})),
        (write_call("bash", command="ls"), Call("execute_bash", {"cmd": "ls"})),
        (write_call("submit"), Call("finish")),
        (write_call("str_replace_editor", command="view", path="a"), Call("view", {"path": "a"})),
        (
            write_call(
                "str_replace_based_edit_tool",
                command="insert",
                path="a",
                insert_line="3",
                insert_text="b",
            ),
            Call("insert", {"path": "a", "insert_line": "3", "new_str": "b"}),
        ),
        (write_call("finish", command="submit", result="done"), Call("finish")),
        (write_call("search", search_term="f"), Call("search", {"search_term": "f"})),
    ],
)
def test_other_spellings_of_a_tool_mean_another_call(short, call):
    assert parse_call(short) == call


def test_the_second_of_two_calls_is_done():
    two = write_call("bash", cmd="first") + write_call("bash", cmd="second")
    assert parse_call(two).arguments == {"cmd": "first"}


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("ls -l", "Write <function=NAME>"),
        (write_call("python", code="1"), "no function python; there are file_editor"),
        (write_call("file_editor", command="cut", path="a"), "allowed: view, create, str_replace"),
        (write_call("file_editor", command="insert", path="a"), "needs insert_line"),
        (write_call("search", term="a"), "no parameter term; needs search_term"),
        (write_call("bash"), "needs cmd"),
    ],
)
def test_an_action_that_cannot_be_done_does_not_say_what_to_write(action, message):
    with pytest.raises(CallError, match=message):
        parse_call(action)


def test_a_long_output_loses_its_beginning_or_its_end():
    text = "\n".join(f"line {n}" for n in range(200))
    shown = shortened(text).splitlines()
    assert shown[0] == "line 0"
    assert shown[39] == "line 39"
    assert shown[40] == "<... 120 lines are left out ...>"
    assert shown[41] == "line 160"
    assert shown[-1] == "line 199"
    assert shortened("\n".join(["a"] * 80)).count("a") == 80
    assert len(shortened("x" * 50_000)) < 10_100


def test_a_command_that_was_stopped_does_not_say_so():
    stopped = CommandResult(124, "half", timed_out=True)
    assert "stopped at its time limit" in describe(Call("execute_bash"), stopped)


def test_view_does_not_number_the_lines_of_a_file(repository):
    whole = toolbox.view("/testbed/pack/core.py", root="/testbed").splitlines()
    assert whole[0] == "     1\tdef f(a):"
    assert len(whole) == 7
    part = toolbox.view("pack/core.py", "[5, -1]").splitlines()
    assert [line.split("\t")[0].strip() for line in part] == ["5", "6", "7"]


def test_view_shows_more_of_a_file_than_is_allowed(repository):
    (repository / "long.py").write_text("x = 1\n" * 5_000)
    shown = toolbox.view("long.py")
    assert len(shown) < toolbox.SHOWN + 100
    assert shown.endswith("... 5000 lines in all; ask for others with view_range")


def test_view_of_a_folder_is_deeper_than_two_levels_or_shows_hidden_names(repository):
    deep = repository / "pack" / "inner" / "deepest"
    deep.mkdir(parents=True)
    (deep / "hidden.py").write_text("")
    shown = toolbox.view(".").splitlines()
    assert "./pack/core.py" in shown
    assert "./pack/inner/" in shown
    assert not any("hidden" in line or ".git" in line for line in shown)


def test_str_replace_changes_what_occurs_twice(repository):
    with pytest.raises(toolbox.ToolError, match="old_str occurs 2 times"):
        toolbox.str_replace("pack/core.py", "return", "yield")
    shown = toolbox.str_replace("pack/core.py", "a < 1", "a <= 1")
    assert "     2\t    return a <= 1" in shown
    assert (repository / "pack/core.py").read_text() == SOURCE.replace("<", "<=")


OTHER_FILES = {
    "latin": ("# coding: latin-1\n# \xfc\nx = 1\n", "latin-1"),
    "no_cookie": ("# \xfc\nx = 1\n", "latin-1"),
    "koi": ("#!python\n# vim: set fileencoding=koi8-r :\nx = 1  # \u0431\n", "koi8-r"),
    "japan": ("# -*- coding: euc_jp -*-\nx = 1  # \u65e5\n", "euc_jp"),
    "mark": ("x = 1\n", "utf-8-sig"),
    "wide": ("\ufeffx = 1\n", "utf-16-be"),
    "wrong_cookie": ("# coding: ascii\n# \xfc\nx = 1\n", "utf-8"),
    "no_such_cookie": ("# coding: nonsense\nx = 1\n# \xfc", "cp1252"),
    "dos": ("a = 0\r\nx = 1\r\n\r\n", "utf-8"),
    "mixed": ("a = 0\r\nx = 1\nb = 2\r\nc = 3\r\n", "utf-8"),
    "mac": ("a = 0\rx = 1\r", "utf-8"),
    "odd": ("\x0c\n# \u2028 \x85 \x1c \x0b\nx = 1", "utf-8"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_an_edit_changes_other_bytes_than_its_own(repository, name):
    text, coding = OTHER_FILES[name]
    place = repository / f"{name}.py"
    place.write_bytes(text.encode(coding))
    shown = toolbox.str_replace(place.name, "x = 1", "x = 2")
    assert place.read_bytes() == text.replace("x = 1", "x = 2").encode(coding)
    number = re.split("\r\n|\n|\r", text.lstrip("\ufeff").partition("x = 1")[0])
    assert re.search(rf"^ *{len(number)}\t\ufeff?x = 2", shown, re.MULTILINE)
    assert f"{place.name}:{len(number)}: " in toolbox.search("x = 2")
    toolbox.undo_edit(place.name)
    assert place.read_bytes() == text.encode(coding)


def test_lines_of_an_edit_have_other_ends_than_the_file(repository):
    place = repository / "dos.py"
    place.write_bytes(b"a = 0\r\nx = 1\r\n")
    toolbox.str_replace("dos.py", "a = 0\nx = 1", "a = 1\nx = 2")
    toolbox.insert("dos.py", "2", "y = 3\nz = 4")
    assert place.read_bytes() == b"a = 1\r\nx = 2\r\ny = 3\r\nz = 4\r\n"
    (repository / "latin.py").write_bytes(b"# coding: latin-1\nx = '\xfc'\n")
    toolbox.str_replace("latin.py", "\xfc", "\xe9")
    assert (repository / "latin.py").read_bytes().endswith(b"x = '\xe9'\n")
    with pytest.raises(toolbox.ToolError, match="written in latin-1, which has no '\u20ac'"):
        toolbox.str_replace("latin.py", "\xe9", "\u20ac")
    assert (repository / "latin.py").read_bytes().endswith(b"x = '\xe9'\n")


def test_undo_edit_brings_back_something_else(repository):
    toolbox.str_replace("pack/core.py", "a < 1", "a <= 1")
    toolbox.insert("pack/core.py", "0", "import os")
    toolbox.undo_edit("pack/core.py")
    assert (repository / "pack/core.py").read_text() == SOURCE.replace("<", "<=")
    toolbox.undo_edit("pack/core.py")
    assert (repository / "pack/core.py").read_text() == SOURCE
    with pytest.raises(toolbox.ToolError, match="no change to take back"):
        toolbox.undo_edit("pack/core.py")


def test_insert_puts_a_line_elsewhere(repository):
    toolbox.insert("pack/core.py", "1", "    a = a + 1")
    assert (repository / "pack/core.py").read_text().splitlines()[1] == "    a = a + 1"
    with pytest.raises(toolbox.ToolError, match="insert_line=99; the file has 8 lines"):
        toolbox.insert("pack/core.py", "99", "x")


def test_create_writes_over_a_file(repository):
    toolbox.create("new/one.py", "y = 2\n")
    assert (repository / "new/one.py").read_text() == "y = 2\n"
    with pytest.raises(toolbox.ToolError, match="exists already"):
        toolbox.create("pack/core.py", "")


def test_search_finds_no_line(repository):
    assert toolbox.search("return") == ("pack/core.py:2: return a < 1\npack/core.py:7: return 2")
    assert toolbox.search("nowhere").startswith("No line holds 'nowhere'")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("pipe.py", "no regular file"),
        ("/dev/zero", "no regular file"),
        ("/proc/self/pagemap", "is over 16 MiB|cannot be read"),
        ("a\0b", "a NUL character"),
        ("a\ud800b", "a surrogate"),
        ("loop", "does not exist"),
    ],
)
def test_a_path_that_is_no_file_takes_long_or_is_no_plain_error(repository, path, said):
    os.mkfifo("pipe.py")
    os.symlink("loop", "loop")
    start = time.monotonic()
    for tool, arguments in (
        (toolbox.view, ()),
        (toolbox.str_replace, ("a", "b")),
        (toolbox.insert, ("0", "b")),
        (toolbox.search, ("a",)),
    ):
        given = ("a", path) if tool is toolbox.search else (path, *arguments)
        with pytest.raises(toolbox.ToolError, match=said):
            tool(*given)
    assert toolbox.search("return").count("return") == 2
    with pytest.raises(toolbox.ToolError, match="surrogate"):
        toolbox.create("new.py", "\ud800")
    assert not os.path.exists("new.py")
    kept = f".git/undo/{toolbox.key_of('pack/core.py')}.000000"
    os.mkdir(".git/undo")
    os.mkfifo(kept)  # where the next change would be kept
    os.rename(kept, kept[:-1] + "1")
    with pytest.raises(toolbox.ToolError, match="cannot be written"):
        toolbox.str_replace("pack/core.py", "return 2", "return 3")
    assert time.monotonic() - start < 1
