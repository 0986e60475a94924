"""Checks before an install, and an install whose failure ends with one clear line.

``check`` looks at what pip does not: the Python version, the venv module, the compilers that build
the ALFWorld engine, the free disk. ``run`` runs a command with its output in a log file, and on
failure prints what the log means. Standard library only, and no syntax newer than Python 3.6, so
that an old Python can still say that it is old.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys

OLDEST = (3, 11)
NEWEST = (3, 13)
# Measured: a CPU install takes 2.2 GB, and pip unpacks each wheel beside it.
FIRST_INSTALL_GB = 4.0
LATER_INSTALL_GB = 1.0
STAMP = ".installed"


def python_problem(version):
    """The line for a Python that is out of range, or None."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return None
    return (
        "Python {}.{} is out of range: 3.11 to 3.13 are allowed. Install one of them, then type: "
        "make install PYTHON=python3.11".format(version[0], version[1])
    )


def venv_problem(version):
    """The line for a Python without the means to make a virtual environment, or None."""
    try:
        import ensurepip  # noqa: F401  (its presence is the question)
        import venv  # noqa: F401
    except ImportError:
        return (
            "Python's venv module is missing. On Debian and Ubuntu type: "
            "sudo apt-get install python{}.{}-venv".format(version[0], version[1])
        )
    return None


def tools_problem(platform):
    """The line for missing compilers, or None."""
    missing = [tool for tool in ("g++", "make") if shutil.which(tool) is None]
    if not missing:
        return None
    command = "xcode-select --install" if platform == "darwin" else "sudo apt-get install g++ make"
    return "{} missing: the ALFWorld engine is compiled during the install. Type: {}".format(
        " and ".join(missing) + (" is" if len(missing) == 1 else " are"),
        command + ("" if platform == "darwin" else " (or your system's equivalent)"),
    )


def disk_problem(venv_dir):
    """The line for a disk without room for the virtual environment, or None."""
    installed = os.path.exists(os.path.join(venv_dir, STAMP))
    needed = LATER_INSTALL_GB if installed else FIRST_INSTALL_GB
    folder = os.path.abspath(venv_dir)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free / 1e9
    if free >= needed:
        return None
    return (
        "the disk is full: {:.1f} GB free under {}, {:.0f} GB needed. Free some room, or put the "
        "virtual environment on another disk: make install VENV=/other/disk/venv"
    ).format(free, folder, needed)


def problems(venv_dir, version=sys.version_info, platform=sys.platform):
    """Every problem that would stop the install, one line each."""
    found = [
        python_problem(version),
        venv_problem(version),
        tools_problem(platform),
        disk_problem(venv_dir),
    ]
    return [line for line in found if line]


# First match wins. A full disk and a dead network come first: they make builds and the version
# search fail too. Only the last retry counts as a dead network; earlier ones may have recovered.
MEANINGS = (
    (
        r"No space left on device",
        "the disk is full. Free some room (TMPDIR too), then type the same command again",
    ),
    (
        r"Retry\(total=0,|Max retries exceeded|ReadTimeoutError: |ProxyError\("
        r"|Temporary failure in name resolution",
        "no network: pip could not reach a package index. Connect, or name a mirror and type "
        "again, e.g. PIP_INDEX_URL=https://your.mirror/simple make install",
    ),
    (
        r"requires a different Python",
        "the virtual environment holds a Python outside 3.11 to 3.13. Remove its folder, then "
        "type: make install",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "pyproject.toml and constraints.txt contradict each other",
    ),
    (
        r"No matching distribution found",
        "the package index lacks a pinned package. Look at PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and "
        "`pip config list`, then type: make install",
    ),
    (
        r"Failed building wheel|Failed to build|Could not build wheels"
        r"|subprocess-exited-with-error|metadata-generation-failed",
        "a package did not compile: the log has the compiler's words",
    ),
)
DECORATION = re.compile(r"^\s*(\[notice\]|note:|hint:|╰|│|×|$)")
ERROR = re.compile(r"\berror\b", re.I)
BOILERPLATE = re.compile(r"subprocess-exited-with-error|for help visit")
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def last_relevant_line(log):
    """The last line that names an error, else the last line that says anything."""
    lines = [line for line in COLOUR.sub("", log).splitlines() if not DECORATION.match(line)]
    errors = [line for line in lines if ERROR.search(line) and not BOILERPLATE.search(line)]
    return (errors or lines or ["the log is empty"])[-1].strip()


def explain(log):
    """One line saying what a failed install means, with pip's own last words."""
    for pattern, meaning in MEANINGS:
        if re.search(pattern, log):
            return "{} [{}]".format(meaning, last_relevant_line(log))
    return last_relevant_line(log)


def run(command, log_path):
    """Runs ``command`` with its output in ``log_path``; returns its exit status."""
    live = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns - 1
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace")
            log.write(line)
            log.flush()
            if live:
                sys.stdout.write("\r\x1b[K" + line.strip()[:width])
                sys.stdout.flush()
    if live:
        sys.stdout.write("\r\x1b[K")
    return process.wait()


def main(arguments=None):
    """Runs ``check`` or ``run``; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    check = commands.add_parser("check", help="say what is missing before an install")
    check.add_argument("--venv", required=True, help="where the virtual environment goes")
    runner = commands.add_parser("run", help="run a command, explain its failure")
    runner.add_argument("--log", required=True, help="file that gets the command's output")
    runner.add_argument("words", nargs=argparse.REMAINDER, help="-- command and its arguments")
    options = parser.parse_args(arguments)

    if options.command == "check":
        found = problems(options.venv)
        for line in found:
            sys.stderr.write("preflight: {}\n".format(line))
        return 1 if found else 0
    if options.command == "run":
        words = options.words[1:] if options.words[:1] == ["--"] else options.words
        status = run(words, options.log)
        if status:
            with open(options.log, encoding="utf-8") as log:
                meaning = explain(log.read())
            sys.stderr.write("install failed: {} (log: {})\n".format(meaning, options.log))
        return status
    parser.print_usage(sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
