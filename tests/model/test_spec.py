"""The spec: validation, claims, round trips."""

from __future__ import annotations

import json
import tomllib
import typing
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import Conflict, UserError
from poise.model.build import build
from poise.model.methods import METHODS, apply_methods, load
from poise.model.presets import PRESETS, preset
from poise.model.spec import SLOTS, Part, Spec
from poise.model.starts import stds

TINY = Spec(vocab_size=61, seq_len=16, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"d_model": 30}, "d_model 30 is not divisible by n_heads 4"),
        ({"n_kv_heads": 3}, r"n_kv_heads 3; use one of \[1, 2, 4\]"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"d_model": 20}, "head width d_model / n_heads is 5"),
        ({"mlp": "swigl"}, "did you mean 'swiglu'"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"norm_eps": float("inf")}, "norm_eps is inf"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"n_layers": 1.5}, "n_layers is 1.5"),
        ({"d_model": "x"}, "d_model is 'x'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"d_ff": 10**400}, "d_ff is above"),
        ({"tied": "no"}, "tied is 'no'"),
        ({"mlp": 3}, "mlp is 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(changes, says):
    with pytest.raises(UserError, match=says) as caught:
        replace(TINY, **changes)
    assert "\n" not in str(caught.value)


def test_the_width_suggested_for_indivisible_heads_is_valid():
    with pytest.raises(UserError) as caught:
        replace(TINY, d_model=30)
    replace(TINY, d_model=int(str(caught.value).rsplit(" ", 1)[1]))


def test_specs_are_values():
    assert hash(TINY) == hash(replace(TINY))
    assert len({TINY, replace(TINY), replace(TINY, n_layers=3)}) == 2


def toml(values, name=""):
    """The shortest TOML writer that can hold a spec; JSON's scalars and lists are TOML's."""
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"[{name}]"] if name else []
    lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if key not in sections]
    lines += [toml(value, f"{name}.{key}".lstrip(".")) for key, value in sections.items()]
    return "\n".join(lines)


@pytest.mark.parametrize("name", [*PRESETS, "with methods"])
def test_round_trip_through_json_and_toml_is_exact(name):
    spec = PRESETS.get(name) or apply_methods(TINY, ["embed_scale:factor=2", "z_loss", "qk_norm"])
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert Spec.from_dict(tomllib.loads(toml(spec.to_dict()))) == spec


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "scale", "kind"]),
        st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.sampled_from(["", "x", "ü"])),
        max_size=4,
    )
)
def test_any_part_survives_a_round_trip(fields):
    part = Part.of("thing", fields)
    back = Part.from_dict(json.loads(json.dumps(part.to_dict())))
    assert back == part and [type(v) for _, v in back.fields] == [type(v) for _, v in part.fields]


def test_from_dict_names_the_mistake():
    good = TINY.to_dict()
    with pytest.raises(UserError, match="unknown model key 'n_layer', did you mean 'n_layers'"):
        Spec.from_dict({**good, "n_layer": 3})
    with pytest.raises(UserError, match="'n_layers' is '3'; give a value of type int"):
        Spec.from_dict({**good, "n_layers": "3"})
    with pytest.raises(UserError, match="'n_layers' is True"):
        Spec.from_dict({**good, "n_layers": True})
    with pytest.raises(UserError, match="needs vocab_size"):
        Spec.from_dict({k: v for k, v in good.items() if k != "vocab_size"})
    with pytest.raises(UserError, match="a part needs a 'name'"):
        Spec.from_dict({**good, "qk": {"eps": 1.0}})


def test_two_claims_on_a_slot_name_both_methods_and_the_mend():
    taken = TINY.claim("qk", Part("qk_norm"), "first")
    with pytest.raises(Conflict, match="'first' and 'second' both claim the slot 'qk'; remove one"):
        taken.claim("qk", Part("none"), "second")
    with pytest.raises(Conflict, match="'first' is applied twice"):
        taken.claim("qk", Part("qk_norm"), "first")
    assert taken.methods == ("first",) and TINY.methods == ()


def test_loss_terms_of_different_names_live_together():
    spec = TINY.claim("loss_terms", Part("a"), "a").claim("loss_terms", Part("b"), "b")
    assert [part.name for part in spec.loss_terms] == ["a", "b"]
    with pytest.raises(Conflict, match=r"'a' and 'c' both claim the slot 'loss_terms\.a'"):
        spec.claim("loss_terms", Part("a"), "c")


def test_diff_tells_what_a_method_changed():
    changed = TINY.diff(apply_methods(TINY, ["qk_norm"]))
    assert changed["qk"] == (Part("none"), Part("qk_norm"))
    assert set(changed) == {"qk", "methods", "claims"}
    assert TINY.diff(TINY) == {}


def test_embed_norm_and_embed_scale_are_in_conflict():
    with pytest.raises(Conflict, match="'embed_norm' and 'embed_scale' both claim the slot 'embed_out'"):
        apply_methods(TINY, ["embed_norm", "embed_scale"])


def test_unknown_names_and_settings_get_the_nearest():
    with pytest.raises(UserError, match="no model method 'qknorm', did you mean 'qk_norm'"):
        apply_methods(TINY, ["qknorm"])
    with pytest.raises(UserError, match="no setting 'coeficient', did you mean 'coefficient'"):
        apply_methods(TINY, ["z_loss:coeficient=1"])
    with pytest.raises(UserError, match="'coefficient' of method 'z_loss' is 'big'; give a value of type float"):
        apply_methods(TINY, ["z_loss:coefficient=big"])
    with pytest.raises(UserError, match="has no value; write z_loss:coefficient=VALUE"):
        apply_methods(TINY, ["z_loss:coefficient"])
    with pytest.raises(UserError, match="give 0 or more"):
        apply_methods(TINY, ["z_loss:coefficient=-1"])
    with pytest.raises(UserError, match="no model preset '7mm', did you mean '7m'"):
        preset("7mm")


@pytest.mark.parametrize(
    "fields", [{"std": "x"}, {"std": float("inf")}, {"embedding_std": True}, {"embedding_std": 0.0}]
)
def test_starting_deviations_of_another_kind_are_refused(fields):
    with pytest.raises(UserError, match="give a finite number above 0"):
        stds(replace(TINY, init=Part.of("default", fields)))


@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_no_model_can_hold_are_refused_in_one_line(name):
    hints = typing.get_type_hints(load(name).apply)
    for key, hint in hints.items():
        kinds = typing.get_args(hint) or (hint,)
        endless = [float("inf"), float("nan"), 1e31, -1e31, 1e-31, 10**400] if float in kinds else []
        for value in endless + ([2**31 + 1, -(10**400)] if int in kinds else []):
            with pytest.raises(UserError) as caught:
                apply_methods(TINY, {name: {key: value}})
            assert "\n" not in str(caught.value) and key in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_the_largest_and_smallest_settings_that_pass_train(name):
    ids_BT = torch.arange(10).view(2, 5)
    for key, hint in typing.get_type_hints(load(name).apply).items():
        for value in (1e30, -1e30, 1e15, -1e15, 1e-30) if float in (typing.get_args(hint) or (hint,)) else ():
            try:
                spec = apply_methods(replace(TINY, d_model=8, d_ff=8, tied=False), {name: {key: value}})
            except UserError:
                continue
            model = build(spec, seed=0)
            loss = model(ids_BT, ids_BT + 1).loss
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert loss.isfinite() and torch.nn.utils.get_total_norm(grads).isfinite(), f"{name} {key}={value}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("z_loss:coefficient=1,coefficient=2", "'coefficient' of method 'z_loss' is given twice"),
        ("z_loss:coefficient=1\ny=2", "holds a line break or '#'"),
        ("z_loss:coefficient=1 # large", "holds a line break or '#'"),
        ("z_loss:coefficient=" + "9" * 5000, "coefficient"),
        ("z_loss:coefficient=" + "[" * 5000, "coefficient"),
    ],
    ids=["twice", "line break", "comment", "digits", "brackets"],
)
def test_settings_that_are_not_one_value_each_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        apply_methods(TINY, [text])


def test_value_residual_needs_a_second_block():
    with pytest.raises(UserError, match="needs 2 blocks or more, but n_layers is 1"):
        apply_methods(replace(TINY, n_layers=1), ["value_residual"])


def test_settings_as_text_and_as_mapping_agree():
    text = apply_methods(TINY, ["qk_norm", "z_loss:coefficient=1e-5"])
    assert text == apply_methods(TINY, {"qk_norm": {}, "z_loss": {"coefficient": 1e-5}})
    assert text.loss_terms == (Part("z_loss", (("coefficient", 1e-5),)),)


def test_exclusion_works_in_both_orders(monkeypatch):
    from poise.model.methods import z_loss

    monkeypatch.setattr(z_loss, "EXCLUDES", {"qk_norm": "a reason of the paper"})
    for order in (["z_loss", "qk_norm"], ["qk_norm", "z_loss"]):
        with pytest.raises(Conflict, match="exclude each other: a reason of the paper"):
            apply_methods(TINY, order)


def test_every_slot_of_the_docstring_is_a_slot():
    from poise.model import slots, spec

    assert set(SLOTS) == set(slots.HOUSE)
    assert all(f"`{slot}`" in (spec.__doc__ or "") for slot in SLOTS)


def test_a_part_that_no_slot_knows_is_refused():
    from poise.model.build import build

    with pytest.raises(UserError, match="slot 'qk' has no part 'qk_nrom', did you mean 'qk_norm'"):
        build(replace(TINY, qk=Part("qk_nrom")), seed=0)
    with pytest.raises(UserError, match=r"part 'qk_norm' of slot 'qk' has fields .*unexpected keyword"):
        build(replace(TINY, qk=Part("qk_norm", (("gain", 2.0),))), seed=0)


def test_the_method_table_names_what_the_files_hold():
    from poise.model.methods import load

    for name in METHODS:
        assert load(name).CARD.name == name
        assert apply_methods(replace(TINY, tied=False), [name]).methods == (name,)
