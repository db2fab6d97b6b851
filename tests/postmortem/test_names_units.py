"""Names that frameworks give their columns, and what the numbers count."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from poise.postmortem import Log, read_log, units
from poise.postmortem.readers import names


def read(tmp_path: Path, text: str, name: str = "run.csv") -> Log:
    path = tmp_path / name
    path.write_text(text)
    return read_log(path)


def values(log: Log, name: str = "loss") -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series[name]), strict=True))


# -- names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "meaning"),
    [
        ("current_steps", "step"),  # LLaMA-Factory
        ("time/batch", "step"),  # Composer
        ("train/CrossEntropyLoss", "loss"),  # OLMo
        ("metrics/train/LanguageCrossEntropy", "loss"),  # LLM Foundry
        ("loss/train/total", "loss"),
        ("learning/loss", "loss"),  # MaxText
        ("lm-loss-training/lm loss", "loss"),  # Megatron-DeepSpeed's TensorBoard
        ("loss/reduced_llm_loss", "loss"),  # XTuner
        ("Train/Samples/train_loss", "loss"),  # DeepSpeed's monitor
        ("loss_per_nonpadding_target_token", "loss"),  # T5X
        ("grad-norm/grad-norm", "grad_norm"),
        ("grad/norm/total", "grad_norm"),  # Levanter
        ("optim/total grad norm", "grad_norm"),  # OLMo-core
        ("grad_2.0_norm_total", "grad_norm"),  # Lightning
        ("learning/current_learning_rate", "lr"),
        ("optim/LR (group 0)", "lr"),
        ("optim/learning_rate_group0", "lr"),
        ("lr-DecoupledAdamW/group0", "lr"),
        ("time/token", "tokens"),
        ("throughput/total tokens", "tokens"),
        ("tokens/total", "tokens"),  # Axolotl
        ("metrics/eval/LanguageCrossEntropy", "val_loss"),
        ("eval/lm/c4_en-validation/CE loss", "val_loss"),
        ("lm loss validation", "val_loss"),
        ("loss scale", "loss_scale"),
        ("loss_scale", "loss_scale"),
        ("number of skipped iterations", "skipped_steps"),
        ("optim/step skipped", "skipped_steps"),
        ("consumed samples", "samples"),
        ("samples_count", "samples"),
        ("max_attention_logit", "max_attention_logit"),
        ("train/Z loss", "z_loss"),
        ("train/load balancing loss", "load_balancing_loss"),
        *((name, "loss") for name in ("nll", "train/ce", "xent", "tr_loss", "batch_loss", "mlm_loss", "loss_mean")),
        *((name, "loss") for name in ("train/loss/mean", "losses/train", "loss_lm", "TrainLoss", "trainLoss")),
        *((name, "lr") for name in ("lr-SGD", "lr-Adam", "lr-Muon/pg1", "opt/lr", "schedule/lr")),
        *((name, "grad_norm") for name in ("total_norm", "global_norm", "grads/global_norm", "grad/global_norm")),
        *((name, "grad_norm") for name in ("gradients/norm", "grad_norm_preclip", "grad_norm_before_clip", "grad")),
        *((name, "grad_norm") for name in ("unclipped_grad_norm", "actor/grad_norm", "grad_norm_avg", "gradNorm")),
        *((name, "step") for name in ("itr", "iters", "step_num", "step_count", "batch_idx", "updates", "n_updates")),
        *((name, "step") for name in ("n_steps", "opt_steps", "update_step", "global_iter", "cur_step", "i", "index")),
        ("trainLmLoss", "loss"),
        ("globalStep", "step"),
        ("ValLoss", "val_loss"),
        ("val_nll", "val_loss"),
        ("lr-SGD-momentum", None),
        ("lr-scheduler", None),
        ("value", None),
        ("params/global_norm", None),
        ("layer.3/grad_norm", None),
        ("attn_logit_max@block.0", None),
        ("lm loss vs samples", None),
        ("total_steps", None),
        ("samples_per_second", None),
        ("tokens_per_second", None),
        ("router/aux/loss", None),
        ("params norm", None),
    ],
)
def test_what_a_column_means(raw: str, meaning: str | None) -> None:
    meanings = [*names.ALIASES, *names.FURTHER, names.VAL_LOSS]
    fitting = {m for m in meanings if names.rank(m, raw) is not None}
    assert fitting == ({meaning} if meaning else set())


def test_no_alias_stands_twice() -> None:
    every = [alias for table in (names.ALIASES, names.FURTHER) for aliases in table.values() for alias in aliases]
    assert sorted(set(every)) == sorted(every)


def test_a_perplexity_stands_for_a_loss(tmp_path: Path) -> None:
    text = "step,ppl,val_ppl\n" + "".join(f"{s},{math.exp(4 - s / 8)},{math.e**4}\n" for s in range(8))
    log = read(tmp_path, text)
    assert values(log) == pytest.approx({s: 4 - s / 8 for s in range(8)}) and log.loss_unit == "nats"
    assert values(log, "val_loss")[3] == pytest.approx(4.0)
    assert any("'ppl' is a perplexity; its natural logarithm is the loss" in note for note in log.notes)
    log = read(tmp_path, "step,loss,ppl\n1,3,20.1\n2,2,7.39\n")
    assert values(log) == {1: 3, 2: 2} and values(log, "ppl") == {1: 20.1, 2: 7.39}


def test_bits_stand_for_a_loss(tmp_path: Path) -> None:
    for name in ("bpb", "train/bits_per_byte", "bpc"):
        log = read(tmp_path, f"step,{name}\n1,1.5\n2,1.25\n")
        assert values(log) == {1: 1.5, 2: 1.25} and log.loss_unit == "bits"


def test_one_set_of_several_gives_way_to_the_whole(tmp_path: Path) -> None:
    log = read(tmp_path, "step,loss,eval/c4/loss,eval/loss\n1,3,9,4\n2,2,9,5\n")
    assert values(log, "val_loss") == {1: 4, 2: 5} and values(log, "eval/c4/loss") == {1: 9, 2: 9}


def test_fairseq_counts_updates_and_not_its_fraction_of_an_epoch(tmp_path: Path) -> None:
    records = [
        {"epoch": 1, "update": 0.1 * i, "loss": str(9 - i), "ppl": str(2.0 ** (9 - i)), "num_updates": str(10 * i)}
        | {"lr": "0.0001", "gnorm": "1.5", "loss_scale": "4"}
        for i in range(1, 6)
    ]
    log = read(tmp_path, "".join(json.dumps(record) + "\n" for record in records), "train_inner.jsonl")
    assert values(log) == {10 * i: 9.0 - i for i in range(1, 6)}
    assert values(log, "loss_scale")[10] == 4.0 and values(log, "grad_norm")[50] == 1.5
    assert log.loss_unit == "bits"


# -- loss --------------------------------------------------------------------------------------------


def series(loss: list[float], first: int = 1, **more: list[float]) -> units.Series:
    steps = np.arange(first, first + len(loss))
    return {name: (steps, np.array(x)) for name, x in {"loss": loss, **more}.items()}


@pytest.mark.parametrize(
    ("raw", "unit"), [("loss (bits)", "bits"), ("train/loss_nats", "nats"), ("val_bpb", "bits"), ("orbit_loss", "")]
)
def test_unit_by_name(raw: str, unit: str) -> None:
    assert units.loss_unit({raw: "loss"}, series([3.0]), {}) == unit


@pytest.mark.parametrize(("base", "unit"), [(math.e, "nats"), (2.0, "bits"), (10.0, "")])
def test_unit_by_perplexity(base: float, unit: str) -> None:
    loss = [5.125, 4.0, math.nan, 3.5, 1e4]
    here = series(loss, ppl=[min(base, 1e300) ** x if x < 100 else math.inf for x in loss])
    assert units.loss_unit({"loss": "loss", "ppl": "ppl"}, here, {}) == unit


def test_perplexity_of_held_out_data_belongs_to_its_loss() -> None:
    here = series([9.0, 8.0], val_loss=[3.0, 2.0], eval_ppl=[8.0, 4.0])
    assert units.loss_unit({"loss": "loss", "e": "val_loss", "eval_ppl": "eval_ppl"}, here, {}) == "bits"


@pytest.mark.parametrize(
    ("loss", "first", "unit"),
    [(10.95, 1, "nats"), (15.7, 0, "bits"), (10.95, 100, ""), (13.0, 1, ""), (math.nan, 1, "")],
)
def test_unit_by_the_loss_of_the_initialisation(loss: float, first: int, unit: str) -> None:
    for name in ("vocab_size", "model.vocab_size", "vocab_size V", "padded_vocab_size"):
        assert units.loss_unit({"loss": "loss"}, series([loss, 9.0], first), {name: "50,304"}) == unit
    assert units.loss_unit({"loss": "loss"}, series([loss, 9.0], first), {}) == ""


def test_read_log_says_the_unit(tmp_path: Path) -> None:
    assert read(tmp_path, "step,loss (bits)\n1,3\n2,2\n").loss_unit == "bits"
    assert read(tmp_path, "step,loss\n1,3\n2,2\n").loss_unit == ""


# -- steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("column", "unit"), [("consumed_samples", "samples"), ("tokens_seen", "tokens")])
def test_samples_or_tokens_order_the_rows(tmp_path: Path, column: str, unit: str) -> None:
    log = read(tmp_path, f"{column},loss\n1024,3\n2048,2.5\n3100,2\n")
    assert values(log) == {1024: 3, 2048: 2.5, 3100: 2}
    assert log.step_unit == unit and any(f"'{column}' orders the rows" in note for note in log.notes)


@pytest.mark.parametrize(("column", "unit"), [("consumed_samples", "samples"), ("tokens_seen", "tokens")])
def test_equal_counts_of_samples_or_tokens_are_steps(tmp_path: Path, column: str, unit: str) -> None:
    log = read(tmp_path, f"{column},loss\n1024,3\n2048,2.5\n4096,2\n5120,1.5\n6144,1\n")
    assert values(log) == {1: 3, 2: 2.5, 4: 2, 5: 1.5, 6: 1}
    assert log.step_unit == "steps" and any(f"counted from the {unit}: 1,024" in note for note in log.notes)
    assert log.series[unit][1].tolist() == [1024, 2048, 4096, 5120, 6144]


@pytest.mark.parametrize("tokens", [[512, 512, 512], [900, 300, 500], [1.5, 2.5, 3.5]])
def test_what_does_not_rise_orders_nothing(tmp_path: Path, tokens: list[float]) -> None:
    rows = "".join(f"{t},{3 - i / 2}\n" for i, t in enumerate(tokens))
    log = read(tmp_path, "tokens,loss\n" + rows)
    assert values(log) == {1: 3, 2: 2.5, 3: 2} and log.step_unit == "rows"


def test_steps_go_before_tokens(tmp_path: Path) -> None:
    log = read(tmp_path, "tokens,loss,iter\n1024,3,1\n2048,2,2\n")
    assert values(log) == {1: 3, 2: 2} and values(log, "tokens") == {1: 1024, 2: 2048} and log.step_unit == "steps"


# -- tokens in a step --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"tokens_per_step": "524288", "global_batch_size": "1", "seq_length": "2"}, 524288),
        ({"global_batch_size": "64", "seq_length": "2048"}, 131072),  # Megatron
        ({"global_batch_size": "16", "max_sequence_length": "8192"}, 131072),  # MLPerf
        ({"training.global_batch_size": "32", "training.seq_len": "1024"}, 32768),  # torchtitan
        ({"total_train_batch_size": "128", "cutoff_len": "1,024"}, 131072),  # Trainer, LLaMA-Factory
        (
            {
                "tokens.micro_batch_size": "2",
                "tokens.batch_accumulation_per_replica": "4",
                "parallelism.dp": "8",
                "tokens.sequence_length": "64",
            },
            4096,
        ),  # nanotron
        ({"global_batch_size": "-1", "seq_len": "1024"}, None),
        ({"per_device_train_batch_size": "4", "seq_len": "1024"}, None),  # on how many devices?
        ({"global_batch_size": "x", "seq_len": "nan"}, None),
        ({}, None),
    ],
)
def test_tokens_by_settings(settings: dict[str, str], tokens: int | None) -> None:
    assert units.tokens_per_step(series([3.0, 2.0]), settings) == tokens


def test_tokens_as_counted() -> None:
    counted = [100.0, 200.0, 300.0, 400.0, math.nan, 600.0]
    assert units.tokens_per_step(series([1.0] * 6, tokens=counted), {}) == 100
    assert units.tokens_per_step(series([1.0] * 6, samples=[8.0 * i for i in range(6)]), {"seq_len": "64"}) == 512
    assert units.tokens_per_step(series([1.0] * 6, tokens=[512.0] * 6), {}) is None
    every_tenth = {"tokens": (np.array([10, 20, 30]), np.array([1e3, 2e3, 3e3]))}
    assert units.tokens_per_step(every_tenth, {}) == 100
