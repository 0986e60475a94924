"""The agent: its training step collects, estimates, scores, modulates, updates and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from aem_lightning.algorithms import (
    PPO,
    ClippedLoss,
    Estimator,
    Loss,
    Modulation,
    RepoR,
    check_group_size,
    response_means,
)
from aem_lightning.collectives import several_ranks, summed
from aem_lightning.functional import response_entropy
from aem_lightning.functional.forecast import forecast_sums
from aem_lightning.modules.ahead import Ahead, corrected
from aem_lightning.modules.batching import choose_tokens, entropy_sums, make_batch, trained_units
from aem_lightning.modules.dynamic_sampling import group_source, split_groups, why_all_broke
from aem_lightning.modules.evaluated import EvaluatedModule
from aem_lightning.modules.finite import FiniteCheck, check_weights
from aem_lightning.modules.memory import TokenBudget
from aem_lightning.modules.policy import Policy
from aem_lightning.modules.reporting import environment_metrics, rollout_metrics, shown
from aem_lightning.modules.resuming import advanced, resume, stored_state, take_up
from aem_lightning.modules.scoring import Objective, fill_values, score_rows
from aem_lightning.modules.settings import RolloutSettings, UpdateSettings
from aem_lightning.modules.sharding import shard
from aem_lightning.modules.timing import Stopwatch
from aem_lightning.modules.update import (
    UpdatePlan,
    accumulate_gradients,
    clip_globally,
    means_of_steps,
    reason_to_skip,
    rows_with_gradient,
    take_step,
)
from aem_lightning.rollout import (
    Collector,
    EngineResponder,
    EnvironmentPool,
    EpisodesOver,
    PromptEncoder,
    RewardShaping,
    RolloutEngine,
    Sampling,
    stable_seed,
)
from aem_lightning.types import Iteration, RolloutBatch, Task, Trajectory

OptimizerFactory = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class AgentModule(EvaluatedModule):
    """Multi-turn reinforcement learning of a policy, with modulated advantages.

    Manual optimisation, and rollouts inside the step: on-policy always, but for ``lag``.

    Args:
        policy: The LoRA-adapted policy.
        engine: Where responses are sampled.
        encoder: Messages to token ids.
        rewards: The reward shaping.
        estimator: Base advantages, e.g. `GRPO`.
        modulation: Coefficients, e.g. `AEM`.
        loss: The loss of tokens, e.g. `ClippedLoss`.
        optimizer: Parameters to optimizer.
        scheduler: Optimizer to learning-rate schedule, stepped once an iteration.
        rollout: How episodes are played.
        update: How a rollout batch is used.
        task_types: What results are broken down by.
        seed: Key of every random draw, together with the iteration: ranks share its draws.
        lag: With 1, the next iteration's episodes are played during an update, see `Ahead`.

    Raises:
        ValueError: The group is too small for the estimator.
    """

    # Checkpoints hold what trains only; on_load_checkpoint compares the names.
    strict_loading = False

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        encoder: PromptEncoder,
        rewards: RewardShaping,
        estimator: Estimator,
        modulation: Modulation,
        loss: Loss,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        rollout: RolloutSettings,
        update: UpdateSettings,
        task_types: Sequence[str] = (),
        seed: int = 0,
        lag: int = 0,
    ) -> None:
        super().__init__(task_types)
        check_group_size(rollout.group_size, estimator)
        self.automatic_optimization = False
        self.critic = estimator if isinstance(estimator, PPO) else None
        if self.critic is not None:
            policy.add_value_head()
        self.policy, self.engine, self.encoder, self.rewards = policy, engine, encoder, rewards
        self.ahead = Ahead() if lag else None
        loss = corrected(loss) if lag else loss
        self.estimator, self.modulation, self.loss = estimator, modulation, loss
        self.covariance = loss.covariance if isinstance(loss, ClippedLoss) else None
        self.first_entropy_coef = self.entropy_coef = getattr(loss, "entropy_coef", 0.0)
        self.rollout = rollout
        self.update_settings = update
        self.seed = seed
        self.iteration = self.tasks_played = 0
        self.config: dict[str, Any] = {}
        self.finite: FiniteCheck  # of the iteration under way
        self.episodes_over: EpisodesOver | None = None  # whoever shows progress
        self.committing: Callable[[], object] = bool  # called before the first change of a step
        self.recorded: Callable[..., Any] | None = None  # whoever keeps rollouts
        self._optimizer, self._scheduler = optimizer, scheduler

    def training_step(self, batch: list[Task], batch_idx: int) -> dict[str, Iteration]:
        """One iteration: play a group for each task, then update; examples/loop.py is its page."""
        watch = Stopwatch(self.device, micro_batch_tokens=self.update_settings.micro_batch_tokens)
        with watch("rollout"):
            played = self.collect(batch, watch)
            trajectories, dropped = split_groups(played, self.rollout)
            rollouts = make_batch(trajectories, self.rollout, self.modulation, self.encoder)
            rollouts = rollouts.to(self.device)
        self.finite = FiniteCheck(self.iteration, trajectories, rollouts)
        with watch("advantage", 0 if self.critic is None else len(rollouts.row_length)):
            advantages = self.estimate(rollouts)  # [R]; PPO: [S, L]
        plan = self.plan_update(rollouts, advantages)
        rollouts, entropy_source = self.score(rollouts, plan, watch)
        with watch("modulation"):
            modulated = self.modulation(rollouts)  # alpha [R]
            scaled = modulated.apply(advantages, rollouts)  # as advantages
        self.finite.look(advantages, modulated.alpha, scaled)
        with watch("update", plan.passes):
            self.committing()
            self.adapt_entropy(rollouts)
            metrics = self.update(rollouts, scaled, plan) if plan.skipped is None else {}
        del self.finite  # and with it the batch
        done = Iteration(
            index=self.iteration,
            trajectories=trajectories,
            batch=rollouts,
            advantages=response_means(advantages, rollouts),
            alpha=modulated.alpha,
            gated=modulated.gated,
            seconds=watch.seconds,
            metrics=metrics,
            skipped=plan.skipped and (why_all_broke(played) or plan.skipped),
            entropy_source=entropy_source,
            dropped=dropped,
            forecast=forecast_sums(rollouts),
            lag=None if self.ahead is None else self.ahead.staleness,
        )
        self.report(done)
        self.iteration += 1
        self.tasks_played += int(self.global_sum(torch.tensor(len(batch), device=self.device)))
        return {"iteration": done}

    # -------------------------------------------------------------------------------------- collect

    def collect(self, tasks: Sequence[Task], watch: Stopwatch) -> list[Trajectory]:
        """``group_size`` trajectories of every task by the current weights, with ``lag`` by older.

        With ``collection_rounds`` above 1, those of more tasks follow while groups are uniform.
        """
        check_weights(self.iteration, self.policy)
        if self.ahead is not None:
            return self.ahead.collect(self, tasks)
        self.engine.sync(self.policy, self.iteration)
        source = group_source(self, tasks, self.policy, self.iteration)
        played = source.collect(tasks, self.rollout.collection_rounds)
        watch.add("environment", source.environment_seconds)
        return played

    def collector(
        self, temperature: float, seed: tuple[object, ...], pool: EnvironmentPool | None = None
    ) -> Collector:
        """A collector that plays the environments of ``pool``, or the trainer's."""
        settings = self.rollout
        sampling = Sampling(temperature, settings.max_new_tokens, self.encoder.stop_ids)
        return Collector(
            pool=pool or self.trainer.datamodule.pool,  # type: ignore[attr-defined]
            encoder=self.encoder,
            responder=EngineResponder(self.engine, sampling, seed, settings.overlap_share),
            rewards=self.rewards,
            max_turns=settings.max_turns,
            max_context=settings.max_context,
            max_new_tokens=settings.max_new_tokens,
            concurrency=settings.concurrency,
            episodes_over=self.episodes_over,
            must_fit=self.iteration == 0 and not several_ranks(),  # of several, another's may
        )

    # ---------------------------------------------------------------------------------------- score

    def estimate(self, batch: RolloutBatch) -> Tensor:
        """Base advantages; an estimator with a critic sees its values first."""
        if self.critic is not None:
            fill_values(self.policy, batch, self.critic, self.budget)
        return self.estimator(batch)

    def plan_update(self, batch: RolloutBatch, advantages: Tensor) -> UpdatePlan:
        """The optimizer steps of this iteration, without the rows that change no gradient."""
        seed = stable_seed(self.seed, self.iteration, 0, "plan")
        generator = torch.Generator().manual_seed(seed)
        sums = torch.stack([advantages.abs().sum(), batch.judged.sum().to(advantages.dtype)])
        spread, episodes = self.global_sum(sums).tolist()
        skipped = reason_to_skip(spread, episodes, self.modulation, self.loss)
        others = bool(self.critic or self.covariance) or not self.modulation.keeps_zeros
        active = rows_with_gradient(batch, advantages, self.loss, zeros_count=others)
        active &= skipped is None
        return UpdatePlan.draw(active, self.update_settings, generator, skipped, batch.row_group)

    @cached_property
    def budget(self) -> TokenBudget:
        """What a micro-batch may hold; it stays smaller once memory has run out."""
        in_use = self.ahead is not None
        return TokenBudget.of(self.update_settings, self.policy, None if in_use else self.engine)

    def score(
        self, batch: RolloutBatch, plan: UpdatePlan, watch: Stopwatch
    ) -> tuple[RolloutBatch, Any]:
        """The batch with old and reference log-probabilities, and where its entropies came from.

        Passes that nothing needs are not run: old log-probabilities when there is one optimizer
        step (the batch is then exactly on-policy), the reference where the loss reads none, and
        either on rows without a gradient. Entropies that no engine gave are needed of every row.
        """
        parts = plan.first_epoch
        from_engine = bool(self.global_sum(batch.entropies.count_nonzero()))  # on any rank
        if not (from_engine and plan.is_on_policy):
            needed = parts if from_engine else [*parts, plan.idle]
            with watch("old_logprobs", sum(map(len, needed))):
                batch.old_logprobs, entropies = self.scores(batch, needed)
            if not from_engine:
                batch.entropies = entropies
                batch.entropy = response_entropy(
                    entropies, batch.response_index, batch.num_responses
                )
        if self.loss.needs_reference:
            with watch("ref_logprobs", sum(map(len, parts))), self.policy.reference():
                batch.ref_logprobs, _ = self.scores(batch, parts)
        return batch, "engine" if from_engine else "trainer"

    def scores(self, batch: RolloutBatch, parts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of rows under the present weights, both [S, L]."""
        return score_rows(self.policy, batch, parts, self.rollout.temperature, self.budget)

    # --------------------------------------------------------------------------------------- update

    def update(self, batch: RolloutBatch, advantages: Tensor, plan: UpdatePlan) -> dict[str, float]:
        """Every optimizer step of the plan; ``advantages`` are [R] (PPO: [S, L]).

        Metrics are means over steps and over the tokens of active rows. The loss is divided by the
        units of all rows of the minibatch: leaving out those without a gradient changes no weight.
        """
        optimizer = cast(LightningOptimizer, self.optimizers())
        seed = stable_seed(self.seed, self.iteration, 0, "covariance")
        objective = Objective(
            self.policy,
            batch,
            advantages,
            self.loss,
            self.rollout.temperature,
            on_policy=plan.is_on_policy,
            packed=self.budget.packed,
            chosen=choose_tokens(self.covariance, batch, advantages, seed),
            critic=self.critic,
            reshape=getattr(self.modulation, "of_tokens", None),
        )
        units_of_row = trained_units(batch, self.loss.aggregation)  # [S]
        tokens_of_row = trained_units(batch, "token")  # [S]
        sums: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        limit = self.update_settings.max_grad_norm
        for step in plan.steps:
            check = self.finite.of_update(objective, step.active, self.budget.cut)
            counts = [units_of_row[step.rows].sum(), tokens_of_row[step.active].sum()]
            units, tokens = self.global_sum(torch.stack(counts)).clamp(min=1)
            work = partial(accumulate_gradients, objective, units=units, check=check)
            stats = self.budget.run(work, step.active, batch.row_length)
            for name, value in stats.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / tokens
            norms.append(clip_globally(self.policy.parameters(), limit, self.trainer.world_size))
            check("gradient norm", norms[-1])
            take_step(optimizer)
            check_weights(self.iteration, self.policy, optimizer.optimizer, self.finite)
        metrics = means_of_steps(sums or objective.no_stats(), plan, self.global_sum)
        metrics["grad_norm"] = float(torch.stack(norms).mean())
        metrics["entropy_coef"] = getattr(self.loss, "entropy_coef", 0.0)
        return {f"policy/{name}": value for name, value in metrics.items()}

    def adapt_entropy(self, batch: RolloutBatch) -> None:
        """Move what holds the batch's entropy at a target, where the loss or modulation does."""
        total, tokens = self.global_sum(entropy_sums(batch)).tolist()
        if tokens and isinstance(self.loss, ClippedLoss):
            self.loss, self.entropy_coef = self.loss.adapted(self.entropy_coef, total / tokens)
        if tokens and isinstance(self.modulation, RepoR):
            self.modulation = self.modulation.adapted(total / tokens)

    def global_sum(self, value: Tensor) -> Tensor:
        """``value`` summed over ranks."""
        return summed(value)

    def configure_model(self) -> None:
        shard(self.policy, self._device_mesh)

    def configure_callbacks(self) -> list[L.Callback]:
        return [] if self.ahead is None else [self.ahead]

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self._scheduler is None:
            return optimizer
        scheduler = advanced(self._scheduler(optimizer), self.iteration)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # --------------------------------------------------------------------------------------- report

    def report(self, done: Iteration) -> None:
        """Log the iteration; the x axis is iterations, never optimizer steps."""
        counted = environment_metrics(self.trainer.datamodule.pool)  # type: ignore[attr-defined]
        episodes = {**rollout_metrics(done), **counted}
        metrics = {**episodes, **done.metrics, "policy/lr": self.learning_rate()}
        for logger in self.loggers:
            logger.log_metrics(metrics, step=done.index)
        self.log_dict(shown(metrics), prog_bar=True, logger=False, batch_size=1)

    def learning_rate(self) -> float:
        """The learning rate of this iteration; the schedule moves on after it."""
        rate = float(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        if self._scheduler is not None:
            self.lr_schedulers().step()  # type: ignore[union-attr]
        return rate

    # ---------------------------------------------------------------------------------- checkpoints

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch  # tasks are plain data

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {f"policy.{name}" for name in self.policy.trainable()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["aem_lightning"] = stored_state(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        take_up(self, checkpoint)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            resume(self, checkpoint)
