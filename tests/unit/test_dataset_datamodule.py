"""Data and functions of one's own: rows, prompts and checkers, and functions as tools."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import own_functions as own
import pytest
from packages import EXAMPLES
from runs import composed

from aem_lightning.datamodules import DatasetDataModule, ToolsDataModule
from aem_lightning.envs import check_env
from aem_lightning.envs.answers import BadAnswerError
from aem_lightning.rollout import Prompt, RewardShaping
from aem_lightning.runner.build import build_datamodule, build_prompt

PAID = RewardShaping(success=0.0, environment=1.0, malformed=0.0, inadmissible=0.0)


def reset(data, split="train", place=0):
    env = data.env_factory()()
    task = data.tasks(split)[place]
    return env, env.reset(seed=0, options={"task_id": task.id})[0]


@pytest.mark.parametrize("prompt", ["{a} + {b} =", own.asked, "own_functions.asked"])
def test_rows_with_a_checker_keep_the_contract_in_a_light_worker(prompt, caplog):
    data = DatasetDataModule(own.ROWS, prompt, own.right, workers=1)
    check_env(data, rewards=PAID, resets=0, tasks_per_split=2)
    assert "loads" not in caplog.text
    env, question = reset(data)
    assert question in ("0 + 2 =", "1 + 2 =", "What is 0 and 2?", "What is 1 and 2?")
    answer = question.replace("What is ", "")[0]
    assert env.step(str(int(answer) + 2))[1:4] == (1.0, True, False)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("{p:.2f} $", "1.50 $"),
        ("{q[0]}{q[1]!r:>{w}}", "1   2"),
        ("{q.__class__.__name__}", "list"),
        ("{{x}} only", "{x} only"),
        ("{0} {p}", "zero 1.5"),
        ("0", "zero"),
    ],
)
def test_a_format_of_columns_is_not_filled_in(prompt, question):
    row = {"p": 1.5, "q": [1, 2], "w": 4, 0: "zero"}
    assert reset(DatasetDataModule([row, row], prompt, own.right))[1] == question


def test_the_rows_to_evaluate_on_are_the_same_whatever_the_seed():
    one, two = (DatasetDataModule(own.rows, "{a}", own.right, seed=s, workers=1) for s in (0, 1))
    assert [len(one.tasks(split)) for split in ("train", "valid")] == [18, 2]
    assert one.evaluation_splits == ("valid",)
    with pytest.raises(ValueError, match=r"has no test\. Its splits: train, valid"):
        DatasetDataModule(own.rows, "{a}", own.right, evaluation_splits=["test"])
    questions = [[reset(d, "valid", place)[1] for place in (0, 1)] for d in (one, two)]
    assert questions[0] == questions[1]
    trained = {reset(one, "train", place)[1] for place in range(18)}
    assert trained.isdisjoint(questions[0])
    assert len(trained) == 18


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "tsv"])
def test_files_of_every_kind_are_read(kind, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows, file = datasets.Dataset.from_list(own.ROWS), tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, own.ROWS)))
    elif kind == "parquet":
        rows.to_parquet(str(file))
    else:
        rows.to_csv(str(file), sep="\t" if kind == "tsv" else ",")
    frame = rows.to_pandas()
    assert DatasetDataModule(frame, "{a}", own.right).sizes == {"train": 18, "valid": 2}
    data = DatasetDataModule({"train": str(file), "test": rows}, "{a}+{b}", own.right)
    assert data.sizes == {"train": 20, "test": 20}
    assert reset(data, place=7)[1] == reset(data, "test", 7)[1] == "7+2"


def test_the_same_by_a_config_alone(tmp_path):
    words = (
        *("datamodule=dataset", "datamodule.dataset=own_functions.rows"),
        *("datamodule.prompt='{a} + {b} ='", "datamodule.reward=own_functions.right"),
    )
    cfg = composed([*words])
    assert (cfg.rewards.environment, cfg.prompt.action) == (1.0, "tagged")
    assert len(build_datamodule(cfg).tasks("train")) == 18


def test_the_example_of_arithmetic_is_asked_and_scored(monkeypatch):
    folder = EXAMPLES / "arithmetic"
    monkeypatch.syspath_prepend(str(folder))
    for name in ("arithmetic", "arithmetic_agent"):
        cfg = composed([f"experiment={name}", f"hydra.searchpath=[file://{folder}]"])
        assert (cfg.rewards.environment, cfg.rewards.success) == (1.0, 0.0)
        data = build_datamodule(cfg)
        assert len(data.tasks("train")) == 1750
        with contextlib.closing(data.env_factory()()) as env:
            task = data.tasks("valid")[0]
            asked, _ = env.reset(seed=0, options={"task_id": task.id})
            assert env.step(str(int(asked.split()[2]) + int(asked.split()[6])))[-1]["won"]
        answers = {data.make_expert(task, seed).act("", ()) for seed in range(20)}
        assert len(answers) == 3


@pytest.mark.parametrize(
    ("rows", "prompt", "reward", "told"),
    [
        ("gone.jsonl", "a", own.right, r"dataset=gone\.jsonl: there is no such file"),
        ("/", "a", own.right, r"dataset=/: it cannot be read"),
        ([], "a", own.right, r"\[\] as the split 'train'; expected rows, at least one"),
        ([1, 2], "a", own.right, "expected rows"),
        (7, "a", own.right, "7 as the split 'train'; expected rows"),
        (own.ROWS[:1], "{a}", own.right, "has one row: two are the fewest"),
        ({"a": own.ROWS, "b": own.ROWS}, "{a}", own.right, "splits a, b, and none is called train"),
        (own.ROWS, "question", own.right, "question: .* or one of the columns a, b, answer"),
        (own.ROWS, "{c}", own.right, r"'\{c\}' cannot be filled in: .*Columns: \{a\}, \{b\}"),
        (own.ROWS, "{}", own.right, "cannot be filled in: there is no column ''"),
        (own.ROWS, "{a", own.right, r"'\{a' cannot be filled in: expected '}'"),
        (own.ROWS, "{a.x}", own.right, "prompt raised AttributeError: .* on row 0"),
        ([{"a": None}] * 2, "{a} =", own.right, "the column a is empty on row 0"),
        ([{"a": float("nan")}] * 2, "{a} =", own.right, "the column a is empty on row 0"),
        ("own_functions.rws", "a", own.right, "dataset=own_functions.rws: AttributeError: .*rws"),
        ("failing_rows.rows", "a", own.right, "ModuleNotFoundError: No module named 'not_there'"),
        ("gone_module.rows", "a", own.right, "it cannot be read"),
        (own.ROWS, "a", own.right, "made 0 of row 0; expected a text|made 1 of row 0"),
        (own.ROWS, own.strict, own.right, "datamodule.prompt raised TypeError: .* on row 0"),
        (own.ROWS, "{a}", lambda row, answer: 1, "lambda.*a worker process cannot import it"),
        (own.ROWS, "{a}", "own_functions.gone", "own_functions.gone: .* Type the path"),
        (own.ROWS, "{a}", "gone_module.check", "No module named 'gone_module'"),
        (own.ROWS, "{a}", 7, "datamodule.reward=7: expected a function"),
    ],
)
def test_what_cannot_be_is_told_with_what_to_type(
    rows, prompt, reward, told, tmp_path, monkeypatch
):
    (tmp_path / "failing_rows.py").write_text("import not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        DatasetDataModule(rows, prompt, reward)


def test_a_checker_that_raises_or_gives_no_number_is_told_in_words():
    env, _ = reset(DatasetDataModule(own.ROWS, "{a}", own.strict))
    with pytest.raises(
        BadAnswerError, match=r"checker of strict raised ValueError: .*answer 'ten'"
    ):
        env.step("ten")
    env, _ = reset(DatasetDataModule(own.ROWS, "{a}", own.silent))
    assert env.step("ten")[1] is None  # which the worker refuses: reward=None; expected a number


def test_the_file_of_rows_is_gone_with_its_datamodule():
    data = DatasetDataModule(own.ROWS, "{a}", own.right)
    path = Path(data.rows.path)
    assert path.exists()
    del data
    assert not path.exists()


# -------------------------------------------------------------------------------------------- tools


def tooled(**more):
    tools = ["own_functions.add", own.look]
    return ToolsDataModule(own.ROWS, own.asked, own.thrifty, tools=tools, workers=1, **more)


def test_functions_are_tools_by_signature_and_docstring():
    add, look, answer = (tool["function"] for tool in tooled().tools())
    assert (add["name"], add["description"]) == ("add", "Add two numbers.")
    assert add["parameters"]["required"] == ["a"]
    assert add["parameters"]["properties"]["b"] == {"type": "integer", "description": "b"}
    assert look["parameters"]["properties"]["place"]["enum"] == ["shelf", "box"]
    assert look["parameters"]["properties"]["deep"]["description"] == "Under everything, too."
    assert answer["name"] == "final_answer"


def test_a_decorated_function_is_no_tool_or_its_result_is_escaped():
    data = ToolsDataModule(own.ROWS, own.asked, own.thrifty, tools=[own.double, own.listed])
    told = data.tools()[0]["function"]
    assert (told["name"], list(told["parameters"]["properties"])) == ("double", ["a"])
    env, _ = reset(data)
    assert env.step('{"name": "double", "arguments": {"a": 2}}')[0] == "4 Äpfel"
    assert env.step('{"name": "listed", "arguments": {}}')[0] == '["Äpfel"]'


def test_calls_are_answered_and_scored_with_the_answer():
    data = tooled()
    check_env(data, rewards=PAID, resets=0, tasks_per_split=1)
    env, question = reset(data)
    number = int(question.split()[2])
    assert env.step('{"name": "look", "arguments": {"place": "shelf"}}')[0] == '{"seen": []}'
    seen, *_, info = env.step('{"name": "look", "arguments": {"place": "box"}}')
    assert (seen, info["is_action_valid"]) == ("LookupError: the box is shut", False)
    assert len(env.step('{"name": "look", "arguments": {"place": "", "deep": true}}')[0]) < 4010
    assert "No tool was called. Call one of add, look, or final" in env.step("I think 7")[0]
    assert env.step('{"name": "add", "arguments": {"a": 3}}')[:2] == ("5", 0.0)
    last = json.dumps({"name": "final_answer", "arguments": {"answer": str(number + 2)}})
    assert env.step(last)[1:4] == (0.75, True, False)
    env, question = reset(data)
    env.step(json.dumps({"name": "add", "arguments": {"a": number}}))
    assert env.step(last)[1] == 1.0


def test_a_native_call_reaches_the_function_through_the_prompt():
    cfg = composed(
        [
            *("datamodule=tools", "datamodule.dataset={_target_: own_functions.rows}"),
            *("datamodule.prompt=own_functions.asked", "datamodule.reward=own_functions.thrifty"),
            "datamodule.tools=[own_functions.add,own_functions.look]",
        ]
    )
    data = build_datamodule(cfg)
    prompt: Prompt = build_prompt(cfg, data)
    said = '<tool_call>\n{"name": "add", "arguments": {"a": 40}}\n</tool_call>'
    env, _ = reset(data)
    assert env.step(prompt.parse(said))[0] == "42"
    assert prompt.malformed('<tool_call>{"name": "add", "arguments": {"a": "x"}}</tool_call>')


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        ([own.untyped], r"untyped\(a\) has no type: write a: str"),
        ([own.undescribed], "undescribed has no docstring"),
        ([own.many], r"many\(\*numbers: .* cannot be called by names"),
        ([own.add, own.add], "several are called add"),
        ([], "give a function"),
        ([own.half_added], r"functools\.partial\(.* is no plain function"),
        ([len], "len is no plain function"),
        ([lambda a: a], "cannot import it"),
    ],
)
def test_a_function_that_is_no_tool_is_told_why(tools, told):
    with pytest.raises(ValueError, match=told):
        ToolsDataModule(own.ROWS, own.asked, own.thrifty, tools=tools)
