"""An adapter on its way to the hub: its card, its base, and what must not go with it."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
import yaml
from peft import PeftModel
from tiny_play import byte_tokenizer, ids_of, make_policy
from transformers import AutoModelForCausalLM

from aem_lightning.hub import model_card, push, stage
from aem_lightning.hub.__main__ import main
from aem_lightning.hub.card import public_overrides
from aem_lightning.modules import Lora, Policy
from aem_lightning.runner.adapter_folder import read_adapter

RATE = {"rate": 0.5, "low": 0.4, "high": 0.6, "episodes": 100}
SUMMARY = {
    "name": "coin",
    "iterations": 3,
    "success_before": RATE | {"rate": 0.25, "by_type": {"red": RATE}},
    "success_after": RATE | {"by_type": {"red": RATE, "blue": RATE}},
    "seconds": {"training": 1800.0},
}
KEY = "not-for-other-eyes"
OVERRIDES = ("experiment=corridor", "seed=3", f"logger.wandb.api_key={KEY}", "+x.root=/home/me/x")


class FakeHub(BaseHTTPRequestHandler):
    """What the hub answers to a client that makes repositories and commits to them."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            return self._answer({"error": "no"}, 403)
        if self.path == "/api/repos/create":
            made = json.loads(body)
            self.server.private.append(made.get("visibility"))
            name = f"{made['organization']}/{made['name']}"
            return self._answer({"url": f"{self.server.url}/{name}", "id": name})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self._answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        if "/commit/" not in self.path:  # is the card in order?
            return self._answer({})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.kept[f"{repo}/{entry['value']['path']}"] = content
        commit = f"{self.server.url}/{repo}/commit/0"
        return self._answer({"success": True, "commitOid": "0", "commitUrl": commit})

    def do_GET(self):
        self._answer({"error": "no"}, 404)

    def _answer(self, answer, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_shell")
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.kept, server.private, server.refuses = {}, [], False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder, the adapter of which was trained on a folder of this machine."""
    base = tmp_path_factory.mktemp("base")
    make_policy(byte_tokenizer(), lora=False).save_model(base)
    policy = Policy.from_pretrained(str(base), lora=Lora(r=2, alpha=4))
    for parameter in policy.trainable().values():
        torch.nn.init.normal_(parameter, std=0.3)
    run = tmp_path_factory.mktemp("run")
    (run / "adapter").mkdir()
    policy.save_adapter(run / "adapter")
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    origin = {"command": f"cd {run}; train", "commit": "1234567", "dirty": True}
    (run / "run.json").write_text(json.dumps({**origin, "versions": {"torch": "2.0"}}))
    (run / ".hydra").mkdir()
    game = {"_target_": "coin.CoinDataModule", "evaluation_splits": ["valid_seen"]}
    config = {"algorithm": "grpo", "datamodule": game, "logger": {"wandb": {"api_key": KEY}}}
    (run / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(OVERRIDES)))
    return run, policy


def test_what_is_pushed_plays_as_what_was_trained(hub, trained, tmp_path):
    run, policy = trained
    staged = stage(run, "me/coin", with_base=True)
    assert push(staged, private=True, endpoint=hub.url)[-1] == f"{hub.url}/me/coin/commit/0"
    assert hub.private == ["private", "private"]
    for name, content in hub.kept.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read_adapter(str(tmp_path / "me" / "coin")).base_model(None) == "me/coin-base"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "me" / "coin-base")
    model = PeftModel.from_pretrained(base, tmp_path / "me" / "coin")
    ids = torch.tensor([ids_of("open red box", type("E", (), {"tokenizer": policy.tokenizer}))])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, policy.peft(ids).logits)
    assert not any("checkpoint" in name or "transcripts" in name for name in hub.kept)
    told = b"".join(hub.kept.values())
    for secret in (KEY, "/home/me", str(run), read_adapter(str(run / "adapter")).base):
        assert secret.encode() not in told


def test_the_card_has_the_results_where_the_hub_reads_them(trained):
    card = huggingface_hub.ModelCard(model_card(trained[0], "me/coin", "owner/base"))
    assert (card.data.base_model, card.data.library_name) == ("owner/base", "peft")
    before, after = card.data.eval_results
    assert (before.metric_value, after.metric_value) == (0.25, 0.5)
    assert after.metric_name == "success rate after training, 95 % interval [0.400, 0.600]"
    assert (after.dataset_name, after.dataset_split) == ("Coin", "valid_seen")
    assert "| blue | – | 50.0 % [40.0, 60.0] of 100 |" in card.text
    assert "| versions | torch 2.0 |" in card.text
    assert "| commit | 1234567, with changes that are not committed |" in card.text
    assert "eval.py experiment=corridor adapter=adapter" in card.text


def test_a_base_of_this_machine_is_not_left_behind_in_silence(trained, capsys):
    words = ["push", str(trained[0]), "--repo", "me/coin", "--dry-run"]
    with pytest.raises(SystemExit, match="--with-base to push that model as me/coin-base"):
        main(words)
    main([*words, "--base", "owner/there"])
    assert "me/coin/adapter_model.safetensors" in capsys.readouterr().out
    assert read_adapter(str(trained[0] / "hub" / "adapter")).base == "owner/there"


def test_a_hub_that_refuses_says_how_to_log_in(hub, trained):
    hub.refuses = True
    with pytest.raises(ConnectionError, match=r"(?s)took 0 of 1 repos.*hf auth login"):
        push(staged := stage(trained[0], "me/coin", base="owner/there"), endpoint=hub.url)
    with pytest.raises(ConnectionError, match=r"(?s)took 0 of 1 repos.*hf auth login"):
        push(staged, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(("repo", "told"), [("coin", "give owner/name"), ("a/b/c", "owner/name")])
def test_a_name_that_is_no_repository_is_refused(trained, repo, told):
    with pytest.raises(ValueError, match=told):
        stage(trained[0], repo, with_base=True)


def test_only_what_concerns_the_training_is_told():
    words = ["a=1", "paths.root_dir=x", "+b.c='/home/me'", "d=[~/x]", "model=Qwen/Qwen2.5", "e=a/b"]
    assert public_overrides([*words, r"f=C:\me", "h=http://me:pw@x"]) == ["a=1", words[4], "e=a/b"]
