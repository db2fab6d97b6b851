"""Configuration: every way in gives the same config, and every mistake one clear line."""

import math
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core import config
from poise.core.errors import Conflict, UserError, nearest


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    kind: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self):
        if self.lr <= 0:
            raise UserError(f"lr is {self.lr}, but must be above 0")


@dataclass(frozen=True)
class Model:
    layers: int = 4
    tied: bool = True
    window: int | None = None
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    name: str = "run"
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    size: int


def fault(values, cls=Recipe, where=""):
    with pytest.raises(UserError) as caught:
        config.build(cls, values, where)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestBuild:
    def test_nothing_given_is_the_default(self):
        assert config.build(Recipe, {}) == Recipe()
        assert config.build(Recipe, {"model": {}}) == Recipe()

    def test_values_arrive_in_their_sections(self):
        built = config.build(
            Recipe, {"name": "a", "model": {"layers": 2, "methods": ["x", "y"]}, "optim": {"lr": 1, "clip": "none"}}
        )
        assert built == Recipe("a", Model(2, methods=("x", "y")), Optim(lr=1.0, clip=None))
        assert isinstance(built.optim.lr, float)
        assert isinstance(built.model.methods, tuple)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"optim": {"l": 1}}, "unknown key 'optim.l'"),
            ({"optim": {"lrr": 1}}, "unknown key 'optim.lrr', did you mean 'optim.lr'?"),
            ({"optm": {"lr": 1}}, "unknown key 'optm.lr', did you mean 'optim.lr'?"),
            ({"layers": 3}, "unknown key 'layers', did you mean 'model.layers'?"),
            ({"optim": 3}, "'optim' is a section; set one of its keys, e.g. 'optim.betas'"),
            ({"model": {"layers": "many"}}, "'model.layers' is 'many': it should be a valid integer"),
            ({"model": {"layers": 2.5}}, "'model.layers' is 2.5: it should be a valid integer"),
            ({"model": {"layers": {"a": 1}}}, "'model.layers' is {'a': 1}: it should be a valid integer"),
            ({"optim": {"kind": "adam"}}, "'optim.kind' is 'adam': it should be 'adamw' or 'muon'"),
            ({"optim": {"betas": [0.9]}}, "'optim.betas' is [0.9]"),
            ({"optim": {"lr": "none"}}, "'optim.lr' is 'none'"),
            ({"optim": {"lr": -1}}, "lr is -1.0, but must be above 0"),
            ({"name": None}, "'name' is None"),
        ],
    )
    def test_mistakes(self, values, message):
        assert message in fault(values)

    @pytest.mark.parametrize(
        "values",
        [{"model": {"layers": True}}, {"model": {"window": True}}, {"optim": {"lr": True}}, {"optim": {"clip": False}}],
    )
    def test_true_is_no_number(self, values):
        assert "True, but must be" in fault(values) or "False, but must be" in fault(values)

    def test_true_is_what_it_is_where_it_is_wanted(self):
        assert config.build(Recipe, {"model": {"tied": False}}).model.tied is False

    def test_the_place_is_named(self):
        assert fault({"x": 1}, where="recipe.toml") == "unknown key 'x' in recipe.toml"
        assert fault({"model": {"layers": "a"}}, where="recipe.toml").endswith("in recipe.toml")

    def test_a_value_that_must_be_given(self):
        assert "size" in fault({}, Needs)
        assert config.build(Needs, {"size": 3}) == Needs(3)


class TestLoad:
    def test_reads_toml(self, tmp_path):
        path = tmp_path / "r.toml"
        path.write_text('name = "Größe"\n[optim]\nlr = 3e-3\n', encoding="utf-8")
        assert config.load(path) == {"name": "Größe", "optim": {"lr": 0.003}}

    def test_mistakes(self, tmp_path):
        with pytest.raises(UserError, match="no recipe file"):
            config.load(tmp_path / "none.toml")
        with pytest.raises(UserError, match="cannot read recipe"):
            config.load(tmp_path)
        (tmp_path / "bad.toml").write_text("name = \n")
        with pytest.raises(UserError, match="is not valid TOML"):
            config.load(tmp_path / "bad.toml")
        (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"\n')
        with pytest.raises(UserError, match="cannot read recipe"):
            config.load(tmp_path / "latin.toml")


class TestMergeAndOverrides:
    def test_merge_lays_on_top_and_changes_nothing(self):
        base = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
        over = {"a": {"y": {"z": 5}}, "c": {"d": 1}}
        assert config.merge(base, over) == {"a": {"x": 1, "y": {"z": 5}}, "b": 3, "c": {"d": 1}}
        assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
        assert config.merge({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}
        assert config.merge({"a": {"b": 2}}, {"a": 1}) == {"a": 1}

    @pytest.mark.parametrize(
        ("words", "values"),
        [
            ([], {}),
            (["--lr", "3e-3"], {"lr": 0.003}),
            (["--lr=-1"], {"lr": -1}),
            (["--lr", "-1"], {"lr": -1}),
            (["--a.b", "[1, 2]"], {"a": {"b": [1, 2]}}),
            (["--a.b", "x=y"], {"a": {"b": "x=y"}}),
            (["--a.b=x=y"], {"a": {"b": "x=y"}}),
            (["--a.keep-last", "3"], {"a": {"keep_last": 3}}),
            (["--a", "some text"], {"a": "some text"}),
            (["--a", '"3"'], {"a": "3"}),
            (["--a", ""], {"a": ""}),
            (["--a.b", "1", "--a.c", "2", "--a.b", "3"], {"a": {"b": 3, "c": 2}}),
            (["--a", "2024-01-31"], {"a": "2024-01-31"}),
            (["--a", "12:30:00"], {"a": "12:30:00"}),
            (["--a", "/data/x.txt"], {"a": "/data/x.txt"}),
        ],
    )
    def test_overrides(self, words, values):
        assert config.overrides(words) == values

    @pytest.mark.parametrize("words", [["lr", "3"], ["-l", "3"], ["--"], ["--lr"], ["--lr", "--steps", "3"]])
    def test_overrides_mistakes(self, words):
        with pytest.raises(UserError):
            config.overrides(words)

    def test_from_words_to_config(self):
        words = ["--optim.lr", "3e-3", "--model.tied=false", "--optim.clip", "none", "--name", "17"]
        built = config.build(Recipe, config.overrides(words))
        assert built == Recipe("17", Model(tied=False), Optim(0.003, clip=None))


texts = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12).filter(lambda text: text != "none")
floats = st.floats(allow_nan=False)


class TestToml:
    @given(
        st.builds(
            Recipe,
            texts,
            st.builds(
                Model,
                st.integers(-(2**60), 2**60),
                st.booleans(),
                st.none() | st.integers(0, 9),
                st.lists(texts, max_size=3).map(tuple),
            ),
            st.builds(Optim, st.floats(1e-300, math.inf), st.tuples(floats, floats), st.none() | floats),
            st.dictionaries(texts, floats, max_size=3),
        )
    )
    @settings(max_examples=150, deadline=None)
    def test_what_is_written_is_read_back_equal(self, tmp_path_factory, recipe):
        path = tmp_path_factory.mktemp("t") / "recipe.toml"
        path.write_text(config.to_toml(recipe), encoding="utf-8", newline="")
        assert config.build(Recipe, config.load(path)) == recipe

    def test_none_is_read_back_even_where_it_is_not_the_default(self):
        text = config.to_toml(Recipe(optim=Optim(clip=None)))
        assert "# window is not set" in text
        assert 'clip = "none"' in text

    def test_to_dict_holds_plain_values_and_everything(self):
        assert config.to_dict(Recipe()) == {
            "name": "run",
            "model": {"layers": 4, "tied": True, "window": None, "methods": []},
            "optim": {"lr": 1e-3, "betas": [0.9, 0.95], "clip": 1.0, "kind": "adamw"},
            "weights": {},
        }

    def test_fields_have_dotted_names(self):
        names = {name: kind for name, kind, _ in config.flatten_fields(Recipe)}
        assert names["model.layers"] is int
        assert set(names) >= {"name", "optim.lr", "weights"}
        assert "optim" not in names


class TestErrors:
    def test_nearest_finds_the_leaf_in_another_section(self):
        assert nearest("weight_deca", ["optim.weight_decay", "model.layers"]) == ", did you mean 'optim.weight_decay'?"
        assert nearest("q", ["optim.weight_decay"]) == ""
        assert nearest("q", []) == ""

    def test_a_conflict_is_a_users_mistake_and_a_value_error(self):
        assert issubclass(Conflict, UserError)
        assert issubclass(UserError, ValueError)
