"""The pictures of the README: a run's terminal, its TensorBoard and its episodes.

    python scripts/screenshots.py                         # plays the quickstart, some minutes
    python scripts/screenshots.py experiment=corridor     # or what else train.py is told
    python scripts/screenshots.py --run logs/<name>/<time>   # a run that this command has played

They are taken of the real programs by a Chromium without a window.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, LINES = 146, 14
RECORDING = "terminal.txt"  # in a run's folder: what its terminal was sent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
COLOURS = 96  # of a picture's palette


def main() -> None:
    """Play a run, or take one, and write its pictures."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    command = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    command.add_argument("overrides", nargs="*", help="of train.py")
    command.add_argument("--run", type=Path, help="the folder of a run that this command played")
    command.add_argument("--out", type=Path, default=ROOT / "docs" / "screenshots")
    given = command.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"None of {', '.join(BROWSERS)} is on the PATH: install Chromium")
    run = (given.run and given.run.resolve()) or played(
        given.overrides or ["experiment=quickstart", "iterations=15"]
    )
    if not (run / RECORDING).is_file():
        sys.exit(f"{run} holds no {RECORDING}: leave out --run, and a run is played")
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        terminal = folder / "terminal.html"
        height = terminal_page(run, terminal)
        take(browser, terminal.as_uri(), given.out / "terminal.png", height)
        episodes = folder / "episodes.html"
        viewer = [sys.executable, "-m", "aem_lightning.viewer", run.name, "--html", str(episodes)]
        subprocess.run([*viewer, "--stage", "train"], cwd=run.parent, check=True)
        take(browser, episodes.as_uri(), given.out / "viewer.png", 1000)
        with tensorboard(run) as address:
            take(browser, f"{address}#custom_scalars", given.out / "tensorboard.png", 1300)


def played(overrides: list[str]) -> Path:
    """The folder of a run of train.py, played in a terminal of its own."""
    process, screen = pty.fork()
    if process == 0:
        words = [sys.executable, str(ROOT / "train.py"), *overrides]
        os.execve(words[0], words, {**os.environ, "TERM": "xterm-256color"})
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    sent = bytearray()
    while True:
        try:
            piece = os.read(screen, 65536)
        except OSError:  # the other side has closed
            break
        sent += piece
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    folder = re.search(rb"\nrun: ([^\r\n]+)", sent)
    if status or folder is None:
        sys.exit(f"train.py {' '.join(overrides)} ended with status {status}")
    run = Path(folder[1].decode())
    (run / RECORDING).write_bytes(sent)
    return run.resolve()


def terminal_page(run: Path, target: Path) -> int:
    """Write the terminal as it stood in the middle of a rollout; returns its height in pixels."""
    sent = (run / RECORDING).read_bytes()
    bars = re.finditer(rb", rollout: (\d+) of (\d+) episodes[^\r\n]*tokens/s[^\r\n]*", sent)
    ends = [bar.end() for bar in bars if 0 < int(bar[1]) < int(bar[2])]
    text = sent[: ends[-1] if ends else len(sent)].decode(errors="replace")
    lines = text.replace(str(Path.cwd()), ".").split("\n")  # whose machine it was is no matter
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in lines[-LINES:]:  # of each, what came after the last return to its start
        seen = Text.from_ansi(line.rstrip("\r").rpartition("\r")[2])
        seen.truncate(COLUMNS)
        console.print(seen, soft_wrap=True, highlight=False)
    told = (run / ".hydra" / "overrides.yaml").read_text(encoding="utf-8").split("\n")
    svg = console.export_svg(title=" ".join(["python train.py", *(line[2:] for line in told)]))
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    target.write_text(f'<body style="margin:0">{svg}</body>', encoding="utf-8")
    return round(1400 * height / width)


@contextmanager
def tensorboard(run: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows ``run``."""
    shown = f"{run.parent.name}/{run.name}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", shown, "--port", "0"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=run.parent.parent, stderr=said, stdout=said)
        try:
            yield _ready(said)
        finally:
            process.terminate()
            process.wait()


def _ready(said: IO[str]) -> str:
    """The address in what TensorBoard ``said``, once it has read the run."""
    for _ in range(120):
        time.sleep(1)
        said.seek(0)
        found = re.search(r"http://\S+/", said.read())
        if found is None:
            continue
        listing = urllib.request.urlopen(f"{found[0]}data/plugin/custom_scalars/layout").read()
        if b"category" in listing:
            return found[0]
    sys.exit("TensorBoard shows no layout within two minutes")


def take(browser: str, address: str, target: Path, height: int) -> None:
    """Write a picture of the page at ``address``, 1400 pixels wide, in few colours."""
    with tempfile.TemporaryDirectory() as profile:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
        size = (f"--window-size=1400,{height}", "--virtual-time-budget=20000")
        place = (f"--user-data-dir={profile}", f"--screenshot={target}")
        words = [browser, *options, *size, *place, address]
        subprocess.run(words, check=True, capture_output=True, timeout=120)
    with Image.open(target) as picture:
        few = picture.convert("RGB").quantize(COLOURS)
    few.save(target, optimize=True)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
