"""Does text that repeats itself make gradient spikes, does the mask remove them, and what does length warm-up buy?

    python benchmarks/data/stability.py repeats --seeds 5
    python benchmarks/data/stability.py length --seeds 3

Both write ``benchmarks/results/data_stability.txt`` anew after every run, from the rows in ``data_stability.jsonl``
beside it; a run whose row is there is not done again (remove the file to start over). One core, 10 to 20 s a run.

*Text*: the docstrings of the standard library and the texts of ``pydoc``'s topics, in documents of about 1,500
characters. *Model*: 3 layers, width 96, tied vocabulary of 2,048 ids trained on that text, 0.5M parameters, pre-LN
without any stability method; AdamW (0.9, 0.95), decay 0.1, clipping at 1; windows of 128 tokens; no guard.

*repeats*: 400 steps of 8 windows, rate 3e-3 after 40 steps of warm-up, then constant. Arms ``injected...``: documents
get a tail, a random n-gram of 1, 2, 3, 5 or 8 words (a token each) repeated over 80 to 160 tokens, so that about 4 % of
all windows hold some of it; other tails for each seed. They are written as text and prepared by ``poise.data`` with the
clean text's vocabulary. ``+ mask`` is ``data.mask_repeats`` as it is (from 9 repeats on in windows of 128);
``+ count 32`` masks only spans of 32 repeats and more. All arms are judged on the same clean held-out documents. A
spike is a step from 60 on whose gradient norm (before clipping) is more than 2 (3) times the median of the 32 before.

*length*: the same tokens in steps of 8 and of 32 windows, cosine to a tenth, warm-up over a tenth of the steps, clean
text; with and without ``train.length_start = 16`` over the first 30 % of the tokens. The reach is the highest rate of
the ladder up to which all rates from the best on end within 0.1 nats of the best; rates above that were not run, but
for some of seed 0.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

from poise.data.feed.loader import PLAIN, Feed, Loader, View
from poise.data.feed.ramp import LengthRamp
from poise.data.prepare import prepare
from poise.data.settings import Settings
from poise.data.store import Split, Tokens, open_tokens
from poise.data.tokens import periodic
from poise.data.tokens.tokenizer import load
from poise.model.build import build
from poise.optim.build import OptimConfig
from poise.optim.schedules import ScheduleConfig, lr_at
from poise.train.evaluate import validation_loss
from poise.train.optimizer import optimizer_for
from poise.train.recipe import ModelConfig

RESULTS = Path(__file__).parents[1] / "results"
MODEL = ModelConfig(n_layers=3, d_model=96, n_heads=4, methods=())
VOCAB, T, HELD_OUT, CHARACTERS = 2048, 128, 0.05, 1500
FROM, BEFORE = 60, 32  # spikes: from this step on, against the median of so many before
PERIODS, TAIL, SHARE = (1, 2, 3, 5, 8), (80, 160), 0.04
HOLDS = 16  # tokens of a tail from which on a window counts as holding it
REPEATS_STEPS, REPEATS_BATCH, REPEATS_LR = 400, 8, 3e-3
ARMS = {  # arm: (injected, repeats masked from this count on; None: never, 0: as poise has it)
    "clean": (False, None),
    "clean + mask": (False, 0),
    "injected": (True, None),
    "injected + mask": (True, 0),
    "injected + count 32": (True, 32),
}
LADDER = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
LENGTH_WINDOWS, START, RAMP = 1600, 16, 0.3
BATCHES = (8, 32)
NEAR = 0.1
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365}  # two-sided 95 % by number of seeds

Row = dict[str, Any]


# -- text --------------------------------------------------------------------------------------------------------------


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file, in order."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # the standard library's tests hold files that are wrong on purpose
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield text


@cache
def texts() -> list[str]:
    """Return the documents."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in library.rglob("*.py") if not {"site-packages", "test", "tests"} & {*p.parts})
    found = []
    for pieces in [*([topics[name]] for name in sorted(topics)), *(list(docstrings(path)) for path in files)]:
        paragraphs = [paragraph for piece in pieces for paragraph in piece.split("\n\n")]
        held: list[str] = []
        for paragraph in paragraphs:
            held.append(paragraph)
            if sum(map(len, held)) >= CHARACTERS:
                found.append("\n\n".join(held))
                held = []
        if held:
            found.append("\n\n".join(held))
    return list(dict.fromkeys(found))


def prepared(documents: Mapping[str, str], out: Path, tokenizer: Path | None = None) -> Tokens:
    """Write documents as JSON lines and prepare them; with ``tokenizer`` in that vocabulary."""
    lines = out.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items()))
    settings = Settings(
        vocab_size=VOCAB, val_fraction=HELD_OUT, tokenizer=None if tokenizer is None else str(tokenizer)
    )
    return open_tokens(prepare(str(lines), out, settings).dir)


@cache
def clean(place: Path) -> Tokens:
    """Return the text as it is, prepared once."""
    return prepared({f"clean-{number}": text for number, text in enumerate(texts())}, place / "clean")


@cache
def injected(place: Path, seed: int) -> Tokens:
    """Return the text in which some training documents have a tail that repeats, prepared once for each seed.

    The name of such a document says how many tokens its tail has. Held-out documents stay as they are.
    """
    whole = clean(place)
    tokenizer = load(str(whole.tokenizer_path))
    every = [tokenizer.decode([number]) for number in range(whole.vocab_size)]
    spelled = tokenizer.encode(every)
    words = [w for w, ids in zip(every, spelled, strict=True) if len(ids) == 1 and w[0] == " " and w[1:].isalpha()]
    rng = np.random.default_rng(seed)
    train = whole.split("train").table.column("id").to_pylist()
    windows = len(whole.split("train").tokens) / T
    # A tail of n tokens shows at least HOLDS of them in 1 + (n - 2 HOLDS + 1) / T windows, on average over its place.
    each = 1 + (sum(TAIL) / 2 - 2 * HOLDS + 1) / T
    chosen = set(rng.choice(train, round(SHARE * windows / each / (1 - HELD_OUT)), replace=False).tolist())
    documents = {}
    for number, text in enumerate(texts()):
        name = f"clean-{number}"
        if name in chosen:
            period, length = int(rng.choice(PERIODS)), int(rng.integers(TAIL[0], TAIL[1] + 1))
            gram = rng.choice(words, period, replace=False)
            name, text = f"tail-{length}-{number}", text + "".join(np.resize(gram, length))
        documents[name] = text
    return prepared(documents, place / f"injected-{seed}", whole.tokenizer_path)


class Masked(Tokens):
    """Prepared data of which only spans with at least 32 repeats are known."""

    def split(self, name: str) -> Split:
        """See ``Tokens``."""
        split = super().split(name)
        return dataclasses.replace(split, repeats=split.repeats[split.repeats["count"] >= periodic.FULL_COUNT])


def tail_targets(loader: Loader, sample: int) -> np.ndarray:
    """Return which targets of a sample lie in a tail that was put in, (T,)."""
    inside = np.zeros(T + 1, bool)
    for document in loader.documents(sample):
        kind, length, *_ = document["id"].split("-")
        if kind == "tail":
            first, last = document["span"]
            position = document["document_start"] + np.arange(last - first)
            end = document["token_length"] - 1  # the end of text is not part of it
            inside[first:last] = (position >= end - int(length)) & (position < end)
    return inside[1:]


# -- runs --------------------------------------------------------------------------------------------------------------


def run(
    tokens: Tokens,
    held_out: Tokens,
    seed: int,
    steps: int,
    batch: int,
    optim: OptimConfig,
    feed: Feed,
    ramp: LengthRamp | None,
) -> tuple[Row, Loader]:
    """Train; return losses, gradient norms and the validation loss before and after, and the loader."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    model = build(MODEL.spec(tokens.vocab_size, T), seed=seed)
    optimizer = optimizer_for(optim, model)
    loader, validation = Loader(tokens, T, seed, feed=feed), Loader(held_out, T, seed, "val")
    assert steps * batch <= loader.sequences, "the text is seen once at most"

    def judged() -> float:
        return validation_loss(model, validation, 10**9, 32, torch.device("cpu"))

    before, losses, norms = judged(), [], []
    for step in range(1, steps + 1):
        optimizer.set_lr(optim.lr * lr_at(step, steps, optim.schedule))
        first = (step - 1) * batch
        shown = loader.batch(first, batch, View(ramp.at(first * T)) if ramp else PLAIN)
        optimizer.zero_grad()
        out = model(shown.inputs, shown.targets)
        out.loss.backward()
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        losses.append(float(out.ce))
        norms.append(float(torch.stack(squares).sum().sqrt()))
        if not math.isfinite(losses[-1] + norms[-1]):
            break
        optimizer.step()
    row = {"seed": seed, "steps": steps, "batch": batch, "lr": optim.lr, "before": round(before, 4)}
    row |= {"val": round(judged(), 4) if len(norms) == steps and math.isfinite(norms[-1]) else math.inf}
    row |= {"params": sum(p.numel() for p in model.parameters()), "seconds": round(time.perf_counter() - began, 1)}
    return row | {"losses": [round(x, 4) for x in losses], "norms": [round(x, 4) for x in norms]}, loader


def repeats_run(place: Path, arm: str, seed: int) -> Row:
    """Train one arm of the first experiment; return its row."""
    inject, count = ARMS[arm]
    tokens = injected(place, seed) if inject else clean(place)
    if count:
        tokens = Masked(tokens.dir, tokens.manifest)
    optim = OptimConfig(lr=REPEATS_LR, schedule=ScheduleConfig(kind="constant", warmup_steps=40))
    row, loader = run(
        tokens, clean(place), seed, REPEATS_STEPS, REPEATS_BATCH, optim, Feed(mask_repeats=count is not None), None
    )
    held, masked, inside = [], 0, 0
    for step in range(REPEATS_STEPS):
        some = 0
        for sample in range(step * REPEATS_BATCH, (step + 1) * REPEATS_BATCH):
            tail = tail_targets(loader, sample)
            some += int(tail.sum() >= HOLDS)
            inside += int(tail.sum())
            masked += int((tail & ~loader.counted(sample)).sum())
        held.append(some)
    del row["losses"]  # not looked at
    return {"kind": "repeats", "arm": arm, **row, "held": held, "tail_tokens": inside, "tail_masked": masked}


def length_run(place: Path, warm: bool, batch: int, lr: float, seed: int) -> Row:
    """Train one arm of the second experiment; return its row."""
    steps = LENGTH_WINDOWS // batch
    ramp = LengthRamp(START, T, round(RAMP * LENGTH_WINDOWS * T)) if warm else None
    optim = OptimConfig(lr=lr, schedule=ScheduleConfig(kind="cosine", warmup_steps=steps // 10, final_fraction=0.1))
    row, _ = run(clean(place), clean(place), seed, steps, batch, optim, Feed(mask_repeats=False), ramp)
    losses, norms = row.pop("losses"), row.pop("norms")
    row |= {"spikes": sum(x > 2 for x in spikes(norms, BEFORE)), "rise": round(largest_rise(losses), 4)}
    return {"kind": "length", "arm": "length warm-up" if warm else "full length", **row}


# -- tables ------------------------------------------------------------------------------------------------------------


def spikes(norms: Sequence[float], first: int = FROM) -> list[float]:
    """Return for each step from ``first`` on its norm over the median of the steps before."""
    return [norms[i] / statistics.median(norms[i - BEFORE : i]) for i in range(first, len(norms))]


def mean_and_interval(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean with the half-width of its 95 % interval."""
    if len(values) not in T95:
        return f"{statistics.mean(values):.{digits}f}"
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} +- {half:.{digits}f}"


def each(values: Sequence[float], form: str = "d") -> str:
    """Return one number a seed."""
    return " / ".join(f"{value:{form}}" for value in values)


def repeats_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines about the first experiment."""
    arms = {arm: sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    some = rows[0]
    yield f"repeats: {some['params']:,} parameters, {some['steps']} steps of {some['batch']} x {T}, rate {some['lr']}"
    yield f"a figure a seed, over the {some['steps'] - FROM} steps from {FROM} on; x: the median of the {BEFORE} before"
    over: dict[str, dict[int, int]] = {}
    for arm, found in arms.items():
        if not found:
            continue
        late = [r["norms"][FROM:] for r in found]
        ratios = [spikes(r["norms"]) for r in found]
        over[arm] = {r["seed"]: sum(x > 2 for x in ratio) for r, ratio in zip(found, ratios, strict=True)}
        yield f"\n{arm}"
        counts, losses = list(over[arm].values()), [r["val"] for r in found]
        yield f"  steps > 2x             {each(counts)}   mean {mean_and_interval(counts, 1)}"
        yield f"  steps > 3x             {each([sum(x > 3 for x in ratio) for ratio in ratios])}"
        yield f"  p99 norm               {each([float(np.quantile(norms, 0.99)) for norms in late], '.2f')}"
        yield f"  largest norm           {each([max(norms) for norms in late], '.2f')}"
        yield f"  median norm            {each([statistics.median(norms) for norms in late], '.2f')}"
        if ARMS[arm][0]:
            pairs = [list(zip(r["held"], r["norms"], strict=True))[FROM:] for r in found]
            holding = [[norm for held, norm in pair if held] for pair in pairs]
            without = [[norm for held, norm in pair if not held] for pair in pairs]
            yield f"  steps with a tail      {each([len(x) for x in holding])} of {len(pairs[0])}"
            share = [sum(r["held"]) / r["steps"] / r["batch"] for r in found]
            yield f"  windows with a tail    {each(share, '.1%')}"
            yield f"  median norm with       {each([statistics.median(x) for x in holding], '.2f')}"
            yield f"  median norm without    {each([statistics.median(x) for x in without], '.2f')}"
            spiky = [
                sum(x > 2 and held > 0 for x, (held, _) in zip(ratio, pair, strict=True))
                for ratio, pair in zip(ratios, pairs, strict=True)
            ]
            yield f"  steps > 2x with a tail {each(spiky)}"
            masked = [r["tail_masked"] / r["tail_tokens"] for r in found]
            yield f"  tail tokens masked     {each(masked, '.1%')}"
        yield f"  clean validation loss  {each(losses, '.3f')}   mean {mean_and_interval(losses, 3)}"
    yield "\nsteps > 2x, difference within a seed (95 % t interval)"
    for arm, base in (
        ("injected", "clean"),
        ("injected + mask", "injected"),
        ("injected + mask", "clean"),
        ("injected + count 32", "clean"),
        ("injected + mask", "injected + count 32"),
        ("clean + mask", "clean"),
    ):
        shared = sorted(over.get(arm, {}).keys() & over.get(base, {}).keys())
        if shared:
            yield f"  {arm} - {base}: {mean_and_interval([over[arm][s] - over[base][s] for s in shared], 1)}"


def reach(losses: Mapping[float, float], best: float) -> float:
    """Return the highest rate up to which all from the lowest-loss one on end within ``NEAR`` of ``best``, or nan."""
    rates = sorted(losses)
    start = rates.index(min(rates, key=lambda rate: losses[rate]))
    found = math.nan
    for rate in rates[start:]:
        if not losses[rate] <= best + NEAR:
            break
        found = rate
    return found


def past_reach(rows: Sequence[Row], warm: bool, batch: int, lr: float, seed: int) -> bool:
    """Return whether a lower rate is already out of reach, so that this one need not be run."""
    lower = [r for r in rows if r["job"][:3] == ["length_run", warm, batch] and r["seed"] == seed and r["lr"] < lr]
    losses = {r["lr"]: r["val"] for r in lower}
    return bool(losses) and reach(losses, min(losses.values())) != max(losses)


def length_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines about the second experiment."""
    yield f"length: {LENGTH_WINDOWS} windows of {T} tokens; length warm-up from {START} over {RAMP:.0%} of the tokens"
    for batch in sorted({r["batch"] for r in rows}):
        here = [r for r in rows if r["batch"] == batch]
        arms = sorted({r["arm"] for r in here})
        seeds = sorted({r["seed"] for r in here})
        by = {
            arm: {s: {r["lr"]: r["val"] for r in here if (r["arm"], r["seed"]) == (arm, s)} for s in seeds}
            for arm in arms
        }
        yield f"\nsteps of {batch} windows ({here[0]['steps']} of them): validation loss by rate, one figure a seed"
        for arm in arms:
            yield f"  {arm}"
            for rate in sorted({r["lr"] for r in here}):
                found = {r["seed"]: r for r in here if (r["arm"], r["lr"]) == (arm, rate)}
                shown = [
                    " / ".join(f"{found[s][name]:{form}}" if s in found else "-" for s in seeds)
                    for name, form in (("val", ".3f"), ("spikes", "d"), ("rise", ".2f"))
                ]
                yield f"    {rate:<7g} {shown[0]}   steps > 2x {shown[1]}   largest rise of the loss {shown[2]}"
        for arm in arms:
            known = [s for s in seeds if by[arm][s]]
            own = [reach(by[arm][s], min(by[arm][s].values())) for s in known]
            common = [reach(by[arm][s], min(v for a in arms for v in by[a][s].values())) for s in known]
            best = [min(by[arm][s].values()) for s in known]
            yield (
                f"  {arm}: reach {each(own, 'g')} (within {NEAR} of its own best), {each(common, 'g')} (of the best of "
                f"both), {sum(x == max(LADDER) for x in own)} of {len(own)} at the top of the ladder; best loss "
                f"{each(best, '.3f')}"
            )


def largest_rise(losses: Sequence[float]) -> float:
    """Return by how many nats the loss of a step was most above the median of the steps before; inf if it ended so."""
    finite = [x for x in losses if math.isfinite(x)]
    rises = [finite[i] - statistics.median(finite[i - BEFORE : i]) for i in range(BEFORE, len(finite))]
    return max(rises, default=0.0) if len(finite) == len(losses) else math.inf


def read_rows(path: Path) -> list[Row]:
    """Return the rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(rows: Sequence[Row], commands: Sequence[str], path: Path) -> None:
    """Write the tables anew."""
    lines = [f"$ {command}" for command in commands]
    lines.append(f"torch {torch.__version__}, one thread; vocabulary {VOCAB}, windows of {T}")
    for kind, table in (("repeats", repeats_table), ("length", length_table)):
        if some := [row for row in rows if row["kind"] == kind]:
            lines += ["", *table(some)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Run what is missing, seed by seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("repeats", "length", "show"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    log = options.out / "data_stability.jsonl"
    jobs: list[tuple[Callable[..., Row], tuple[Any, ...]]]
    if options.what == "repeats":
        jobs = [(repeats_run, (arm, seed)) for seed in range(options.seeds) for arm in ARMS]
    else:
        grid = [(warm, batch, lr) for batch in BATCHES for lr in LADDER for warm in (False, True)]
        jobs = [(length_run, (*point, seed)) for seed in range(options.seeds) for point in grid]
    rows = read_rows(log)
    done = {tuple(row["job"]) for row in rows}
    with tempfile.TemporaryDirectory() as place:
        for work, job in jobs if options.what != "show" else ():
            if (work.__name__, *job) in done or (work is length_run and past_reach(rows, *job)):
                continue
            row = {"job": [work.__name__, *job], **work(Path(place), *job)}
            rows.append(row)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
            show(rows, commands(rows), options.out / "data_stability.txt")
            print(*job, f"validation loss {row['val']:.3f}, {row['seconds']} s", flush=True)
    show(rows, commands(rows), options.out / "data_stability.txt")


def commands(rows: Sequence[Row]) -> list[str]:
    """Return the commands that the rows come from."""
    seeds = {kind: {r["seed"] for r in rows if r["kind"] == kind} for kind in ("repeats", "length")}
    return [
        f"python benchmarks/data/stability.py {kind} --seeds {len(found)}" for kind, found in seeds.items() if found
    ]


if __name__ == "__main__":
    main()
