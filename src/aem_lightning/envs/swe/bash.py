"""One tool, bash, as mini-swe-agent has it: a block of it in every reply; a marker hands in.

Source: github.com/SWE-agent/mini-swe-agent, its configuration for SWE-bench.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.sandbox import CommandResult
from aem_lightning.envs.swe.tools import Call, CallError

BLOCK = re.compile(r"```(?:bash|mswea_bash_command)[ \t]*\n(.*?)\n?```", re.DOTALL)
SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
KEPT = 5_000  # characters of a long output, from either end
DELIMITER = "END_OF_PATCH"


def parse_block(action: str) -> Call:
    r"""The command in the one block of bash of ``action``.

    Raises:
        CallError: There is none, or more than one; the message says what to write.

    Example:
        >>> parse_block("Look first.\n```bash\nls -l\n```").arguments["cmd"]
        'ls -l'
    """
    found = BLOCK.findall(action)
    if len(found) != 1:
        raise CallError(
            f"{len(found)} commands were found. Write exactly one, in a block of its own:\n"
            "```bash\nyour command\n```\nTo hand the work in, type: "
            f"echo {SUBMIT}"
        )
    return Call("execute_bash", {"cmd": found[0]})


def hands_in(result: CommandResult) -> bool:
    """Whether a command's output begins with the line that hands the work in."""
    return result.code == 0 and result.output.lstrip().partition("\n")[0].rstrip() == SUBMIT


def describe_output(result: CommandResult) -> str:
    """A result as the agent reads it."""
    text = result.output
    shown = f"<output>\n{text}</output>"
    if len(text) > 2 * KEPT:
        shown = (
            f"<output_head>\n{text[:KEPT]}\n</output_head>\n"
            f"<elided_chars>\n{len(text) - 2 * KEPT} characters elided\n</elided_chars>\n"
            f"<output_tail>\n{text[-KEPT:]}\n</output_tail>"
        )
    notes = "\nThe command was stopped at its time limit." if result.timed_out else ""
    return f"<returncode>{result.code}</returncode>{notes}\n{shown}"


class BashExpert:
    """Plays the gold patch: looks at what it changes, applies it, and hands it in.

    Raises:
        ValueError: The instance has no patch.
    """

    def __init__(self, instance: Instance) -> None:
        if not instance.patch:
            raise ValueError(f"{instance.instance_id} has no gold patch, so it has no expert")
        self._commands = _commands(instance.patch)

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """The next block, whatever the observation says."""
        return f"```bash\n{next(self._commands, f'echo {SUBMIT}')}\n```"


def _commands(patch: str) -> Iterator[str]:
    yield f"git apply --stat <<'{DELIMITER}'\n{patch.rstrip()}\n{DELIMITER}"
    yield f"git apply <<'{DELIMITER}'\n{patch.rstrip()}\n{DELIMITER}"
