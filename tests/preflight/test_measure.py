"""``poise check --model``: the family's models, the start, the proxies, the fit, and that the budget is kept."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from poise.core.errors import UserError
from poise.model.spec import Part
from poise.optim.build import OptimConfig
from poise.preflight import measure_proxies
from poise.preflight.measure import measure
from poise.preflight.measure_family import block_weights, of_recipe, of_settings
from poise.preflight.measure_findings import MEASURED
from poise.preflight.measure_forecast import Forecast, Point, forecast
from poise.preflight.measure_judge import judge
from poise.preflight.measure_proxies import Batch, Run, optimizer_config, plan, rates, runs, train
from poise.preflight.measure_start import Start, start
from poise.preflight.measure_text import Text, real, zipf
from poise.preflight.measure_widths import widths
from poise.preflight.settings import Settings
from poise.train.recipe import load, shipped

CPU = torch.device("cpu")
GPT = Settings(
    source="mine",
    format="megatron",
    n_layers=24,
    d_model=1024,
    n_heads=16,
    d_ff=4096,
    gated_mlp=False,
    vocab_size=50304,
    tied=True,
    norm="pre",
    norm_kind="layernorm",
    positions="rope",
    qk_norm=False,
    init_std=0.02,
    residual_init="scaled",
    optimizer="adamw",
    lr=3e-4,
)


@pytest.fixture(scope="module")
def text() -> Text:
    return zipf(128, length=5000)


def first(settings: Settings, text: Text, width: int = 64) -> Start:
    spec = of_settings(settings).spec(width, vocab_size=text.vocab_size, seq_len=32, depth=4)
    return start(spec, text.batch(0, 0, 2, 32), 0, CPU)


# -- the family ----------------------------------------------------------------------------------------------------


def test_ratios_are_kept() -> None:
    family = of_settings(replace(GPT, n_kv_heads=4, gated_mlp=True, d_ff=2816))
    spec = family.spec(256, vocab_size=512, seq_len=64)
    assert (spec.n_layers, spec.d_ff, spec.n_heads, spec.n_kv_heads, spec.mlp) == (6, 704, 8, 2, "swiglu")
    assert spec.norm == Part("layernorm")
    assert family.full == pytest.approx(24 * (1024**2 * 2.5 + 3 * 1024 * 2816))


def test_the_start_has_the_size_that_it_has_at_full_width(text: Text) -> None:
    """Matrices and a tied head by the root of the width; the stream behind the embedding as it is."""
    wide = replace(GPT, init_std=0.04, embed_std=0.05)
    seen = first(wide, text)
    assert seen.embedded == pytest.approx(0.05, rel=0.1)
    assert seen.logits == pytest.approx(0.05 * math.sqrt(1024), rel=0.15)
    assert seen.layers[2].weights["qkv"] == pytest.approx(0.04 * math.sqrt(1024 / 64), rel=0.05)
    assert seen.layers[2].weights["mlp_out"] == pytest.approx(0.04 * 4 / math.sqrt(8), rel=0.05)
    untied = first(replace(wide, tied=False), text)
    assert untied.embedded == pytest.approx(0.05, rel=0.1)
    assert untied.logits == pytest.approx(0.04 * math.sqrt(1024), rel=0.15)


def test_methods_are_those_that_the_configuration_speaks_of() -> None:
    given = replace(GPT, norm="reordered", qk_norm=True, z_loss=1e-5, logit_soft_cap=30.0, attn_soft_cap=50.0)
    spec = of_settings(given).spec(64, vocab_size=512, seq_len=64)
    assert set(spec.methods) == {"olmo2_norm", "qk_norm", "z_loss", "final_soft_cap", "soft_cap", "embed_scale"}
    assert dict(spec.loss_terms[0].fields)["coefficient"] == 1e-5


def test_what_cannot_be_represented_is_said() -> None:
    odd = replace(GPT, positions="alibi", n_experts=64, biases=True, dtype="fp16", norm_kind="nonparametric")
    said = " ".join(of_settings(odd).left_out)
    for word in ("alibi", "64 experts", "biases", "fp16", "nonparametric"):
        assert word in said
    assert of_settings(GPT).left_out == ()
    said = " ".join(of_settings(Settings(source="m", format="hf", d_model=64, n_layers=2)).left_out)
    assert all(word in said for word in ("start", "tied", "norms", "positions", "MLP"))


def test_without_a_shape_there_is_no_family() -> None:
    with pytest.raises(UserError, match="does not say n_layers"):
        of_settings(replace(GPT, n_layers=None))


def test_a_recipe_is_its_own_model_where_it_is_small() -> None:
    small, large = of_recipe(load("demo")), of_recipe(load("100m"))
    assert small.own == load("demo").spec()
    assert large.own is None
    spec = large.spec(64, vocab_size=512, seq_len=64)
    assert spec.methods == load("100m").spec().methods
    assert large.full == block_weights(load("100m").spec())


# -- the start -----------------------------------------------------------------------------------------------------


def test_a_sound_start_has_no_findings(text: Text) -> None:
    seen = first(GPT, text)
    assert judge(GPT, seen, None, None, 3e-4) == []
    assert seen.loss == pytest.approx(math.log(128), abs=0.4)
    assert 0.0 < seen.embedding < 1.0
    assert all(layer.gradient > 0 for layer in seen.layers)


def test_a_start_that_is_too_large_is_found(text: Text) -> None:
    seen = first(replace(GPT, init_std=0.2), text)
    found = {one.rule: one for one in judge(GPT, seen, None, None, 3e-4)}
    assert {"measured-start-loss", "measured-start-attention"} <= found.keys()
    assert "above ln V" in found["measured-start-loss"].what
    assert found.keys() <= MEASURED.keys()


def test_a_start_that_is_no_number_is_critical(text: Text) -> None:
    seen = replace(first(GPT, text), loss=math.nan)
    assert [(one.rule, one.severity) for one in judge(GPT, seen, None, None, 3e-4)] == [
        ("measured-start-nonfinite", "critical")
    ]


def test_a_lopsided_gradient_is_a_note_and_an_absurd_one_a_warning(text: Text) -> None:
    seen = first(GPT, text)

    def found(ratio: float) -> list[tuple[str, str]]:
        last = replace(seen.layers[-1], gradient=seen.layers[0].gradient / ratio)
        odd = replace(seen, layers=(*seen.layers[:-1], last))
        return [(one.rule, one.severity) for one in judge(GPT, odd, None, None, 3e-4)]

    assert found(5) == []
    assert found(50) == [("measured-gradient-profile", "note")]
    assert found(1e-4) == [("measured-gradient-profile", "warning")]
    dead = replace(seen, layers=(replace(seen.layers[0], gradient=0.0), *seen.layers[1:]))
    assert [one.rule for one in judge(GPT, dead, None, None, 3e-4)] == ["measured-gradient-zero"]


def test_a_stand_in_is_called_one(text: Text) -> None:
    seen = first(GPT, text)
    odd = replace(seen, layers=(*seen.layers[:-1], replace(seen.layers[-1], gradient=seen.layers[0].gradient / 50)))
    own, other = (judge(GPT, odd, None, None, 3e-4, how)[0].what for how in ("", "width 1024 -> 64"))
    assert "stand-in" not in own
    assert other.endswith("; measured on a stand-in (width 1024 -> 64), not on the configured model")


def test_no_mend_of_the_embedding_where_the_stream_starts_near_one(text: Text) -> None:
    def mend(settings: Settings, embedded: float) -> str:
        seen = first(settings, text)
        last = replace(seen.layers[-1], gradient=seen.layers[0].gradient / 50)
        odd = replace(seen, embedded=embedded, layers=(*seen.layers[:-1], last))
        return judge(settings, odd, None, None, 3e-4)[0].mend

    plain = replace(GPT, residual_init="none")
    assert "embedding" in mend(GPT, 0.02) and "residual" not in mend(GPT, 0.02)
    assert mend(plain, 0.9) == "scale residual outputs by 1 / sqrt(2 layers)"
    assert "embedding" in mend(plain, 0.02) and "residual outputs" in mend(plain, 0.02)
    assert "embedding" not in mend(GPT, 1.1) and "watch" in mend(GPT, 1.1)


# -- widths --------------------------------------------------------------------------------------------------------


def test_what_steps_move_grows_in_the_standard_parametrisation() -> None:
    found = widths(of_settings(GPT), 1e-2, time.perf_counter() + 60, sizes=(32, 64, 128), seeds=1, steps=2)
    assert found is not None
    assert "logits" in found.growing("change_verdict")
    steepest = found.steepest("change")
    assert steepest is not None and steepest[1].mean > 0.2
    assert widths(of_settings(GPT), 1e-2, 0.0) is None


# -- the proxies ---------------------------------------------------------------------------------------------------


def test_a_rate_far_too_high_diverges_and_a_usual_one_does_not(text: Text) -> None:
    spec = of_settings(GPT).spec(32, vocab_size=128, seq_len=64)
    until = time.perf_counter() + 60
    sound = train(spec, OptimConfig(lr=1e-3), 8, 0, text, CPU, until)
    wild = train(spec, OptimConfig(lr=30.0, clip="none"), 8, 0, text, CPU, until)
    assert sound is not None and wild is not None
    assert not sound.diverged and sound.end < sound.start and sound.logit > 0
    assert wild.diverged
    assert sound == train(spec, OptimConfig(lr=1e-3), 8, 0, text, CPU, until)
    assert train(spec, OptimConfig(lr=1e-3), 8, 0, text, CPU, 0.0) is None


def test_the_optimizer_is_that_of_the_configuration() -> None:
    config, odd = optimizer_config(replace(GPT, beta2=0.99, clip=0.0, weight_decay=0.3), 1e-3)
    assert (config.name, config.beta2, config.clip, config.weight_decay, odd) == ("adamw", 0.99, "none", 0.3, ())
    config, odd = optimizer_config(replace(GPT, optimizer="Sophia"), 1e-3)
    assert config.name == "adamw" and "Sophia" in odd[0]


def test_rates_begin_at_the_configured_one_and_stay_below_the_bound() -> None:
    assert rates(1e-3, bounded=False) == pytest.approx((1e-3, 3e-3, 1e-2, 3e-2))
    assert rates(0.05, bounded=False) == pytest.approx((0.05, 0.15))
    assert rates(1e-3, bounded=True) == pytest.approx((1e-3, 3e-3))
    assert rates(2.0, bounded=False) == (2.0,)


def test_a_plan_fits_into_its_time_or_there_is_none(text: Text) -> None:
    family, config = of_settings(GPT), OptimConfig(lr=1e-3)
    needed = plan(family, config, text, CPU, 1e-3, False, (32, 64))
    assert isinstance(needed, float) and 0.1 < needed < 60
    made = plan(family, config, text, CPU, 1e6, False, (32, 64))
    assert isinstance(made, Batch)
    assert len(made.specs) == 2 and len(made.seeds) == 3 and made.steps == 300


def test_what_is_needed_is_enough_and_less_gives_the_configured_rate(
    text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_proxies, "step_seconds", lambda spec, *rest: spec.d_model / 3200)
    family, config = of_settings(GPT), OptimConfig(lr=1e-3)
    needed = plan(family, config, text, CPU, 0.5, False, (32, 64))
    assert isinstance(needed, float) and needed == pytest.approx(4 * 0.03 * 29 / 0.85)
    full, part = (plan(family, config, text, CPU, needed * share, False, (32, 64)) for share in (1.0, 0.5))
    assert isinstance(full, Batch) and len(full.rates) == 4 and full.steps >= 20
    assert isinstance(part, Batch) and part.rates == (1e-3,) and len(part.specs) == 2


def test_runs_end_with_the_time(text: Text) -> None:
    spec = of_settings(GPT).spec(32, vocab_size=128, seq_len=64)
    batch = Batch((spec,), (1e-3, 3e-3), (0,), 3)
    said: list[str] = []
    done = list(runs(batch, OptimConfig(lr=1e-3), text, CPU, time.perf_counter() + 60, said.append))
    assert [run.lr for run in done] == [1e-3, 3e-3]
    assert said[-1] == "proxies: 2 of 2 runs of 3 steps"
    assert list(runs(batch, OptimConfig(lr=1e-3), text, CPU, 0.0)) == []


def test_zipf_tokens_repeat_and_batches_are_a_function_of_their_number(text: Text) -> None:
    a, b = text.batch(0, 3, 4, 16), text.batch(0, 3, 4, 16)
    assert torch.equal(a[0], b[0]) and torch.equal(a[0][:, 1:], a[1][:, :-1])
    assert not torch.equal(a[0], text.batch(0, 4, 4, 16)[0])
    counts = np.bincount(text.ids, minlength=128)
    assert counts.argmax() != counts.argmin() and text.ids.max() < 128


# -- the fit -------------------------------------------------------------------------------------------------------


def made_up(
    slope: float, noise: float = 0.0, sizes: tuple[float, ...] = (4e4, 2e5, 1e6), seeds: int = 2
) -> tuple[Run, ...]:
    """Runs whose logit is 10^(0.5 + slope (x - 5) + 1.5 (y + 2) + 0.3 (y + 2)²)."""
    generator = random.Random(0)
    found = []
    for weights in sizes:
        for lr in (1e-3, 3e-3, 1e-2, 3e-2):
            for seed in range(seeds):
                y = math.log10(lr) + 2
                level = 0.5 + slope * (math.log10(weights) - 5) + 1.5 * y + 0.3 * y**2 + generator.gauss(0, noise)
                found.append(Run(64, 2, int(weights), lr, seed, 10**level, 6.0, 5.0, False))
    return tuple(found)


def test_a_law_without_noise_is_found_again() -> None:
    found = forecast(made_up(0.4), 1e10, 100)
    expected = 10 ** (0.5 + 0.4 * 5 + 1.5 * -1 + 0.3)
    assert found.points[0].lr == 1e-3
    for value in (found.points[0].logit, found.points[0].low, found.points[0].high):
        assert value == pytest.approx(expected, rel=1e-3)
    assert found.left_out_error < 1e-6 and abs(found.largest_error) < 1e-6
    assert found.decades == pytest.approx(4.0)
    assert found.crossing is None
    assert forecast(made_up(0.9), 1e10, 100).crossing == pytest.approx(3e-3)


def test_noise_widens_the_interval_and_the_truth_is_inside() -> None:
    truth = 10 ** (0.5 + 0.4 * 5 - 1.5 + 0.3)
    quiet, loud = (forecast(made_up(0.4, noise, seeds=3), 1e10, 100) for noise in (0.02, 0.2))
    for found in (quiet, loud):
        assert found.points[0].low <= truth <= found.points[0].high
    assert loud.points[0].high / loud.points[0].low > 10 * quiet.points[0].high / quiet.points[0].low
    assert loud.left_out_error == pytest.approx(0.2, rel=0.6)


def test_the_interval_is_that_of_a_new_model_not_of_the_mean() -> None:
    found = forecast(made_up(0.4, 0.2, seeds=6), 2e5, 100)
    for one in found.points:
        assert 4 * 0.2 * 0.6 < math.log10(one.high / one.low) < 4 * 0.2 * 1.6  # about two deviations each way


def test_a_law_that_bends_is_betrayed_by_the_largest_size() -> None:
    bent = tuple(replace(run, logit=run.logit * (3.0 if run.weights == 10**6 else 1.0)) for run in made_up(0.4))
    assert forecast(bent, 1e10, 100).largest_error == pytest.approx(math.log10(3), abs=0.02)


def test_the_interval_reaches_to_a_curve_through_the_sizes() -> None:
    """A law with 0.1 (x - 5)² in it: the line falls short, the interval does not."""
    bent = [replace(r, logit=r.logit * 10 ** (0.1 * (math.log10(r.weights) - 5) ** 2)) for r in made_up(0.4)]
    truth = 10 ** (0.5 + 0.4 * 3 + 0.1 * 9 - 1.5 + 0.3)
    found = forecast(bent, 1e8, 100)
    assert found.points[0].logit < 0.7 * truth < truth < 1.5 * found.points[0].high


def test_two_sizes_say_nothing_far_away() -> None:
    two = made_up(0.4, sizes=(4e4, 2e5))
    assert not forecast(two, 1e10, 100).informative
    assert forecast(two, 1e6, 100).informative
    assert forecast(made_up(0.4), 1e10, 100).informative


def test_too_little_gives_a_reason_and_no_number() -> None:
    one_size = [run for run in made_up(0.4) if run.weights == 40000]
    assert "two sizes" in forecast(one_size, 1e10, 100).reason
    diverged = [replace(run, diverged=True) for run in made_up(0.4)]
    found = forecast(diverged, 1e10, 100)
    assert found.points == () and not found.informative
    assert found.diverged(1e-3) == (6, 6)


def point(logit: float, low: float, high: float) -> Forecast:
    return Forecast(made_up(0.4), 1e10, 100, (Point(1e-3, logit, low, high),), 0.1, 0.1, 4.0)


@pytest.mark.parametrize(
    ("values", "severity"),
    [((50.0, 10.0, 200.0), None), ((2e3, 1e2, 5e4), "note"), ((3e4, 1e4, 1e5), "warning"), ((1e6, 1.0, 1e9), None)],
)
def test_a_forecast_is_called_one_and_a_wide_one_says_nothing(
    text: Text, values: tuple[float, float, float], severity: str | None
) -> None:
    found = judge(GPT, first(GPT, text), None, point(*values), 1e-3)
    assert [one.severity for one in found] == ([severity] if severity else [])
    for one in found:
        assert one.rule == "measured-logit-forecast" and one.what.startswith("forecast") and "will" not in one.what


def test_proxies_that_diverge_at_the_configured_rate_are_critical(text: Text) -> None:
    bad = tuple(replace(run, diverged=run.lr < 2e-3) for run in made_up(0.4))
    found = judge(GPT, first(GPT, text), None, Forecast(bad, 1e10, 100, ()), 1e-3)
    assert [(one.rule, one.severity) for one in found] == [("measured-lr-diverged", "critical")]


# -- all of it -----------------------------------------------------------------------------------------------------


def test_a_tiny_budget_is_kept_and_what_was_not_done_is_said() -> None:
    said: list[str] = []
    found = measure(replace(GPT, n_layers=4), minutes=0.01, say=said.append, sizes=(32, 64))
    assert found.seconds < 6  # 0.6 s, and what a loaded machine adds to the parts that are always done
    assert found.start is not None and found.widths is None
    assert any("three widths" in text and "0.2" in text for text in found.not_done)
    assert "synthetic" in found.text and said
    record = found.record()
    assert record["widths"] is None and record["start"]["layers"][0]["number"] == 0
    assert any("not done" in line for line in found.lines())


def test_another_optimizer_and_no_rate_are_said() -> None:
    found = measure(replace(GPT, n_layers=2, lr=None, optimizer="sophia"), minutes=0.005, sizes=(32, 64))
    assert any("learning rate is not said: 0.0013, the usual one" in text for text in found.left_out)
    large = measure(replace(GPT, lr=None, n_layers=2, params=8e9), minutes=0.005, sizes=(32, 64))
    assert any("not said: 0.0003, the usual" in text for text in large.left_out)
    assert any("sophia" in text for text in found.left_out)


@pytest.mark.slow
def test_a_recipe_is_measured_in_half_a_minute() -> None:
    from poise.preflight.read import read_settings

    settings = read_settings([shipped()["demo"]])
    found = measure(settings, minutes=0.6)
    assert found.seconds < 45
    assert "own model" in found.model and "standard library" in found.text
    assert found.widths is not None and found.forecast is not None and found.forecast.runs
    assert not found.forecast.points or found.forecast.points[0].low <= found.forecast.points[0].high
    assert not [one for one in found.findings if one.severity == "critical"]


@pytest.mark.slow
def test_real_text_is_read() -> None:
    found = real(512)
    assert len(found.ids) > 100_000 and found.ids.min() >= 0 and found.ids.max() < 512
