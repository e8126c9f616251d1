"""One training run: its state, one step of it, and the loop with its checkpoints.

Everything a step does follows from the settings, the corpus and the state, so a run
that was stopped and goes on ends in the very bits of one that was not.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from tqdm import tqdm

from ds4jax import schema
from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError, FileError
from ds4jax.files import replacing
from ds4jax.model.deepseek import Model, random_weights
from ds4jax.pallas.passes import Weight
from ds4jax.train import checkpoint
from ds4jax.train.data import Batches
from ds4jax.train.loss import Losses, balanced, losses

CHECKPOINT = "checkpoint.safetensors"
LOG = "loss.csv"
COLUMNS = ("step", "trunk", "mtp", "indexer", "lr", "tokens_per_second", "imbalance")
LOG_EVERY = 50

_NOT_LEARNT = ("exp_probs_b.bias", "tid2eid.weight")
_AHEAD = 4
"""Batches made before the device asks for them."""

_BATCH = "batch"
"""The axis of `mesh`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What, with the corpus, determines a run.

    Attributes:
      steps: of the whole run; the learning rate falls to 0 at the last.
      batch: B, sequences of a step.
      rows: T, tokens of a sequence that the trunk reads.
      lr: the peak of the learning rate.
      warmup: steps of its linear rise.
      mtp_weight: of the MTP head's loss; the trunk's has 1.
      copy_share: probability that a sequence asks for copies.
      seed: of the first weights and the batches.
    """

    steps: int
    batch: int = 32
    rows: int = 1024
    lr: float = 3e-3
    warmup: int = 200
    mtp_weight: float = 0.5
    copy_share: float = 0.3
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 1), ("rows", 8), ("warmup", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}: expected at least {least}, found {value}")
        if not self.lr > 0:
            raise ConfigError(f"lr: expected a positive number, found {self.lr}")
        if not self.mtp_weight >= 0:
            raise ConfigError(
                f"mtp_weight: expected a number from 0, found {self.mtp_weight}"
            )


@struct.dataclass
@no_type_check
class State:
    """Everything that changes from step to step.

    Attributes:
      step: int32, steps made.
      weights: what the gradient moves, by name; trunk and MTP head together.
      fixed: what it does not: selection biases, which `balanced` moves, and tables.
      optimizer: optax's state.
    """

    step: Array
    weights: dict[str, Array]
    fixed: dict[str, Array]
    optimizer: Any


def schedule(settings: Settings) -> optax.Schedule:
    """Return the learning rate by step: a linear rise, then a linear fall to 0."""
    warmup = min(settings.warmup, settings.steps // 2)
    return optax.join_schedules(
        [
            optax.linear_schedule(settings.lr / (warmup + 1), settings.lr, warmup),
            optax.linear_schedule(settings.lr, 0.0, settings.steps - warmup),
        ],
        [warmup],
    )


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Return AdamW behind a clip of the gradient's norm; only matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule(settings),
            b2=0.95,
            weight_decay=0.1,
            mask=lambda weights: jax.tree.map(lambda w: jnp.ndim(w) > 1, weights),
        ),
    )


def first_state(config: ModelConfig, settings: Settings) -> State:
    """Return the state before the first step, on the host."""
    weights = random_weights(schema.trunk(config), config, settings.seed)
    weights |= random_weights(schema.mtp(config), config, settings.seed + 1)
    fixed = {k: weights.pop(k) for k in [*weights] if k.endswith(_NOT_LEARNT)}
    weights, fixed = jax.tree.map(jnp.asarray, (weights, fixed))
    return State(jnp.int32(0), weights, fixed, optimizer(settings).init(weights))


def model(state: State, config: ModelConfig) -> Model:
    """Return the model that a state holds."""
    weights: dict[str, Weight] = {**state.weights, **state.fixed}
    head = {k: w for k, w in weights.items() if k in schema.mtp(config)}
    trunk = {k: w for k, w in weights.items() if k not in head}
    return Model(trunk, head, config)


@functools.partial(jax.jit, static_argnames=("config", "settings"), donate_argnums=0)
def train_step(
    state: State,
    windows: Int[Array, "B width"],
    config: ModelConfig,
    settings: Settings,
) -> tuple[State, Losses]:
    """Make one step; `state` is given up.

    Every device of `mesh` has a share of the windows, and all make the same step.
    """

    def share(weights, fixed, windows):
        def objective(weights):
            whole = dataclasses.replace(state, weights=weights, fixed=fixed)
            return losses(model(whole, config), windows, settings.mtp_weight)

        found = jax.grad(objective, has_aux=True)(weights)
        return jax.lax.pmean(found, _BATCH)

    every, own = PartitionSpec(), PartitionSpec(_BATCH)
    gradient, found = jax.shard_map(
        share,
        mesh=mesh(settings),
        in_specs=(every, every, own),
        out_specs=every,
        check_vma=False,
    )(state.weights, state.fixed, windows)
    updates, moments = optimizer(settings).update(
        gradient, state.optimizer, state.weights
    )
    biases = {name: state.fixed[name] for name in found.loads}
    after = State(
        state.step + 1,
        cast(dict[str, Array], optax.apply_updates(state.weights, updates)),
        {**state.fixed, **balanced(biases, found.loads)},
        moments,
    )
    return after, found


def mesh(settings: Settings) -> jax.sharding.Mesh:
    """Return as many devices as the batch can be shared evenly among."""
    count = math.gcd(settings.batch, jax.device_count())
    # Not explicit: the model that comes of it would carry the mesh into every pass.
    return jax.make_mesh(
        (count,), (_BATCH,), (AxisType.Auto,), devices=jax.devices()[:count]
    )


def _windows(
    batches: Batches, start: int, stop: int, sharding: NamedSharding
) -> Iterator[Array]:
    """Yield the batches of these steps, made and sent ahead of their use."""
    make = lambda step: jax.device_put(batches.at(step), sharding)  # noqa: E731
    with ThreadPoolExecutor(1) as pool:
        queue = deque(
            pool.submit(make, s) for s in range(start, min(start + _AHEAD, stop))
        )
        for step in range(start, stop):
            if step + _AHEAD < stop:
                queue.append(pool.submit(make, step + _AHEAD))
            yield queue.popleft().result()


class Log:
    """The table `loss.csv`, a row for every 50 steps, each the mean of what it sums."""

    def __init__(self, path: Path, step: int):
        """Open the table, and drop what a run that was killed wrote after `step`."""
        self._path = path
        self.rows = [row for row in read_log(path) if row["step"] <= step]
        self._write()

    def add(self, step: int, lr: float, speed: float, found: Sequence[Losses]) -> str:
        """Append the mean of some steps' losses and return it as one line."""
        mean = jax.tree.map(lambda *x: float(np.mean(x)), *(
            dataclasses.replace(f, loads={}) for f in found))  # fmt: skip
        shares = {
            name: np.mean([f.loads[name] for f in found], axis=0)
            for name in found[0].loads
        }
        imbalance = max((s.max() / s.mean() for s in shares.values()), default=1.0)
        values = (step, mean.trunk, mean.mtp, mean.indexer, lr, speed, imbalance)
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        self._write()
        return " ".join(f"{k} {v:.5g}" for k, v in self.rows[-1].items())

    def _write(self):
        with replacing(self._path) as part, part.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for row in self.rows:
                writer.writerow([f"{row[name]:.6g}" for name in COLUMNS])


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows of a `loss.csv`; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        try:
            return [
                {name: float(row[name]) for name in COLUMNS}
                for row in csv.DictReader(file)
            ]
        except (KeyError, TypeError, ValueError):
            raise FileError(
                f"{path}: expected columns {','.join(COLUMNS)} of numbers; delete it"
            ) from None


def train(
    folder: Path,
    config: ModelConfig,
    settings: Settings,
    batches: Batches,
    identity: dict[str, Any],
    checkpoint_every: int,
    deadline: float = float("inf"),
) -> State:
    """Run to the last step, from the folder's checkpoint if it holds one.

    The batch is shared among all devices there are.

    Args:
      folder: where the checkpoint and `loss.csv` are.
      config: the model's.
      settings: of the run.
      batches: made with the same settings.
      identity: whatever else a checkpoint must agree with, such as the corpus.
      checkpoint_every: steps between checkpoints; there is one at the end as well.
      deadline: `time.monotonic()` after which to stop, with a checkpoint.

    Raises:
      ConfigError, FileError: as `checkpoint.load`; if a loss is not finite.
    """
    identity = {**dataclasses.asdict(settings), **_plain(config), **identity}
    path = folder / CHECKPOINT
    state = jax.eval_shape(lambda: first_state(config, settings))
    if path.exists():
        state = checkpoint.load(path, state, identity)
    else:
        state = first_state(config, settings)
    start, rate = int(state.step), schedule(settings)
    devices = mesh(settings)
    state = jax.device_put(state, NamedSharding(devices, PartitionSpec()))
    shares = NamedSharding(devices, PartitionSpec(_BATCH))
    log = Log(folder / LOG, start)
    pending: list[Losses] = []
    step, since = start, time.monotonic()
    bar = tqdm(total=settings.steps, initial=start, unit="step", disable=None)
    for windows in _windows(batches, start, settings.steps, shares):
        state, found = train_step(state, windows, config, settings)
        # One step at a time: a queued one would take its memory already.
        pending.append(jax.block_until_ready(found))
        step += 1
        bar.update()
        if step % LOG_EVERY == 0 or step == settings.steps:
            known = jax.device_get(pending)
            now = time.monotonic()
            speed = len(pending) * settings.batch * settings.rows / (now - since)
            line = log.add(step, np.asarray(rate(step - 1)).item(), speed, known)
            tqdm.write(line) if not bar.disable else print(line, flush=True)
            if not np.isfinite(log.rows[-1]["trunk"] + log.rows[-1]["mtp"]):
                raise ConfigError(
                    f"lr: the loss is no longer finite at step {step}; lower --lr than "
                    f"{settings.lr} and start over"
                )
            pending, since = [], now
        if step % checkpoint_every == 0:
            checkpoint.save(path, state, identity)
        if time.monotonic() > deadline:
            break
    bar.close()
    if step > start:
        checkpoint.save(path, state, identity)
    return jax.device_put(state, jax.devices()[0])


def _plain(config: ModelConfig) -> dict[str, Any]:
    """Return the config as JSON would give it back."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
