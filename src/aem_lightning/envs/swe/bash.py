"""One tool, bash, as mini-swe-agent has it: a block of it in every reply; a marker hands in.

Source: github.com/SWE-agent/mini-swe-agent, its configuration for SWE-bench.
"""

from __future__ import annotations

import re

from aem_lightning.envs.swe.sandbox import CommandResult
from aem_lightning.envs.swe.tools import Call, CallError, time_note

BLOCK = re.compile(r"```(?:bash|mswea_bash_command)[ \t]*\n(.*?)\n?```", re.DOTALL)
SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
KEPT = 5_000  # characters of a long output, from either end


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
    return f"<returncode>{result.code}</returncode>{time_note(result)}\n{shown}"
