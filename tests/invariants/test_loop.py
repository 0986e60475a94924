"""`examples/loop.py` trains as the Lightning module does, and without Lightning."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import lightning as L
import pytest
import torch
from runs import COMMAND_ENVIRONMENT, ROOT, equal_bits
from torch import Tensor

from aem_lightning.algorithms import AEM, GRPO, ClippedLoss, Modulation, NoModulation
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.modules import AgentModule, Policy, RolloutSettings, UpdateSettings
from aem_lightning.rollout import SlotEngine
from aem_lightning.types import Iteration, Task

SEED = 3
ITERATIONS = 3


@pytest.fixture(scope="module")
def loop() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import loop

        yield loop


@pytest.fixture(scope="module")
def by_hand(loop: ModuleType) -> dict[str, Tensor]:
    """The adapters after three iterations of the page."""
    policy = loop.make_policy(SEED)
    loop.train(policy, SEED, ITERATIONS)
    return weights(policy)


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


def fitted(loop: ModuleType, modulation: Modulation) -> tuple[dict[str, Tensor], list[Iteration]]:
    """The adapters after three iterations of the module under a trainer, and what they did."""

    class CoinData(AgentDataModule):
        pool = loop.Games()

        def tasks(self, split: str) -> list[Task]:
            return loop.TASKS

        def env_factory(self) -> type:
            return loop.CoinInARow

    class Recorder(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            done.append(outputs["iteration"])

    done: list[Iteration] = []
    agent = AgentModule(
        loop.make_policy(SEED),
        SlotEngine(loop.CONCURRENCY, loop.MAX_CONTEXT, loop.ENGINE.bucket),
        loop.ENCODER,
        loop.REWARDS,
        GRPO(),
        modulation,
        ClippedLoss(clip_low=loop.CLIP, clip_high=loop.CLIP, kl_coef=loop.KL_COEF),
        partial(torch.optim.AdamW, lr=loop.LR, weight_decay=0.0),
        rollout=RolloutSettings(
            group_size=loop.GROUP_SIZE,
            max_turns=loop.MAX_TURNS,
            max_new_tokens=loop.MAX_NEW_TOKENS,
            max_context=loop.MAX_CONTEXT,
            temperature=loop.TEMPERATURE,
            concurrency=loop.CONCURRENCY,
        ),
        update=UpdateSettings(
            num_minibatches=loop.NUM_MINIBATCHES,
            micro_batch_tokens=loop.BUDGET.tokens,
            packing="padded",
            max_grad_norm=loop.MAX_GRAD_NORM,
        ),
        seed=SEED,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        callbacks=[Recorder()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = CoinData(tasks_per_iteration=len(loop.TASKS), iterations_per_epoch=ITERATIONS, seed=SEED)
    trainer.fit(agent, datamodule=data)
    return weights(agent.policy), done


def test_the_page_and_the_module_train_other_weights(
    loop: ModuleType, by_hand: dict[str, Tensor]
) -> None:
    by_module, done = fitted(loop, AEM())
    assert equal_bits(by_hand, by_module)
    assert not any(torch.equal(by_hand[n], p) for n, p in weights(loop.make_policy(SEED)).items())
    assert len(done) == ITERATIONS
    for iteration in done:  # and nothing that the two share was idle
        assert iteration.skipped is None
        assert (iteration.alpha != 1).any()
        assert ((iteration.advantages != 0) & (iteration.alpha != 1)).any()


def test_the_comparison_would_not_notice_a_stage_left_out(
    loop: ModuleType, by_hand: dict[str, Tensor]
) -> None:
    without, _ = fitted(loop, NoModulation())
    assert not equal_bits(by_hand, without)


def test_the_page_imports_lightning_or_hydra() -> None:
    script = (
        "import loop, sys\n"
        "loop.train(loop.make_policy(0), 0, iterations=1)\n"
        "tops = {name.partition('.')[0] for name in sys.modules}\n"
        "heavy = {'lightning', 'lightning_fabric', 'pytorch_lightning', 'hydra', 'omegaconf'}\n"
        "print('heavy:', sorted(tops & heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT / "examples",
        env=COMMAND_ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("iteration  0: success")
    assert last == "heavy: []"


def test_the_page_is_longer_than_a_page() -> None:
    assert len((ROOT / "examples" / "loop.py").read_text(encoding="utf-8").splitlines()) <= 250
