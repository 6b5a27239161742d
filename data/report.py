"""Writes the table in data/README.md and a reward-cost scatter plot per dataset: `python -m data.report [--cost-limit 20]`.

Of tasks whose behaviour policies alone are kept, it makes the datasets.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

from data import collect, dsrl

HERE = Path(__file__).parent
MARKS = "<!-- made by `python -m data.report` -->\n", "<!-- until here -->\n"  # in data/README.md, around what main writes
INTRODUCTION = """Quantiles are the 10th / 50th / 90th percentile over trajectories; a trajectory is safe if its cost is at most {limit:g}.

| dataset | MB | transitions | trajectories | length | return | cost | safe share | safe return | best safe return | sha256 |
|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Args:
    cost_limit: float = 20.0
    """trajectories up to this cost are safe"""


def quantiles(x: np.ndarray) -> str:
    return " / ".join(f"{q:.0f}" for q in np.quantile(x, [0.1, 0.5, 0.9])) if len(x) else "none"


def scatter(env: str, found: dsrl.Episodes, cost_limit: float, path: Path) -> None:
    """Draws the trajectories' returns against their costs, to the PNG `path`."""
    figure, axis = plt.subplots(figsize=(5, 3.6))
    safe, whole = found.safe(cost_limit), found.complete
    axis.scatter(found.costs[safe], found.returns[safe], s=9, color="C2", label="safe")
    axis.scatter(found.costs[whole & ~safe], found.returns[whole & ~safe], s=9, color="C3", label="unsafe")
    if not whole.all():
        axis.scatter(found.costs[~whole], found.returns[~whole], s=9, color="0.6", label="unfinished")
    axis.axvline(cost_limit, color="0.4", lw=1, ls="--", label=f"limit {cost_limit:g}")
    axis.set(xlabel="episode cost", ylabel="episode return")
    axis.set_title(env, parse_math=False)
    axis.legend(fontsize=8)
    figure.tight_layout()
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, dpi=90, format="png")
    plt.close(figure)
    os.replace(part, path)


def main(args: Args) -> None:
    for path in sorted((HERE / "policies").rglob("*.safetensors")):
        collect.provided(path.relative_to(HERE / "policies").with_suffix("").as_posix())
    text = INTRODUCTION.format(limit=args.cost_limit)
    behaviours = ""
    for path in sorted(HERE.rglob("*.hdf5")):
        try:
            dataset, about = dsrl.load(path)
        except dsrl.DatasetError:
            about = {}
        if "policies" not in about:  # a file of the user's: the page is about those that come with the repository
            print(f"warning: {path}: left out, as data.collect did not make it: `python -m data.inspect` describes it", file=sys.stderr)
            continue
        found, env = dsrl.episodes(dataset), path.relative_to(HERE).with_suffix("").as_posix()
        safe = found.safe(args.cost_limit)
        scatter(env, found, args.cost_limit, HERE / f"{env}.png")
        best = f"{found.returns[safe].max():.0f}" if safe.any() else "none"
        text += (
            f"| {env} | {path.stat().st_size / 1e6:.1f} | {len(dataset.rewards):,} | {len(found.returns)} | {quantiles(found.lengths)} "
            f"| {quantiles(found.returns)} | {quantiles(found.costs)} | {safe.mean():.2f} | {quantiles(found.returns[safe])} "
            f"| {best} | {about['sha256'][:12]} |\n"
        )
        stages = {}
        for policy in json.loads(about["policies"]):
            stages.setdefault(policy["cost_limit"], []).append(f"{policy['env_steps'] / 1e3:.0f}k")
        kept = "; ".join(f"limit {k} at {', '.join(v)} steps" for k, v in stages.items())
        behaviours += f"\n![{env}]({env}.png)\n\n{env}: {kept}.\n"
    page = HERE / "README.md"
    (before, rest), (start, end) = page.read_text().split(MARKS[0]), MARKS
    page.write_text(before + start + text + behaviours + end + rest.split(end)[1])


if __name__ == "__main__":
    main(tyro.cli(Args))
