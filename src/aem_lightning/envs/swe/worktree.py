"""A repository inside a session: its one commit, what the agent changed since, diffs applied to it.

Files are bytes on every side: whatever the repository's ``.gitattributes`` say, git converts
neither line ends nor encodings, and a change is exactly what the agent wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

from aem_lightning.envs.swe.changes import diff_bytes, diff_text
from aem_lightning.envs.swe.repositories import DATE
from aem_lightning.envs.swe.sandbox import CommandResult, Session

DIFF_BYTES = 16 << 20
NEW_FILE_BYTES = 1 << 20  # a new file that is longer is data, and left out as binary files are
SETUP_WALL_S = 120.0
_GIT = (
    "git -c safe.directory=* -c user.name=agent -c user.email=agent@sandbox -c gc.auto=0 "
    "-c init.defaultBranch=main -c core.hooksPath=/dev/null -c core.fileMode=false "
    "-c core.quotePath=false"
)
# In this file, which counts more than the repository's own.
_ATTRIBUTES = "echo '* -text !ident !filter !working-tree-encoding !diff' >"
_AS_IT_IS = f"mkdir -p .git/info && {_ATTRIBUTES} .git/info/attributes"
# A history of one commit: later commits of the repository would show the fix.
_FIRST_COMMIT = (
    f"rm -rf .git && {_GIT} init -q . && {_AS_IT_IS} && {_GIT} add {{which}} && "
    f"GIT_AUTHOR_DATE='{DATE}' GIT_COMMITTER_DATE='{DATE}' "
    f"{_GIT} commit -q --allow-empty -m base && {_GIT} rev-parse HEAD"
)
# The agent may have written git's settings, which can run programs and change what a diff looks
# like: they are gone before the question. Its index may be locked or hide files: it is not used.
_PRIVATE = "export HOME=/dev/null GIT_NO_REPLACE_OBJECTS=1 GIT_INDEX_FILE=$PWD/.git/graded && "
_INDEX = (
    "rm -rf .git/config .git/config.worktree .git/graded* .git/info/attributes && "
    f"{_AS_IT_IS} && "
    f"{_GIT} read-tree {{base}} && "
    f"{{{{ {_GIT} add --all --intent-to-add --ignore-errors . >/dev/null 2>&1 || true; }}}} && "
)
_DIFF = (
    " diff --no-color --no-ext-diff --no-textconv --no-renames {which} {base} -- . "
    "':(exclude,glob)**/__pycache__/**' ':(exclude,glob)**/.pytest_cache/**' "
    "2>.git/graded.said || {{ cat .git/graded.said; exit 1; }}"
)
_CHANGED = f"{_PRIVATE}{_INDEX}{_GIT}" + _DIFF.replace("{which}", "--binary --diff-filter=a")
_ADDED = f"{_GIT} -c core.bigFileThreshold={NEW_FILE_BYTES}" + _DIFF.replace(
    "{which}", "--diff-filter=A"
)
# In a repository of its own, whose attributes win; where that fails, as the repository has it:
# a diff of what git stores, for files that it checked out in another form.
_APPLY = f"""
d=$(mktemp -d) && mkdir $d/objects $d/refs $d/info && echo 'ref: refs/heads/main' > $d/HEAD &&
{_ATTRIBUTES} $d/info/attributes && GIT_DIR=$d GIT_WORK_TREE=$PWD git apply {{options}} -
code=$?; rm -rf $d; exit $code
"""


@dataclass(frozen=True)
class Change:
    """What the agent changed.

    Attributes:
        diff: As git prints it; see `changes`.
        left_out: What is not part of it, and why, in words.
        problem: Why it cannot be read; the diff is empty then.
        infra_error: What broke outside the agent's doing.
    """

    diff: str = ""
    left_out: tuple[str, ...] = ()
    problem: str = ""
    infra_error: str | None = None


def commit_base(session: Session, *, ignored_too: bool) -> CommandResult:
    """Make the files one commit; the last line of the output is its hash.

    What the repository ignores is part of an archive, but a build's left-over in an image.
    """
    which = "--all --force" if ignored_too else "--all"
    return session.run(_FIRST_COMMIT.format(which=which), wall_s=SETUP_WALL_S)


def read_change(session: Session, base: str) -> Change:
    """What changed since the commit ``base``, new files included but for what git ignores."""
    done = _printed(session, f"{_CHANGED} && {_ADDED}", base)
    left_out: tuple[str, ...] = ()
    if done.code or done.truncated:  # perhaps only for new files, which a fix may do without
        problem = _problem(done)
        done = _printed(session, _CHANGED, base)
        left_out = (f"new files: {problem}",)
    if done.infra_error:
        return Change(infra_error=done.infra_error)
    if done.code or done.truncated:
        return Change(problem=_problem(done))
    return Change(diff_text(done.data), left_out)


def _printed(session: Session, command: str, base: str) -> CommandResult:
    command = command.format(base=base)
    return session.run(command, wall_s=SETUP_WALL_S, output_bytes=DIFF_BYTES)


def _problem(done: CommandResult) -> str:
    if done.truncated:
        return f"the change is over {DIFF_BYTES >> 20} MiB"
    return f"git cannot print the change: {done.output.strip()[-300:]}"


def apply(session: Session, diff: str, *options: str) -> CommandResult:
    """Apply a diff to the working folder."""
    end = "" if diff.endswith("\n") else "\n\n"  # as data sets may have lost it
    given = " ".join(("--whitespace=nowarn", *options))
    done = session.run(_APPLY.format(options=given), stdin=diff_bytes(diff + end), wall_s=60)
    if done.code == 0 or done.infra_error:
        return done
    again = session.run(f"git apply {given} -", stdin=diff_bytes(diff + end), wall_s=60)
    return done if again.code else again
