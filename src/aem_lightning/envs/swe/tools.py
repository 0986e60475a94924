"""The tools of an agent, as R2E-Gym and DeepSWE write them: calls in XML, results as text.

.. code-block:: text

    <function=file_editor>
    <parameter=command>view</parameter>
    <parameter=path>/testbed/setup.py</parameter>
    </function>
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files

from aem_lightning.envs.swe.sandbox import WORKDIR, CommandResult, Session
from aem_lightning.types import Tool, function_tool

TOOLBOX = files("aem_lightning.envs.swe").joinpath("toolbox.py").read_text(encoding="utf-8")
# Isolated from what the agent leaves in the working folder, and quick to start.
TOOLBOX_COMMAND = f"python3 -I -S -c {shlex.quote(TOOLBOX)}"
TOOL_WALL_S = 30.0
KEPT_LINES = 40  # of a command's output, from either end
KEPT_CHARACTERS = 5_000

FUNCTION = re.compile(r"<function\s*=\s*([\w.-]+)\s*>(.*?)</function\s*>", re.DOTALL)
PARAMETER = re.compile(r"<parameter\s*=\s*([\w.-]+)\s*>(.*?)</parameter\s*>", re.DOTALL)

# What each needs, and what it takes beside.
EDITOR_COMMANDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "view": (("path",), ("view_range", "concise")),
    "create": (("path",), ("file_text",)),
    "str_replace": (("path", "old_str"), ("new_str",)),
    "insert": (("path", "insert_line"), ("new_str",)),
    "undo_edit": (("path",), ()),
}
# Short names, and the editor's command that they stand for.
SHORT = {"edit": "str_replace"} | {command: command for command in EDITOR_COMMANDS}
# What others call them: SWE-agent, OpenHands and Anthropic.
RENAMED = {
    "bash": "execute_bash",
    "submit": "finish",
    "str_replace_editor": "file_editor",
    "str_replace_based_edit_tool": "file_editor",
}
TOOLS = ("file_editor", "search", "execute_bash", "finish")
# The state lies in .git, which no change has a part of. What cannot be set again, such as UID, is
# said to nobody.
_RECALL = """_aem_state=$PWD/.git/aem-shell
[ ! -f "$_aem_state" ] || . "$_aem_state" 2>/dev/null
trap '{ { printf "cd -- %q\\n" "$PWD"; declare -p; declare -f; } >"$_aem_state.new" && \
mv "$_aem_state.new" "$_aem_state"; } 2>/dev/null' EXIT"""


@dataclass(frozen=True)
class Call:
    """A tool and its arguments; ``tool`` is one of the toolbox, ``execute_bash`` or ``finish``."""

    tool: str
    arguments: Mapping[str, str] = field(default_factory=dict)


class CallError(ValueError):
    """An action that is no call of a tool; the message says what to write."""


def parse_call(action: str) -> Call:
    """The first call in ``action``; one alone may also be JSON, with ``name`` and ``arguments``.

    Raises:
        CallError: There is none, or of a tool or with an argument that does not exist.

    Example:
        >>> parse_call("<function=bash><parameter=cmd>ls -l</parameter></function>")
        Call(tool='execute_bash', arguments={'cmd': 'ls -l'})
    """
    found = FUNCTION.search(action)
    said = (found[1], dict(PARAMETER.findall(found[2]))) if found else _said_in_json(action)
    if said is None:
        raise CallError(
            "No call was found. Write <function=NAME>, <parameter=KEY>VALUE</parameter> for each "
            f"argument, and </function>; NAME is one of {', '.join(TOOLS)}."
        )
    # Values without the line breaks that set them apart from their tags.
    arguments = {k: text.removeprefix("\n").removesuffix("\n") for k, text in said[1].items()}
    name = RENAMED.get(said[0], said[0])
    if name in SHORT:
        name, arguments["command"] = "file_editor", SHORT[name]
    if name == "file_editor":
        if "insert_text" in arguments and "new_str" not in arguments:
            arguments["new_str"] = arguments.pop("insert_text")
        command = arguments.pop("command", "").strip()
        if command not in EDITOR_COMMANDS:
            raise CallError(f"command={command!r}; allowed: {', '.join(EDITOR_COMMANDS)}.")
        call = _checked(command, arguments, *EDITOR_COMMANDS[command])
        kept = {key: value for key, value in call.arguments.items() if key != "concise"}
        return Call(command, kept | {"path": kept["path"].strip()})
    if name == "search":
        return _checked("search", arguments, ("search_term",), ("path",))
    if name == "execute_bash":
        if "command" in arguments and "cmd" not in arguments:
            arguments["cmd"] = arguments.pop("command")
        return _checked("execute_bash", arguments, ("cmd",))
    if name == "finish":
        return Call("finish")
    raise CallError(f"There is no function {name}; there are {', '.join(TOOLS)}.")


def tool_schemas() -> list[Tool]:
    """The tools for chat templates; what calls one is an action as JSON."""
    edited = {
        "command": {"type": "string", "enum": [*EDITOR_COMMANDS]},
        "path": "absolute, below /testbed",
        "view_range": "with view: [first, last] line",
        "file_text": "with create: what the file holds",
        "old_str": "with str_replace: what occurs exactly once",
        "new_str": "with str_replace and insert: what is put there",
        "insert_line": "with insert: the line before it",
    }
    where = {"search_term": "a text", "path": "a file or a folder"}
    return [
        function_tool(
            "file_editor", "Look at files and change them.", edited, optional=[*edited][2:]
        ),
        function_tool("search", "The lines that hold a text.", where, optional=["path"]),
        function_tool("execute_bash", "Run a command in /testbed.", {"cmd": "the command"}),
        function_tool("finish", "Hand the work in; hidden tests then decide.", {}),
    ]


def keep_state(command: str) -> str:
    """A command that begins in the folder and with the variables and functions of the last one.

    Each is still a shell of its own, of which no process is left: its state is written down when it
    ends. One that is killed, or that sets a trap for its own end, leaves the state as it was.
    """
    return f"{_RECALL}\neval {shlex.quote(command)}"


def run_call(session: Session, call: Call, shell: str = "fresh") -> CommandResult:
    """Do what ``call`` says; ``finish`` is not for here."""
    if call.tool == "execute_bash":
        command = call.arguments["cmd"]
        return session.run(keep_state(command) if shell == "persistent" else command)
    request = {"tool": call.tool, **call.arguments, "root": WORKDIR}
    return session.run(TOOLBOX_COMMAND, wall_s=TOOL_WALL_S, stdin=json.dumps(request).encode())


def describe(call: Call, result: CommandResult) -> str:
    """A result as the agent reads it."""
    if call.tool != "execute_bash":
        name = "file_editor" if call.tool in EDITOR_COMMANDS else call.tool
        return f"Execution output of [{name}]:\n{result.output.rstrip()}"
    text = shortened(result.output)
    exit_code = f"Exit code: {result.code}{time_note(result)}"
    return f"{exit_code}\nExecution output of [execute_bash]:\n{text}"


def time_note(result: CommandResult) -> str:
    """A line more where a command ran out of time."""
    return "\nThe command was stopped at its time limit." if result.timed_out else ""


def shortened(text: str) -> str:
    """The first and the last lines of a long output."""
    lines = text.rstrip().splitlines()
    left_out = len(lines) - 2 * KEPT_LINES
    if left_out > 0:
        notice = f"<... {left_out} lines are left out ...>"
        lines = [*lines[:KEPT_LINES], notice, *lines[-KEPT_LINES:]]
    short = "\n".join(lines)
    left_out = len(short) - 2 * KEPT_CHARACTERS
    if left_out > 0:
        notice = f"\n<... {left_out} characters are left out ...>\n"
        short = short[:KEPT_CHARACTERS] + notice + short[-KEPT_CHARACTERS:]
    return short


def write_call(name: str, **arguments: str) -> str:
    r"""A call as the agent writes it.

    Example:
        >>> write_call("finish", command="submit")
        '<function=finish>\n<parameter=command>submit</parameter>\n</function>'
    """
    lines = []
    for key, value in arguments.items():
        edge = "\n" if "\n" in value else ""
        lines.append(f"<parameter={key}>{edge}{value}{edge}</parameter>")
    return "\n".join([f"<function={name}>", *lines, "</function>"])


def _said_in_json(action: str) -> tuple[str, dict[str, str]] | None:
    try:
        call = json.loads(action)
        given = call["arguments"].items()
        texts = {key: text if isinstance(text, str) else json.dumps(text) for key, text in given}
        return str(call["name"]), texts
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _checked(
    tool: str, arguments: Mapping[str, str], needed: tuple[str, ...], others: tuple[str, ...] = ()
) -> Call:
    allowed = (*needed, *others)
    unknown = sorted(set(arguments) - set(allowed))
    missing = [name for name in needed if name not in arguments]
    if unknown or missing:
        what = [f"no parameter {name}" for name in unknown] + [f"needs {name}" for name in missing]
        raise CallError(f"{tool} has {'; '.join(what)}; it takes {', '.join(allowed)}.")
    return Call(tool, dict(arguments))
