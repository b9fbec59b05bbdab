"""Graph-augmented MLPs on Cora and Citeseer: pdADMM-G grown to ten layers, and simple methods beside it.

Rows, each for a graph and a seed, on the features [X, ÂX, … Â⁴X] and the public split:

- `published`: pdADMM-G with the published settings: 2, then 5, then 10 layers, 200 sweeps each, ρ and μ per stage, ρ
  ← min(10 ρ, 1) where the training loss stalls, backtracking from 20, FISTA, weights and biases ~ 0.1 N(0, 1).
- `recommended`: pdADMM-G with `preset="recommended"` (steps of the best length, ρ = 0.1, torch's initial weights), 60
  sweeps per stage. Its ρ and μ per stage were chosen by validation accuracy. The 2- and 5-layer rows of the table are
  the first stages of the same runs.
- `logistic`: logistic regression (scikit-learn), its penalty by validation accuracy. `adam`: a 2-layer MLP, Adam on
  the cross-entropy with weight decay 5e-4, 200 steps on all training nodes.

Test accuracies are those at the end, and those after the sweep with the best validation accuracy among the sweeps that
were evaluated (every tenth of the stage; the first of them in a tie). Every row runs in a process of its own: `peak
memory` is all of it, with the libraries, the data and its preparation. Seconds are processor time of training alone.
Every row goes into a JSON file in `--output`; the table is made of all files there, and rows that are there are not
run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from meters import print_table
from torch import Tensor, nn

from lightning_bcd import MLP, PDADMMG, GrowLayers, LiftedModule, PlanetoidDataModule

#: (ρ, μ) of each stage of growth, as published.
PUBLISHED = {
    "cora": [(1e-5, 10.0), (1e-5, 1.0), (1e-4, 0.01)],
    "citeseer": [(1e-5, 10.0), (1e-5, 0.1), (1e-3, 0.01)],
}
#: μ of each stage with ρ of the preset, by validation accuracy.
RECOMMENDED = (5.0, 0.3, 0.03)
ROWS = ("published", "recommended", "logistic", "adam")
STAGES = (2, 5, 10)
EVALUATE_EVERY = 10


class Curve(Callback):
    """Notes seconds of training and the accuracies of every tenth sweep; evaluation is not timed.

    Args:
        data: The data.
        sweeps: Sweeps per stage.
    """

    def __init__(self, data: PlanetoidDataModule, sweeps: int) -> None:
        self.sets = [data.val_set[:], data.test_set[:]]
        self.sweeps = sweeps
        self.seconds = 0.0
        self.points: list[tuple[int, int, float, float, float]] = []
        self._best = -1.0

    def on_train_batch_start(self, *args: Any) -> None:
        self.since = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seconds += time.process_time() - self.since
        self.note(trainer.global_step, pl_module)

    def note(self, step: int, network: nn.Module) -> None:
        """Evaluate the network if it is time; test where the table may need it: at the best and at the end."""
        if step % EVALUATE_EVERY:
            return
        stage, last = (step - 1) // self.sweeps, step % self.sweeps == 0
        validation = accuracy(network, *self.sets[0])
        if validation > self._best or last:
            self.points.append((stage, step, self.seconds, validation, accuracy(network, *self.sets[1])))
        self._best = -1.0 if last else max(self._best, validation)


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of correct classes."""
    return float((network(x).argmax(1) == y).float().mean())


def load(options: argparse.Namespace, name: str) -> PlanetoidDataModule:
    """The graph's features and the public split."""
    data = PlanetoidDataModule(options.data_dir, name=name, hops=4)
    data.setup()
    return data


def train(
    options: argparse.Namespace, data: PlanetoidDataModule, algorithms: list[PDADMMG], sweeps: int, std: float = 0.0
) -> tuple[Curve, list[int]]:
    """Train a stage per algorithm; return accuracies and the peak memory at the end of each stage."""
    grow = list(STAGES[: len(algorithms)])
    network = MLP([data.num_features, *[options.width] * (grow[-1] - 1), data.num_classes])
    for module in network.modules() if std else ():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            nn.init.normal_(module.bias, std=std)
    model = LiftedModule(network, algorithms[0], loss="cross_entropy")
    curve, peaks = Curve(data, sweeps), []
    callback = GrowLayers(grow, sweeps, algorithms)
    trainer = Trainer(
        max_epochs=0,
        accelerator="cpu",
        devices=1,
        callbacks=[callback, curve],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    for stage in range(len(grow)):
        trainer.fit_loop.max_epochs = (stage + 1) * sweeps
        trainer.fit(model, data)
        peaks.append(peak_bytes())
    return curve, peaks


def run_grown(options: argparse.Namespace, name: str, row: str, data: PlanetoidDataModule) -> dict[str, Any]:
    """`published` or `recommended`."""
    if row == "recommended":
        algorithms = [PDADMMG(preset="recommended", mu=mu) for mu in RECOMMENDED]
        curve, peaks = train(options, data, algorithms, options.recommended_sweeps)
    else:
        algorithms = [PDADMMG(preset="reference", rho=rho, mu=mu) for rho, mu in PUBLISHED[name]]
        curve, peaks = train(options, data, algorithms, options.sweeps, std=0.1)
    return {"curve": curve.points, "peaks": peaks}


def run_adam(options: argparse.Namespace, data: PlanetoidDataModule) -> dict[str, Any]:
    """A 2-layer MLP by back-propagation."""
    x, y = data.train_set[:]
    network, curve = MLP([data.num_features, options.width, data.num_classes]), Curve(data, 200)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=5e-4)
    for step in range(1, 201):
        start = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
        curve.seconds += time.process_time() - start
        curve.note(step, network)
    return {"curve": curve.points, "peaks": [peak_bytes()]}


def run_logistic(data: PlanetoidDataModule) -> dict[str, Any]:
    """Logistic regression with five penalties; seconds are those of the one that is chosen."""
    from sklearn.linear_model import LogisticRegression

    (x, y), *others = (part[:] for part in (data.train_set, data.val_set, data.test_set))
    best: tuple[float, float, float] = (0.0, 0.0, -1.0)
    for exponent in range(-4, 1):
        start = time.process_time()
        model = LogisticRegression(C=10.0**exponent, max_iter=200).fit(x.numpy(), y.numpy())
        seconds = time.process_time() - start
        validation, test = (float(model.score(a.numpy(), b.numpy())) for a, b in others)
        best = max(best, (validation, test, seconds), key=lambda found: found[0])
    return {"curve": [(0, 1, best[2], best[0], best[1])], "peaks": [peak_bytes()]}


def run(options: argparse.Namespace, name: str, row: str, seed: int) -> dict[str, Any]:
    """One row, in a process of its own."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(seed)
    data = load(options, name)
    if row == "logistic":
        found = run_logistic(data)
    elif row == "adam":
        found = run_adam(options, data)
    else:
        found = run_grown(options, name, row, data)
    return {"graph": name, "row": row, "seed": seed} | found | {"threads": options.threads}


def peak_bytes() -> int:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def line(title: str, results: list[dict[str, Any]], stage: int) -> list[str]:
    """Line of the table: a stage of growth, or the only one."""
    ends, chosen, seconds, validations = [], [], [], []
    for result in results:
        points = [point for point in result["curve"] if point[0] == stage]
        best = max(points, key=lambda point: point[3])
        chosen.append(best[4])
        validations.append(best[3])
        ends.append(points[-1][4])
        seconds.append(points[-1][2])
    peak = max(result["peaks"][stage] for result in results) / 1e6
    return [
        *(results[0]["graph"], title, str(len(results)), spread(ends), spread(chosen), spread(validations)),
        *(f"{statistics.mean(seconds):.1f}", f"{peak:.0f}"),
    ]


def show(results: list[dict[str, Any]]) -> None:
    """Print the table of all results."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda r: (r["graph"] != "cora", ROWS.index(r["row"]), r["seed"])):
        groups.setdefault((result["graph"], result["row"]), []).append(result)
    head = ["graph", "method", "seeds", "test at the end", "test at best validation", "best validation"]
    table = [[*head, "seconds since the start", "peak memory, MB"]]
    for (_, row), members in groups.items():
        if row in ("published", "recommended"):
            stages = enumerate(STAGES[: len(members[0]["peaks"])])
            table += [line(f"pdADMM-G, {row}, {layers} layers", members, stage) for stage, layers in stages]
        else:
            table.append(line({"logistic": "logistic regression", "adam": "2-layer MLP, Adam"}[row], members, 0))
    print_table(table)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with cora.npz and citeseer.npz")
    parser.add_argument("--output", type=Path, default=Path("pdadmm"), help="folder of the JSON files")
    parser.add_argument("--graphs", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 100, 200, 300, 400])
    parser.add_argument("--sweeps", type=int, default=200, help="per stage of `published`; a multiple of ten")
    parser.add_argument("--recommended-sweeps", type=int, default=60, help="per stage of other rows")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for sweeps in (options.sweeps, options.recommended_sweeps):
        if sweeps < 1 or sweeps % EVALUATE_EVERY:
            parser.error(f"expected a multiple of {EVALUATE_EVERY} sweeps, but got {sweeps}")
    return options


def main() -> None:
    """Run every row that is not there yet, and print the tables."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.graphs:
            for row in options.rows:
                file = options.output / f"{name}_{row}_{seed}.json"
                # Logistic regression draws no random numbers.
                if file.exists() or (row == "logistic" and seed != options.seeds[0]):
                    continue
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    file.write_text(json.dumps(pool.submit(run, options, name, row, seed).result()))
    show([json.loads(path.read_text()) for path in sorted(options.output.glob("*.json"))])


if __name__ == "__main__":
    main()
