"""Measure ways of decoding against each other: speed, acceptance, and what costs what.

A config file says what is varied, and any of its fields can be given as a flag of its
own after it.  All arms run in one process, in turns; the first round is dropped.  Into
the folder --out go runs.csv, a row for every run, report.md and three figures.

A run that was stopped goes on where it was when the command is given again.  Once all
is measured that only writes the report and the figures anew.

Example:
    ds4jax ablate --config=configs/ablation_smoke.py --out=runs/smoke
    ds4jax ablate --config=configs/ablation_depth.py --config.depths=0,1,2,4 \
        --config.texts=copy,prose --out=runs/depth
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401 - told at once, rather than when all is measured
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from ds4jax import assets
from ds4jax.errors import ConfigError
from ds4jax.experiments import environment, model_flags, runs_csv
from ds4jax.experiments.ablation_report import render
from ds4jax.experiments.arm_runs import Bench, Passage
from ds4jax.experiments.arms import Arm, Settings, arms
from ds4jax.experiments.figures import draw
from ds4jax.experiments.runs_csv import Key, Run
from ds4jax.files import check_place, make_folder, replacing

flags.adopt_module_key_flags(model_flags)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Python file with get_config(); --config.FIELD=VALUE changes it."
)
_OUT = flags.DEFINE_string("out", None, "Folder for what is found.", required=True)
flags.mark_flag_as_required("config")


def main(argv: Sequence[str]):
    """Measure what is not yet measured, then write the report.

    Raises:
      FileError, ConfigError: for a flag or file that cannot be used.
      CapacityError: if the model or the text does not fit in memory.
    """
    del argv
    settings = _settings()
    if model_flags.mtp_path() is None:
        raise ConfigError("--mtp: expected an MTP file to draft with, found none")
    folder = make_folder("out", _OUT.value)
    table, page = folder / "runs.csv", folder / "report.md"
    check_place(page)
    origin = environment.describe() | {
        "model": _model_name(), "config": settings.to_json()
    }  # fmt: skip
    done = runs_csv.read(table) if table.exists() else []
    known = {run.key for run in done}
    todo = list(plan(settings, known))
    # Where all is measured, the report may be written anew by another commit.
    expected = origin if todo else {"config": origin["config"]}
    runs_csv.check_same(table, done, expected)
    if todo:
        with model_flags.within_memory():
            done += measure(settings, done, todo, table, origin)
    with replacing(page) as part:
        part.write_text(render(done))
    draw(done, folder)
    print(f"{page}: {len(done)} runs of {len(arms(settings))} arms")


def _settings() -> Settings:
    """Return the settings of the config file."""
    try:
        return Settings.of(_CONFIG.value.to_dict())
    except OSError as error:
        raise ConfigError(f"--config: {error}") from None
    except ConfigError as error:
        name = str(error)
        prefix = "--" if name.startswith("config.") else "--config."
        raise ConfigError(f"{prefix}{name}") from None


def _model_name() -> str:
    """Return names and sizes of the model's files."""
    paths = filter(None, (model_flags.trunk_path(), model_flags.mtp_path()))
    sizes = [f"{p.name}:{p.stat().st_size if p.exists() else 0}" for p in paths]
    return " ".join(sizes)


Together = tuple[int, Passage, Sequence[Arm]]
"""Runs to come that take turns: their round, what they continue, and how each does."""


def plan(settings: Settings, known: Container[Key] = ()) -> Iterator[Together]:
    """Yield the runs of an ablation that are not yet known, in order.

    Within a round all arms take turns on a passage, and each round another one starts,
    so that no arm always follows the same.
    """
    every = arms(settings)
    for number in range(1 + settings.rounds):
        at = number % len(every)
        for passage in itertools.product(settings.texts, settings.seeds):
            turns = *every[at:], *every[:at]
            todo = [arm for arm in turns if (arm.name, *passage, number) not in known]
            if todo:
                yield number, passage, todo


def measure(
    settings: Settings,
    done: Sequence[Run],
    todo: Sequence[Together],
    table: Path,
    origin: dict[str, Any],
) -> list[Run]:
    """Return the runs of `todo`, each written to the table at once.

    Args:
      settings: of the ablation.
      done: runs that are there already.
      todo: runs to come.
      table: runs.csv.
      origin: where they are made, by column.
    """
    model = model_flags.load()
    bench = Bench(model, settings, _prompts(settings))
    for run in done:
        bench.remember(run)
    found = []
    total = len(done) + sum(len(group) for _, _, group in todo)
    bar = tqdm(total=total, initial=len(done), unit="run", disable=None)
    with bar, runs_csv.appending(table) as append:
        bar.set_postfix_str("compiling")
        used = {arm: passage for _, passage, group in todo for arm in group}
        for arm, passage in used.items():
            bench.warm(arm, passage)
        for number, passage, group in todo:
            bar.set_postfix_str(f"round {number}, {passage[0]}")
            for columns in bench.run(group, passage, number):
                run = Run(**columns | origin)
                append(run)
                found.append(run)
                bar.update()
    return found


def _prompts(settings: Settings) -> dict[Passage, list[int]]:
    """Return the ids of every passage; see `Settings.seeds`."""
    tokenizer = model_flags.load_tokenizer()
    if tokenizer is None:
        raise ConfigError("--gguf: expected a trunk with a vocabulary, found none")
    found = {}
    for text in settings.texts:
        whole = [tokenizer.bos, *tokenizer.encode(assets.prompt(text).read_text())]
        for seed in settings.seeds:
            cut = random.Random(seed).randint(len(whole) // 2, len(whole))
            found[text, seed] = whole[:cut] if seed else whole
    return found
