"""The table of a study, from synthetic records whose answers are known."""

from __future__ import annotations

import json
import math
import random

import pytest

from poise.core.errors import UserError
from poise.core.journal import to_json
from poise.model.methods import METHODS
from poise.studies.lr_sensitivity import Result, as_float, summarise
from poise.studies.published import ORDERINGS, Reading, canonical, compare, kendall_tau

LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
INIT = 7.0


def record(arm, lr, seed, final, *, steps=200, threads=1, seconds=0.05, logit=5.0, init=INIT):
    """A cell's record; curves are smooth with one spike of the gradient norm if the run is bad."""
    noise = random.Random(f"{arm}{lr}{seed}")
    end = final if math.isfinite(final) else 9.0
    loss = [init + (end - init) * (1 - math.exp(-6 * t / steps)) + noise.gauss(0, 0.02) for t in range(steps)]
    norm = [1.0 + noise.gauss(0, 0.05) for _ in range(steps)]
    ended = "finished"
    if not math.isfinite(final):
        ended, loss, norm = "nonfinite", [*loss[: steps // 2], math.nan], [*norm[: steps // 2], math.inf]
    elif final > init - 0.5:
        norm[3 * steps // 4] = 40.0
    return {
        "format": 1, "key": f"{arm}-{lr}-{seed}", "arm": arm, "lr": lr, "seed": seed, "recipe": {}, "params": 1_050_000,
        "params_non_embedding": 800_000, "init_loss": init, "final_loss": final, "best_val": min(init, end),
        "steps_done": len(loss), "steps": steps, "ended": ended, "loss": loss, "grad_norm": norm,
        "val": [[0, init], [steps, final]], "max_logit": [[0, 1.0], [steps, logit]], "max_logit_block0": None,
        "seconds_per_step": seconds, "seconds": seconds * steps, "threads": threads, "device": "cpu",
        "environment": {"torch": "2.13", "python": "3.11", "cpu": "test"},
    }  # fmt: skip


def curve(lr, best_lr, stable_to, floor=3.0):
    """A final loss: a parabola in log lr, worse than the start above ``stable_to``."""
    if lr > stable_to * 3.5:
        return math.nan
    return INIT + 1.0 if lr > stable_to else floor + 0.25 * math.log10(lr / best_lr) ** 2


def study(arms, *, lrs=LRS, seeds=(0, 1, 2), hypothesis="each has a lower LR sensitivity than baseline", **more):
    """Records and declaration; ``arms`` are label -> (largest stable lr, largest logit, time)."""
    records = []
    for label, (stable, logit, time) in arms.items():
        for lr in lrs:
            for seed in seeds:
                final = curve(lr, 1e-2, stable) + 0.01 * seed * (1 + (label != "baseline") * 0.1)
                one = record(label, lr, seed, final, seconds=0.05 * time * (1 + 0.01 * seed), logit=logit * lr / 1e-3)
                records.append(one)
    declared = {"name": "lr-sensitivity", "hypothesis": hypothesis, "arms": list(arms), "lrs": lrs, "seeds": seeds}
    return records, declared | more


ARMS = {"baseline": (1e-2, 100.0, 1.0), "qk_norm": (1e-1, 5.0, 1.1), "soft_cap": (3e-2, 30.0, 1.2)}


def plain(result):
    """The result as it is written; NaN would not be equal to itself."""
    return json.loads(to_json(result.to_json()))


@pytest.fixture(scope="module")
def made() -> Result:
    return summarise(*study(ARMS))


def test_the_figures_of_every_arm(made):
    base, norm, cap = made.arms
    # By hand for seed 0: three of seven runs (0.03, 0.1, 0.3) count as 7.
    losses = [min(curve(lr, 1e-2, 1e-2), INIT) if lr <= 1e-2 else INIT for lr in LRS]
    assert base.by_seed[0] == pytest.approx(sum(losses) / 7 - 3.0)
    assert base.best_lr == 1e-2 and base.best_loss.mean == pytest.approx(3.01)
    assert [arm.first["init"].majority for arm in made.arms] == [3e-2, 3e-1, 1e-1]
    assert (base.runs, base.nonfinite, norm.nonfinite) == (21, 6, 0)
    assert (base.verdict, norm.verdict, cap.verdict) == ("baseline", "lower", "lower")
    assert norm.ratio.mean < cap.ratio.mean < 1 and norm.ratio.n == 3
    assert norm.time_ratio.mean == pytest.approx(1.1) and base.time_ratio is None
    assert norm.max_logit.mean == pytest.approx(50.0) and base.points[-1].max_logit.mean == pytest.approx(30_000.0)
    assert base.spikes["olmo2_grad"].windows == (25, 50)
    assert base.spikes["olmo2_grad"].grid.mean > 0 == norm.spikes["olmo_core_loss"].best.mean


def test_the_order_of_the_records_does_not_matter(made):
    records, declared = study(ARMS)
    random.Random(1).shuffle(records)
    assert plain(summarise(records, declared)) == plain(made)


def test_records_of_the_journal_kind_are_read(made):
    records, declared = study(ARMS)
    written = [json.loads(to_json(r)) for r in records]
    assert any(r["final_loss"] == "nan" for r in written)
    assert plain(summarise(written, declared)) == plain(made)
    with pytest.raises(UserError, match="None where a number"):
        as_float(None)


def test_missing_cells_are_said_and_not_filled(made):
    records, declared = study(ARMS)
    kept = [r for r in records if (r["arm"], r["lr"], r["seed"]) != ("qk_norm", 1e-2, 1) and r["arm"] != "soft_cap"]
    result = summarise(kept, declared)
    _, norm, cap = result.arms
    assert set(norm.by_seed) == {0, 2} and norm.missing == ((1e-2, 1),) and norm.sensitivity.n == 2
    assert norm.best_lr == 3e-2  # not 1e-2: fewer seeds there, and its mean is of others
    assert cap.sensitivity is None and cap.verdict == "unknown" and cap.remarks == ("not run at all",)
    text = result.table()
    assert "qk_norm: 1 cell not run: lr 0.01 seed 1." in text
    assert "no sensitivity for seed 1: the grid is not complete" in text and "soft_cap: not run at all" in text


def test_one_seed_has_no_interval():
    result = summarise(*study(ARMS, seeds=(4,)))
    norm = result.arm("qk_norm")
    assert norm.ratio.mean < 1 and norm.ratio.low is None and norm.verdict == "unknown"
    assert "+-?" in result.table() and "one seed only: intervals are unknown" in result.table()


def test_an_arm_that_never_trains_is_not_the_best():
    result = summarise(*study(ARMS | {"soft_temp": (1e-5, 5.0, 1.0)}))
    arm = result.arm("soft_temp")
    assert arm.sensitivity.mean == 0 and arm.verdict == "all diverged" and arm.all_diverged
    assert arm.first["init"].majority == 3e-4
    assert "soft_temp: every run diverged" in result.table()
    base_dead = summarise(*study({"baseline": (1e-5, 5.0, 1.0), "qk_norm": (1e-1, 5.0, 1.0)}))
    assert base_dead.arm("qk_norm").verdict == "unknown"


def test_an_arm_that_collapsed_to_the_uniform_output_is_all_diverged():
    records, declared = study(ARMS)
    for r in records:
        r["recipe"] = {"data": {"vocab_size": 1024}}
        if r["arm"] == "soft_cap":
            r["final_loss"] = math.log(1024) - 0.001 * r["seed"]
    result = summarise(records, declared)
    cap = result.arm("soft_cap")
    assert cap.all_diverged and cap.verdict == "all diverged" and cap.first["half"].majority == 3e-4
    assert [p.diverged_seeds for p in cap.points] == [(0, 1, 2)] * 7
    for r in records:
        r["recipe"] = {}  # the vocabulary is not known: the loss before the first step is the floor
    assert not summarise(records, declared).arm("soft_cap").all_diverged


def test_a_record_with_text_for_a_number_is_named():
    records, declared = study(ARMS)
    records[3]["loss"][7] = "x"
    with pytest.raises(UserError, match=rf"cells/{records[3]['key']}.json: a record holds 'x'"):
        summarise(records, declared)


def test_equal_arms_show_no_difference():
    records, declared = study({"baseline": ARMS["baseline"], "other": ARMS["baseline"]})
    for r in records:
        if r["arm"] == "other" and math.isfinite(r["final_loss"]) and r["final_loss"] < INIT:
            r["final_loss"] += 0.05 * math.sin(r["seed"] * 2.1 + r["lr"])
    assert summarise(records, declared).arm("other").verdict == "no difference shown"


def test_a_method_that_changes_the_rate_is_flagged_and_slid_where_the_grid_is_wider():
    lrs = tuple(10.0**k for k in range(-5, 1))
    reasons = {"qk_norm": ["qk_norm: because", "so"], "baseline": []}
    result = summarise(*study({"baseline": (1e-2, 9.0, 1.0), "qk_norm": (1e-1, 9.0, 1.0)}, lrs=lrs, changes_lr=reasons))
    arm = result.arm("qk_norm")
    assert arm.changes_lr == "qk_norm: because; so" and result.arm("baseline").changes_lr == ""
    assert arm.windowed.window == pytest.approx((1e-4, 1e-1))
    assert arm.windowed.sensitivity.mean < arm.sensitivity.mean
    assert "qk_norm †" in result.table() and "best three decades, 0.0001 to 0.1" in result.table()
    assert summarise(*study(ARMS)).arm("qk_norm").windowed is None


def test_records_that_were_not_declared_are_left_out(made):
    records, declared = study(ARMS)
    strange = [record("qk_norm", 0.5, 0, 1.0), record("qk_norm", 1e-2, 9, 1.0), record("other", 1e-2, 0, 1.0)]
    result = summarise([*records, *strange], declared)
    assert result.extra == 3 and plain(result)["arms"] == plain(made)["arms"]
    assert "3 records that the declaration does not name" in result.table()


def test_time_is_compared_only_at_the_same_threads():
    records, declared = study(ARMS)
    for r in records:
        r["threads"] = 2 if r["arm"] == "qk_norm" else 1
    result = summarise(records, declared)
    assert result.arm("qk_norm").time_ratio is None and result.arm("soft_cap").time_ratio is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": []}, "no arms"),
        ({"arms": ["a", "a"]}, "twice"),
        ({"seeds": []}, "no seeds"),
        ({"baseline": "basline"}, "did you mean 'baseline'"),
    ],
)
def test_a_bad_declaration_is_refused(change, message):
    records, declared = study(ARMS)
    with pytest.raises(UserError, match=message):
        summarise(records, declared | change)


def test_the_table_fits_the_width_and_names_stay_apart():
    long = "qk_norm+soft_cap:cap=30+z_loss:coefficient=1e-4@optim.beta2=0.9"
    arms = {"baseline": ARMS["baseline"], long + "5": ARMS["qk_norm"], long.replace("+z", "+y") + "5": ARMS["soft_cap"]}
    result = summarise(*study(arms, lrs=tuple(3e-4 * 10 ** (k / 4) for k in range(13)), seeds=(0, 1)))
    lines = result.table().splitlines()
    assert max(map(len, lines)) <= 120
    records, declared = study({"baseline" + "x" * 99: ARMS["baseline"], "y" * 60: (1.0, 123456e3, 1.0)},
                              lrs=tuple(1.234e-4 * 10 ** (k / 4) for k in range(13)))  # fmt: skip
    wide = summarise(records, declared | {"name": "n" * 110, "hypothesis": "h" * 300}).table()
    assert max(map(len, wide.splitlines())) <= 120
    names = {line[:22].strip() for line in lines if line.startswith(("qk_norm+", "3:qk_norm+"))}
    assert len(names) == 2
    assert any(f"in tables is {long}5" in " ".join(lines[i : i + 2]) for i in range(len(lines)))


def test_no_logits_where_the_architecture_has_none():
    records, declared = study(ARMS)
    for r in records:
        if r["arm"] == "soft_cap":
            r["max_logit"] = None
        elif r["seed"] == 0 and r["lr"] == 1e-2:
            r["max_logit"] = [[0, 1.0], [10, "inf"]]
    result = summarise(records, declared)
    assert result.arm("soft_cap").max_logit is None
    assert result.arm("qk_norm").max_logit.n == 2 and "1 runs ended" not in result.arm("soft_cap").remarks
    assert any("attention logit that is not finite" in remark for remark in result.arm("qk_norm").remarks)


def test_the_published_order_is_found_again_or_not(made):
    first = next(c for c in made.published if c.ordering.name == "largest stable rate")
    assert set(first.arms) == set(ARMS)
    # Published: baseline < soft_cap = qk_norm; here baseline < soft_cap < qk_norm.
    assert [(p.lower, p.higher, p.found) for p in first.pairs] == [
        ("baseline", "qk_norm", "agrees"),
        ("baseline", "soft_cap", "agrees"),
    ]
    assert first.tau == pytest.approx(2 / math.sqrt(2 * 3))
    swapped = summarise(*study({"baseline": ARMS["qk_norm"], "qk_norm": ARMS["baseline"], "soft_cap": ARMS["qk_norm"]}))
    again = next(c for c in swapped.published if c.ordering.name == "largest stable rate")
    assert [p.found for p in again.pairs] == ["reversed", "not separated"]
    text = " ".join(swapped.table().split())
    assert "The hypothesis and the numbers: sensitivity relative to baseline" in text
    tied = summarise(*study({"baseline": ARMS["qk_norm"], "soft_cap": ARMS["qk_norm"]}))
    order = next(c for c in tied.published if c.ordering.name == "largest stable rate")
    assert order.tau is None and order.headline().endswith("not separated 1.")
    assert "Does not reproduce, the other way round here. Published: baseline below qk_norm (0.006 and 0.04)" in text
    assert "neither confirmed nor refuted. Published: baseline < soft_cap" in text


def test_arms_with_other_settings_stand_for_no_published_method():
    arms = {"baseline": ARMS["baseline"], "qk_norm@optim.beta2=0.9": ARMS["qk_norm"]}
    assert summarise(*study(arms)).published == ()
    texts = {"mine": "mine=soft_cap+qk_norm:eps=1e-5", "baseline": "baseline"}
    methods = {"mine": ["soft_cap", "qk_norm:eps=1e-5"], "baseline": []}
    renamed = study({"baseline": ARMS["baseline"], "mine": ARMS["qk_norm"]}, arm_texts=texts, methods=methods)
    names = [c.ordering.name for c in summarise(*renamed).published]
    assert names == ["largest stable rate", "perplexity at rate 3e-4"]


def test_kendall_tau_by_hand():
    # Six pairs: 2 agree, 2 are reversed, one is tied in the publication only, one here only.
    assert kendall_tau([1, 2, 3, 3.05], [1, 2, 2, 0], tolerance=0.1) == pytest.approx((2 - 2) / math.sqrt(5 * 5))
    assert kendall_tau([1, 2, 3], [2, 1, 3]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 2], [math.inf, math.inf]) is None


def test_no_tau_where_no_pair_is_separated():
    values = {"baseline": {0: 3.0, 1: 4.0, 2: 5.0}, "qk_norm": {0: 3.1, 1: 3.9, 2: 5.05}}
    arms = [Reading(x, canonical([x]), {"best_loss": losses}) for x, losses in values.items()]
    (found,) = compare(arms)
    assert found.count("not separated") == len(found.pairs) == 1
    assert found.tau is None and found.headline().endswith("not separated 1.")
    (apart,) = compare([arms[0], Reading("qk_norm", arms[1].methods, {"best_loss": {0: 2.0, 1: 3.01, 2: 4.0}})])
    assert apart.tau == 1.0 or apart.tau == -1.0
    assert f"Kendall's tau-b {apart.tau:+.2f}" in apart.headline()


def test_published_names_are_those_of_methods():
    names = {name for o in ORDERINGS for key in o.values for name in key.split("+")}
    assert names - {"", "gated_attention_headwise"} <= set(METHODS)
    assert all(o.note and o.citation and "arXiv" in o.citation for o in ORDERINGS)


def test_the_result_is_plain_values(made):
    values = plain(made)
    assert values["verdicts"] == {"baseline": "baseline", "qk_norm": "lower", "soft_cap": "lower"}
    assert values["arms"][1]["ratio"]["n"] == 3 and values["missing"] == 0
    assert values["arms"][0]["points"][-1]["losses"][0] == [0, "nan"]
