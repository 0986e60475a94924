"""Keys and passwords are typed by the name of a variable, and are in no file of a run."""

import pytest
from omegaconf import OmegaConf
from runs import CONFIGS

from aem_lightning.runner.command import Command
from aem_lightning.runner.early import check_evaluation
from aem_lightning.runner.secrets import scrub, secrets_in

EVAL = Command(CONFIGS, "eval", "python eval.py", "", check_evaluation)


@pytest.mark.parametrize("flag", [(), ("--multirun",)])
@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("base_url=http://me:hush@127.0.0.1/v1", "base_url: .* api_key_env="),
        ("base_url='https://127.0.0.1/v1?v=1&api-key=hush'", "base_url: .* api_key_env="),
        ("request={api_key: hush}", r"request\.api_key: .* 'request\.api_key=\$\{oc\.env:NAME\}'"),
        ("request={extra_headers: {Authorization: hush}}", r"request\.extra_headers\.Auth"),
        ("+logger.comet.api_key=hush", r"logger\.comet\.api_key"),
    ],
)
def test_a_typed_key_is_written_down_or_said_again(typed, key, flag):
    with pytest.raises(SystemExit, match=key) as end:
        EVAL.answer(["policy=api", "model=m", typed, *flag])
    assert "hush" not in str(end.value)


def test_names_and_variables_are_taken_for_keys():
    fine = {
        "api_key_env": "NAME",
        "token_budget": 3,
        "base_url": "http://127.0.0.1:8000/v1",
        "request": {"api_key": "${oc.env:NAME}", "max_tokens": 3},
        "prompt": {"role": "Write to me@example.org. See http://a.b/c?d=e"},
    }
    assert secrets_in(OmegaConf.create(fine)) == {}


@pytest.mark.parametrize(
    "name", ["GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "api_token", "secret_key", "passphrase"]
)
def test_a_secret_of_another_name_is_written_down(name):
    assert secrets_in(OmegaConf.create({"env": {name: "hush", "pad_token": "<pad>"}})) == {
        f"env.{name}": "hush"
    }


def test_what_hydra_wrote_before_a_job_began_is_kept(tmp_path):
    file = tmp_path / ".hydra" / "config.yaml"
    file.parent.mkdir()
    file.write_text("request:\n  api_key: hush\n", encoding="utf-8")
    scrub(tmp_path, secrets_in(OmegaConf.load(file)))
    assert file.read_text(encoding="utf-8") == "request:\n  api_key: '***'\n".replace("'", "")
