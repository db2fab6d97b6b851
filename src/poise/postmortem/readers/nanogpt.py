"""nanoGPT and its kin: what nanoGPT, modded-nanogpt, nanochat and build-nanogpt print, and their log files.

    iter 100: loss 3.1234, time 123.45ms, mfu 10.00%            nanoGPT, with ``step 250: train loss 3.1, val loss 3.2``
    step:125/5100 val_loss:3.9012 train_time:17ms step_avg:..   modded-nanogpt; older ones have train_loss
    s:125 tel:3.9012                                            its first records, by llm.c's names
    step 00010/05000 (0.20%) | loss: 9.12 | grad norm: 1.2      nanochat, with ``Step 00250 | Validation bpb: 1.1``
    step    10 | loss: 9.123456 | lr 1.0e-04 | norm: 1.2        build-nanogpt, and its log.txt: ``10 train 9.123456``

A file of modded-nanogpt begins with the source code of the program, whose lines are no points: a point begins its
line, and nothing before the bar of ``=`` below the code counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from poise.postmortem.readers.form import is_told
from poise.postmortem.readers.freetext import NUMBER, pairs, whole
from poise.postmortem.readers.names import GRAD_NORM, LOSS, STEP, VAL_LOSS
from poise.postmortem.readers.ranks import Ranks, rank_of
from poise.postmortem.readers.source import RESTARTED, Item, Row, Source, number

FORMAT = "nanogpt"
LOOKS_FOR = "nanoGPT, modded-nanogpt, nanochat or build-nanogpt output"

LOOK_AT = 50_000
ENOUGH = 1000
FEWEST_IN_CODE = 10
"""Points that make a log of a file that begins with code, where no bar tells its end."""

LONGEST = 2000
"""Characters of a line; those of a point are fewer."""

_PREFIX = re.compile(r"(?:\[[^\]\n]{0,60}\]:?\s{0,4}){1,3}|(?:rank\s?)?\d{1,5}:\s{1,4}(?=[A-Za-z])")
_POINT = re.compile(
    rf"iter (?P<iter>\d+): loss (?:{NUMBER})(?![\w.])"
    rf"|step (?P<est>\d+): (?:train loss (?:{NUMBER}), )?val loss (?:{NUMBER})(?![\w.])"
    r"|step:(?P<modded>\d+)/(?P<of>\d+) (?=[a-z_]{1,30}:)"
    rf"|s:(?P<llmc>\d+) (?P<tag>tel|trl|eval):(?:{NUMBER})(?![\w.])"
    r"|[sS]tep\s{1,9}(?P<bars>\d+)(?:/(?P<end>\d+))?(?: \(\d[\d.]{0,9}%\))?\s{1,4}\|\s{0,4}(?=loss: |[A-Z])"
    rf"|(?P<file>\d+) (?P<kind>train|val|hella) (?P<value>{NUMBER})$"
)
_BARRED = re.compile(rf"(?:\||^)\s{{0,8}}([A-Za-z][\w/. ]{{0,30}}?):?\s{{1,8}}({NUMBER})(?![\w:]*\.)")
_PENDING = re.compile(rf"(validation loss|HellaSwag accuracy): (?:\d+/\d+=)?({NUMBER})$")
_OVERRIDING = re.compile(r"Overriding: (\w{1,60}) = (.{0,200})")
_ASSIGNMENT = re.compile(r"([A-Za-z]\w{0,60}) = ([^#=]{1,200}?)\s{0,9}(?:#.*)?$")
_PER_STEP = re.compile(
    r"(?:tokens per iteration will be:|total desired batch size:|Total batch size) ([\d,]{1,20})(?= |$)"
)
_RESUMING = re.compile(r"Resuming (?:training|optimization) from ")
_BAR_BELOW_CODE = re.compile(r"={50,}$")

_TAGS = {"tel": VAL_LOSS, "trl": LOSS, "eval": "hellaswag"}
_FILE = {"train": LOSS, "val": VAL_LOSS, "hella": "hellaswag"}
_CALLED = {"norm": GRAD_NORM, "gradient norm": GRAD_NORM, "Val loss": VAL_LOSS, "Validation loss": VAL_LOSS}
_CALLED |= {"Validation bpb": "val_bpb", "val loss": VAL_LOSS, "train loss": "train_loss_estimate"}


def sniff(source: Source) -> float:
    """Return 0.95 when lines of one of these programs are there, outside of source code."""
    start = _end_of_code(source)
    lines = source.telling if source.sifted else source.head_lines[start : start + LOOK_AT]
    points = ((at, point) for at, line in enumerate(lines) if (point := _point(line)) is not None)
    found = list(islice(points, ENOUGH))
    lines = lines[: found[-1][0] + 1] if len(found) == ENOUGH else lines
    if not any(_holds_loss(point) for _, point in found) or not is_told([at for at, _ in found], lines, source.sifted):
        return 0.0
    if not start and len(found) < FEWEST_IN_CODE and _is_code(source):
        return 0.0
    steps = [point[STEP] for _, point in found]
    rises = max(steps) > steps[0] or len(lines) <= 5
    return 0.95 if rises else 0.0  # above 0.9: llm.c, the elder, prints lines that look alike


def read(source: Source) -> Iterator[Item]:
    """Yield one row a line with a step."""
    skip = _end_of_code(source)
    pending: Row = {}
    seen = restarted = in_file = False
    told = ((line, _point(line)) for line in source.telling[:LOOK_AT])
    ranks = Ranks(islice(((rank_of(line), row[STEP]) for line, row in told if row is not None), ENOUGH))
    ranks.note(source.notes)
    for at, raw in enumerate(source.lines()):
        if at < skip or ranks.skips(raw):
            continue
        line = whole(raw, source)
        row = _point(line, source)
        if row is None:
            if begun := _begins(line):
                restarted |= seen or begun == "resumed"
            if match := _PENDING.match(line):  # printed before the line of its step
                name = VAL_LOSS if match[1].startswith("val") else "hellaswag"
                pending[name] = float(match[2].replace(",", ""))
            in_file = _setting(line, source, in_file) and not seen
            continue
        if restarted:
            yield RESTARTED
            restarted = False
        seen = True
        if LOSS in row and ranks.repeats(row[STEP]):
            continue
        if pending and LOSS in row:
            row |= pending
            pending = {}
        yield row


def _point(line: str, source: Source | None = None) -> Row | None:
    """Return the numbers of a line that tells of a step."""
    if len(line) > LONGEST:
        return None
    match = _POINT.match(line)
    if match is None:
        if not (prefix := _PREFIX.match(line)):
            return None
        line = line[prefix.end() :]
        if (match := _POINT.match(line)) is None:
            return None
    kind = match.lastgroup
    if match["file"] is not None:
        return {STEP: float(match["file"]), _FILE[match["kind"]]: float(match["value"].replace(",", ""))}
    if match["bars"] is not None:
        return _barred(line, match, source)
    if match["modded"] is not None and source is not None:
        source.settings.setdefault("num_iterations", match["of"])
    step = match["iter"] or match["est"] or match["modded"] or match["llmc"]
    assert step is not None, kind
    row: Row = {STEP: float(step)}
    for name, value, _, _ in pairs(line[match.end(match.lastindex or 0) :] if match["modded"] else line):
        called = _TAGS.get(name, name) if match["llmc"] else name
        if match["est"] is not None:
            called = _CALLED.get(name, name)
        if called not in ("iter", "step", "s"):
            row.setdefault(called, value)
    return row


def _barred(line: str, match: re.Match[str], source: Source | None) -> Row:
    """Return the numbers of a line whose fields are parted by bars."""
    row: Row = {STEP: float(match["bars"])}
    if match["end"] is not None and source is not None:
        source.settings.setdefault("num_iterations", str(int(match["end"])))
        if match[0].endswith("%) | "):
            source.notes.add("nanochat prints a running mean of the loss: spikes are higher and shorter than they look")
    for name, text in _BARRED.findall(line[match.end() - 1 :]):
        called = _CALLED.get(name, name)
        value = number(text.replace(",", ""))
        if value is not None:
            row.setdefault(called, value)
    return row


def _holds_loss(row: Row) -> bool:
    return any("loss" in name or name == "val_bpb" for name in row)


def _end_of_code(source: Source) -> int:
    """Return how many lines the program takes with which a modded-nanogpt log begins."""
    if not _is_code(source):
        return 0
    return next((at for at, line in enumerate(source.first_lines) if _BAR_BELOW_CODE.match(line)), 0)


def _is_code(source: Source) -> bool:
    return any(line.startswith(("import ", "from ", "with open(sys.argv[0])")) for line in source.first_lines[:10])


def _begins(line: str) -> str:
    """Return ``resumed``, ``begun`` or nothing."""
    if _RESUMING.match(line):
        return "resumed"
    return "begun" if line.startswith(("tokens per iteration will be:", "total desired batch size:")) else ""


def _setting(line: str, source: Source, in_file: bool) -> bool:
    """Note what the line says of the settings; return whether the configuration file is being shown."""
    if line.startswith("Overriding config with "):
        return True
    if match := _OVERRIDING.match(line):
        source.settings[match[1]] = match[2].strip("'\"")
    elif match := _PER_STEP.match(line):
        source.settings["tokens_per_step"] = match[1].replace(",", "")
        return False
    elif in_file and len(line) < 300 and (match := _ASSIGNMENT.match(line)):
        source.settings[match[1]] = match[2].strip("'\"")
    return in_file
