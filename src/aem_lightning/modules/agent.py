"""The agent: its training step collects, scores, estimates, modulates and updates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from aem_lightning.algorithms import ClippedLoss, Estimator, Modulation
from aem_lightning.functional import response_entropy
from aem_lightning.metrics import EpisodeMetrics
from aem_lightning.modules.policy import Policy
from aem_lightning.modules.reporting import environment_metrics, rollout_metrics
from aem_lightning.modules.scoring import micro_batch_loss, score_rows
from aem_lightning.modules.settings import RolloutSettings, UpdateSettings
from aem_lightning.modules.timing import Stopwatch
from aem_lightning.rollout import (
    Collector,
    EngineResponder,
    PromptEncoder,
    RewardShaping,
    RolloutEngine,
    Sampling,
    make_groups,
    micro_batches,
    minibatches,
    pack,
    stable_seed,
)
from aem_lightning.types import Iteration, RolloutBatch, Task, Trajectory

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class AgentModule(L.LightningModule):
    """Multi-turn reinforcement learning of a policy, with modulated advantages.

    Manual optimisation, and rollouts inside the step: what is trained on is always on-policy.

    Args:
        policy: The LoRA-adapted policy.
        engine: Where responses are sampled.
        encoder: Messages to token ids.
        rewards: The reward shaping.
        estimator: Base advantages, e.g. `GRPO`.
        modulation: Coefficients, e.g. `AEM`.
        loss: The clipped loss.
        optimizer: Parameters to optimizer.
        scheduler: Optimizer to learning-rate schedule, stepped once an iteration.
        rollout: How episodes are played.
        update: How a rollout batch is used.
        task_types: What results are broken down by.
        seed: Key of every random draw, together with iteration and rank.

    Raises:
        ValueError: The group is too small for the estimator.
    """

    # Checkpoints hold the adapters only; on_load_checkpoint compares the names.
    strict_loading = False

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        encoder: PromptEncoder,
        rewards: RewardShaping,
        estimator: Estimator,
        modulation: Modulation,
        loss: ClippedLoss,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        rollout: RolloutSettings,
        update: UpdateSettings,
        task_types: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if rollout.group_size < estimator.min_group_size:
            raise ValueError(
                f"group_size={rollout.group_size} is too small for {type(estimator).__name__}: it "
                "compares the copies of a task, so a group needs at least "
                f"{estimator.min_group_size}. Type group_size=8."
            )
        self.automatic_optimization = False
        self.policy = policy
        self.engine = engine
        self.encoder = encoder
        self.rewards = rewards
        self.estimator = estimator
        self.modulation = modulation
        self.loss = loss
        self.rollout = rollout
        self.update_settings = update
        self.seed = seed
        self.iteration = 0
        self.config: dict[str, Any] = {}
        self.tested: list[Trajectory] = []
        self.validation_metrics = EpisodeMetrics(task_types)
        self._optimizer, self._scheduler = optimizer, scheduler

    def training_step(self, batch: list[Task], batch_idx: int) -> dict[str, Iteration]:
        """One iteration: play a group for each task of ``batch``, then update the policy on it."""
        watch = Stopwatch(self.device)
        with watch("rollout"):
            trajectories = self.collect(batch, watch)
            rollouts = pack(trajectories, self.pad_id).to(self.device)
        plan = self.plan_update(rollouts)
        rollouts, entropy_source = self.score(rollouts, plan, watch)
        with watch("advantage"):
            advantages = self.estimator(rollouts)  # [R]
        with watch("modulation"):
            modulated = self.modulation(rollouts)  # alpha [R]
        with watch("update"):
            skipped = self.reason_to_skip(advantages)
            weights = modulated.alpha * advantages
            metrics = self.update(rollouts, weights, plan) if skipped is None else {}
        done = Iteration(
            index=self.iteration,
            trajectories=trajectories,
            batch=rollouts,
            advantages=advantages,
            alpha=modulated.alpha,
            gated=modulated.gated,
            seconds=watch.seconds,
            metrics=metrics,
            skipped=skipped,
            entropy_source=entropy_source,
        )
        self.report(done)
        self.iteration += 1
        return {"iteration": done}

    # -------------------------------------------------------------------------------------- collect

    def collect(self, tasks: Sequence[Task], watch: Stopwatch) -> list[Trajectory]:
        """``group_size`` trajectories of every task, sampled with the current weights."""
        self.engine.sync(self.policy, self.iteration)
        seed = ("train", self.seed, self.iteration, self.global_rank)
        collector = self.collector(self.rollout.temperature, seed)
        episodes = make_groups(tasks, self.rollout.group_size)
        trajectories = collector.collect(episodes, seed=stable_seed(self.seed, self.iteration))
        watch.add("environment", collector.environment_seconds)
        return trajectories

    def collector(self, temperature: float, seed: tuple[object, ...]) -> Collector:
        """A collector that plays the trainer's environments with this policy."""
        settings = self.rollout
        sampling = Sampling(temperature, settings.max_new_tokens, self.encoder.stop_ids)
        return Collector(
            pool=self.trainer.datamodule.pool,  # type: ignore[attr-defined]
            encoder=self.encoder,
            responder=EngineResponder(self.engine, sampling, seed, settings.overlap_share),
            rewards=self.rewards,
            max_turns=settings.max_turns,
            max_context=settings.max_context,
            max_new_tokens=settings.max_new_tokens,
            concurrency=settings.concurrency,
        )

    # ---------------------------------------------------------------------------------------- score

    def plan_update(self, batch: RolloutBatch) -> list[list[list[int]]]:
        """For each optimizer step of every update epoch, a minibatch cut into micro-batches."""
        settings = self.update_settings
        seed = stable_seed(self.seed, self.iteration, self.global_rank, "plan")
        generator = torch.Generator().manual_seed(seed)
        lengths = batch.row_length.cpu()
        return [
            micro_batches(rows, lengths, settings.micro_batch_tokens)
            for _ in range(settings.update_epochs)
            for rows in minibatches(len(lengths), settings.num_minibatches, generator)
        ]

    def score(
        self, batch: RolloutBatch, plan: list[list[list[int]]], watch: Stopwatch
    ) -> tuple[RolloutBatch, Any]:
        """The batch with old and reference log-probabilities, and where its entropies came from.

        Passes that nothing needs are not run: old log-probabilities when there is one optimizer
        step (the batch is then exactly on-policy), the reference when ``kl_coef`` is 0.
        """
        first_steps = plan[: self.update_settings.num_minibatches]
        first_epoch = [rows for step in first_steps for rows in step]
        temperature = self.rollout.temperature
        from_engine = bool((batch.entropies != 0).any())
        if len(plan) > 1 or not from_engine:
            with watch("old_logprobs"):
                batch.old_logprobs, entropies = score_rows(
                    self.policy, batch, first_epoch, temperature
                )
            if not from_engine:
                batch.entropies = entropies
                batch.entropy = response_entropy(
                    entropies, batch.response_index, batch.num_responses
                )
        if self.loss.kl_coef:
            with watch("ref_logprobs"), self.policy.reference():
                batch.ref_logprobs, _ = score_rows(self.policy, batch, first_epoch, temperature)
        return batch, "engine" if from_engine else "trainer"

    # --------------------------------------------------------------------------------------- update

    def reason_to_skip(self, advantages: Tensor) -> str | None:
        """Why there is nothing to learn from this batch, on every rank; ``None`` when there is."""
        if self.global_sum(advantages.abs().sum()) > 0 or self.loss.entropy_coef:
            return None
        return "every group is uniform: all copies of each task earned the same return"

    def update(
        self, batch: RolloutBatch, advantages: Tensor, plan: list[list[list[int]]]
    ) -> dict[str, float]:
        """Every optimizer step of the plan; ``advantages`` are [R]. Means over tokens and steps."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, L.pytorch.core.optimizer.LightningOptimizer)
        tokens_of_row = self.trained_tokens(batch)
        sums: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        for step in plan:
            rows = [row for micro in step for row in micro]
            tokens = self.global_sum(tokens_of_row[rows].sum()).clamp(min=1)
            optimizer.zero_grad()
            for micro in step:
                terms = micro_batch_loss(
                    self.policy,
                    batch,
                    micro,
                    advantages,
                    self.loss,
                    self.rollout.temperature,
                    on_policy=len(plan) == 1,
                )
                self.check_finite("loss", terms.loss)
                (terms.loss / tokens).backward()
                for name, value in terms.stats.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value / tokens
            norms.append(self.clip_gradients_globally())
            self.check_finite("gradient norm", norms[-1])
            optimizer.step()
        means = self.global_sum(torch.stack([*sums.values()]).float()) / len(plan)
        metrics = dict(zip(sums, means.tolist(), strict=True))
        metrics["grad_norm"] = float(torch.stack(norms).mean())
        return {f"policy/{name}": value for name, value in metrics.items()}

    @staticmethod
    def trained_tokens(batch: RolloutBatch) -> Tensor:
        """Response tokens of each row that take part in the loss, [S]."""
        inside = batch.response_index >= 0
        kept = batch.response_mask[batch.response_index.clamp(min=0)]
        return (inside & kept).sum(dim=1).float()

    def check_finite(self, name: str, value: Tensor) -> None:
        """Stop before a broken gradient reaches the weights."""
        if not torch.isfinite(value):
            raise ValueError(
                f"The {name} of iteration {self.iteration} is {float(value)}; the weights are "
                "still those of the last update. Go back to the last checkpoint with "
                "ckpt_path=last and type a lower optimizer.lr=..."
            )

    def clip_gradients_globally(self) -> Tensor:
        """Sum the gradients over ranks, once and flat, then clip; the norm before clipping."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        if self.trainer.world_size > 1:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            pieces = flat.split([p.numel() for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)
        return torch.nn.utils.clip_grad_norm_(parameters, self.update_settings.max_grad_norm)

    def global_sum(self, value: Tensor) -> Tensor:
        """``value`` summed over ranks."""
        if self.trainer.world_size > 1:
            dist.all_reduce(value)
        return value

    def mean_over_ranks(self, metrics: dict[str, float]) -> dict[str, float]:
        """Each of ``metrics`` averaged over ranks, which play equally many episodes."""
        values = torch.tensor([*metrics.values()], device=self.device)
        means = self.global_sum(values) / self.trainer.world_size
        return dict(zip(metrics, means.tolist(), strict=True))

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    # --------------------------------------------------------------------------------------- report

    def report(self, done: Iteration) -> None:
        """Log the iteration; the x axis is iterations, never optimizer steps."""
        counted = environment_metrics(self.trainer.datamodule.pool)  # type: ignore[attr-defined]
        episodes = self.mean_over_ranks({**rollout_metrics(done), **counted})
        metrics = {**episodes, **done.metrics, "policy/lr": self.learning_rate()}
        for logger in self.loggers:
            logger.log_metrics(metrics, step=done.index)
        shown = {"success": metrics["train/success_rate"], "entropy": metrics["rollout/entropy"]}
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
        if done.skipped is not None:
            log.warning("iteration %d: no update, %s", done.index, done.skipped)

    def learning_rate(self) -> float:
        """The learning rate of this iteration; the schedule moves on after it."""
        rate = float(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        if self._scheduler is not None:
            self.lr_schedulers().step()  # type: ignore[union-attr]
        return rate

    # ------------------------------------------------------------------------------------- evaluate

    def play(self, tasks: Sequence[Task]) -> list[Trajectory]:
        """One evaluation episode of every task; its sampling depends on seed and task alone."""
        collector = self.collector(self.rollout.eval_temperature, ("evaluation", self.seed))
        return collector.collect(make_groups(tasks, 1), seed=self.seed)

    def on_validation_epoch_start(self) -> None:
        self.engine.sync(self.policy, self.iteration)

    def validation_step(self, batch: list[Task], batch_idx: int) -> dict[str, list[Trajectory]]:
        trajectories = self.play(batch)
        self.validation_metrics.update(trajectories)
        return {"trajectories": trajectories}

    def on_validation_epoch_end(self) -> None:
        values = self.validation_metrics.compute()
        self.validation_metrics.reset()
        self.log_dict({f"val/{name}": value for name, value in values.items()}, prog_bar=False)
        self.log("val", values["success_rate"], prog_bar=True, logger=False)

    def on_test_epoch_start(self) -> None:
        self.engine.sync(self.policy, self.iteration)

    def test_step(
        self, batch: list[Task], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[Trajectory]]:
        trajectories = self.play(batch)
        self.tested += trajectories
        return {"trajectories": trajectories}

    # ---------------------------------------------------------------------------------- checkpoints

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        return batch  # tasks are plain data

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {f"policy.{name}" for name in self.policy.trainable()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["aem_lightning"] = {"iteration": self.iteration, "config": self.config}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        expected = {f"policy.{name}": p.shape for name, p in self.policy.trainable().items()}
        found = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if expected != found:
            wrong = sorted(set(expected.items()) ^ set(found.items()), key=str)
            raise ValueError(
                f"The checkpoint's adapters do not fit this policy ({len(wrong)} differences, the "
                f"first: {wrong[0][0]} with shape {tuple(wrong[0][1])}). Use the policy and "
                "policy.lora settings that the checkpoint was trained with."
            )
        self.iteration = checkpoint["aem_lightning"]["iteration"]

    @property
    def pad_id(self) -> int:
        pad = self.policy.tokenizer.pad_token_id
        return int(pad if pad is not None else self.policy.tokenizer.eos_token_id)
