"""The same learning-rate search for every method, as DVC experiments: see docs/search.md.

    python pipeline/search.py queue && dvc queue start --jobs 2
    python pipeline/search.py run
    python pipeline/search.py report -o reports/search

One experiment is the whole comparison at one scale of all learning rates and one seed, so that every
method has the same number of candidates.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
import yaml

ROOT = Path(__file__).resolve().parent.parent
REPORT = "reports/tradeoff"
TARGET = "tradeoff"

Cell = tuple[float, int]


class Numbers(click.ParamType):
    """``0.1,1,10``: different numbers, in the order given."""

    name = "numbers"

    def __init__(self, kind: Callable[[str], Any]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            made = tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: write numbers with commas between", param, ctx)
        if len(set(made)) < len(made) or min(made) < 0 or (self.kind is float and 0 in made):
            self.fail(f"{value!r}: must be different and positive", param, ctx)
        return made


def grid_options(command: Callable[..., None]) -> Callable[..., None]:
    """What says which experiments belong to the search."""
    for option in (
        click.option("--seeds", type=Numbers(int), default="0,1,2", show_default=True),
        click.option("--scales", type=Numbers(float), default="0.1,0.3,1,3,10", show_default=True,
                     help="Factors of each method's own learning rate."),
        click.option("--profile", default="full", show_default=True, help="A file of profiles/."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.group()
def main() -> None:
    """The same learning-rate search for every method, as DVC experiments."""
    os.chdir(ROOT)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@main.command()
@grid_options
def queue(profile: str, scales: Sequence[float], seeds: Sequence[int]) -> None:
    """Queue what is neither finished nor queued, for `dvc queue start`. Sets params.yaml to the profile."""
    waiting = queued()
    for name, (scale, seed) in missing(profile, scales, seeds):
        if name in waiting:
            click.echo(f"{name}: queued already", err=True)
        elif not experiment("--queue", name, overrides(scale, seed)):
            raise SystemExit(f"search: {name} cannot be queued")


@main.command()
@grid_options
def run(profile: str, scales: Sequence[float], seeds: Sequence[int]) -> None:
    """Run what is not finished, one after the other. Sets params.yaml to the profile."""
    waiting, failed = queued(), []
    for name, (scale, seed) in missing(profile, scales, seeds):
        if waiting.get(name) == "active":
            raise SystemExit(
                f"search: {name} is running in DVC's queue; wait, or after a crash give "
                f"`dvc queue kill --force {name}`"
            )
        if name in waiting:
            dvc("queue", "remove", name)
        if not experiment("--temp", name, overrides(scale, seed)):
            failed.append(name)
    if failed:
        raise SystemExit(f"search: failed: {', '.join(failed)}; the same command tries them again")


@main.command()
@grid_options
@click.option("--output", "-o", type=click.Path(path_type=Path), default="reports/search", show_default=True)
@click.option("--valid", default="valid", show_default=True, help="Records that choose the learning rate.")
@click.option("--test", default="heldout", show_default=True, help="Records that give the result.")
@click.option("--rev", default="HEAD", show_default=True, help="Commit that the experiments started from.")
@click.option("--partial", is_flag=True, help="Report the scales of which all seeds are finished.")
def report(
    profile: str,
    scales: Sequence[float],
    seeds: Sequence[int],
    output: Path,
    valid: str,
    test: str,
    rev: str,
    partial: bool,
) -> None:
    """Choose each method's learning rate on --valid, and report it on --test with intervals."""
    import search_report as reports

    done = finished(rev)
    found = {cell: done.get(name_of(profile, *cell)) for cell in product(scales, seeds)}
    lacking = [name_of(profile, *cell) for cell, commit in found.items() if commit is None]
    if lacking and not partial:
        raise SystemExit(
            f"search: not finished at {rev}: {', '.join(lacking)}; run `python pipeline/search.py run` (dvc "
            "queue logs NAME shows why one failed), or give --partial to leave their scales out"
        )
    whole = [s for s in scales if all(found[s, seed] for seed in seeds)]
    if not whole:
        raise SystemExit(f"search: no scale has all of its seeds finished at {rev}")
    try:
        runs = [load(commit, *cell) for cell, commit in found.items() if commit and cell[0] in whole]
        result = reports.summarise(runs, valid, test)
    except reports.SearchError as exc:
        raise SystemExit(f"search: {exc}") from exc
    result["not_finished"] = lacking
    reports.write(output, result)
    click.echo((output / "report.md").read_text(encoding="utf-8"), nl=False)
    if lacking:
        click.echo(f"Left out, not finished: {', '.join(lacking)}.", err=True)


def name_of(profile: str, scale: float, seed: int) -> str:
    """An experiment's name, by which it is found again."""
    return f"{profile}-lr{scale:g}-seed{seed}"


def missing(profile: str, scales: Sequence[float], seeds: Sequence[int]) -> Iterator[tuple[str, Cell]]:
    """What is not finished at this commit, with params.yaml written for the profile."""
    subprocess.run([sys.executable, "pipeline/profile.py", profile], check=True)
    done = finished("HEAD")
    for scale, seed in product(scales, seeds):
        name = name_of(profile, scale, seed)
        if name in done:
            click.echo(f"{name}: finished already", err=True)
        else:
            yield name, (scale, seed)


def overrides(scale: float, seed: int) -> list[str]:
    """What ``dvc exp run --set-param`` takes: every method's learning rate scaled, and the seed."""
    params = read_params((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return [
        f"tune.seed={seed}",
        *(
            f"methods.{name}.learning_rate={rate * scale:.6g}"
            for name, rate in learning_rates(params).items()
        ),
    ]


def read_params(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def learning_rates(params: dict[str, Any]) -> dict[str, float]:
    """By method. YAML 1.1 reads ``2e-06``, as DVC writes it, as a string."""
    rates = {name: options.get("learning_rate") for name, options in params["methods"].items()}
    for name, rate in rates.items():
        if rate is None:
            raise SystemExit(f"search: methods.{name} has no learning_rate to scale")
    return {name: float(rate) for name, rate in rates.items()}


def experiment(how: str, name: str, values: Sequence[str]) -> bool:
    """Queue or run one; whether it went well."""
    return dvc("exp", "run", how, "--name", name, *(x for v in values for x in ("--set-param", v)), TARGET)


def dvc(*args: str) -> bool:
    return subprocess.run([sys.executable, "-m", "dvc", *args], check=False).returncode == 0


def git(*args: str) -> bytes:
    done = subprocess.run(["git", *args], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"search: git {args[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def finished(rev: str) -> dict[str, str]:
    """Experiments that started from a commit: name → their own commit."""
    base = git("rev-parse", rev).decode().strip()
    refs = git("for-each-ref", "--format=%(refname) %(objectname)", f"refs/exps/{base[:2]}/{base[2:]}/")
    pairs = (line.rsplit(" ", 1) for line in refs.decode().splitlines())
    return {ref.rsplit("/", 1)[1]: commit for ref, commit in pairs}


def queued() -> dict[str, str]:
    """Experiments in DVC's queue at this commit: name → ``waiting`` or ``active``."""
    from dvc.repo import Repo

    head = git("rev-parse", "HEAD").decode().strip()
    with Repo(str(ROOT)) as repo:
        entries = repo.experiments.celery_queue
        found = {e.name: "waiting" for e in entries.iter_queued() if e.baseline_rev == head}
        return found | {e.name: "active" for e in entries.iter_active() if e.baseline_rev == head}


def load(commit: str, scale: float, seed: int) -> Any:
    """A finished experiment's report, items and parameters, out of its commit."""
    from search_report import Run

    params = read_params(git("show", f"{commit}:./params.yaml").decode())
    if int(params["tune"]["seed"]) != seed:
        raise SystemExit(f"search: {commit[:7]} has seed {params['tune']['seed']}, its name says {seed}")
    items: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in gzip.decompress(git("show", f"{commit}:./{REPORT}/items.jsonl.gz")).splitlines():
        item = json.loads(line)
        items.setdefault(item.pop("model"), {}).setdefault(item.pop("task"), []).append(item)
    described = json.loads(git("show", f"{commit}:./{REPORT}/report.json"))
    return Run(scale, seed, learning_rates(params), described, items)


if __name__ == "__main__":
    main()
