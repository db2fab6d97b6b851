"""The rough guess of a language, keeping languages, and lists of URLs."""

from __future__ import annotations

import gzip
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data import record
from poise.data.clean import language
from poise.data.clean.language import KeepLanguage, Language, guess
from poise.data.clean.urls import BlockUrls
from poise.data.readers import Document

# Written for this test: two sentences each about training a model.
TEXTS = {
    "en": "The loss of this model is lower than it was before, and the gradient has not grown at all. If you want "
    "to know which of the documents were in that step, you can ask for them by their number.",
    "de": "Der Verlust des Modells ist kleiner als zuvor, und der Gradient wird nicht mehr größer. Wer wissen will,"
    " welche Texte in einem Schritt waren, kann sie mit der Nummer aus der Liste holen.",
    "fr": "La perte du modèle est plus petite que dans le premier essai et les gradients ne sont pas plus grands. "
    "On peut demander les textes qui étaient dans une étape avec le numéro de la liste.",
    "es": "La pérdida del modelo es más pequeña que en el primer intento y los gradientes no son más grandes. Se "
    "puede pedir los textos que estaban en un paso con el número de la lista.",
    "pt": "A perda do modelo é mais baixa do que na primeira vez e os gradientes não são maiores. Para saber quais "
    "os textos que estavam em um passo, pode-se pedir com o número da lista.",
    "it": "La perdita del modello è più piccola che nella prima prova e i gradienti non sono più grandi. Si possono"
    " chiedere i testi che sono stati in un passo con il numero della lista.",
    "nl": "Het verlies van het model is kleiner dan in de eerste proef en de gradiënt wordt niet groter. Wie wil "
    "weten welke teksten er in een stap waren, kan ze met het nummer uit de lijst halen.",
    "sv": "Förlusten för modellen är mindre än i det första försöket och gradienten har inte blivit större. Den som"
    " vill veta vilka texter som var med i ett steg kan hämta dem med numret från listan.",
    "pl": "Strata modelu jest mniejsza niż w pierwszej próbie i gradient nie jest większy. Jeśli chcesz wiedzieć, "
    "jakie teksty były w tym kroku, to można je pobrać z listy po numerze, a nie tylko po nazwie.",
    "tr": "Modelin kaybı ilk denemeden daha küçük ve gradyan çok büyük değil. Bir adımda olan metinler için listede"
    " her numara ile arama ya da indirme yapılabilir.",
    "ru": "Потери модели меньше, чем в первый раз, и градиент не растёт. Если вы хотите знать, что было на этом "
    "шаге, то тексты можно взять из списка по номеру, а не только по имени.",
    "uk": "Втрати моделі менші, ніж у перший раз, і градієнт не росте. Якщо ви хочете знати, що було на цьому "
    "кроці, то тексти можна взяти зі списку за номером, а не тільки за назвою.",
    "el": "Η απώλεια του μοντέλου είναι μικρότερη και η κλίση δεν μεγαλώνει.",
    "ja": "モデルの損失は前より小さく、勾配も大きくならない。どの文書がその手順にあったかを番号で調べることができる。",
    "zh": "模型的损失比以前小，梯度也没有变大。可以用编号查看这一步用了哪些文件。",
    "ko": "모델의 손실은 전보다 작고 기울기도 커지지 않는다.",
    "he": "ההפסד של המודל קטן יותר והגרדיאנט אינו גדל.",
    "hi": "मॉडल की हानि पहले से कम है और प्रवणता नहीं बढ़ती।",
    "th": "ค่าสูญเสียของแบบจำลองน้อยกว่าเดิม",
    "ar": "الخسارة في هذا النموذج أقل من قبل ولا يزيد التدرج في كل خطوة من التدريب على هذه النصوص",
}


def batch(*texts: str, urls: list[str | None] | None = None) -> pa.RecordBatch:
    places = urls or [None] * len(texts)
    return record.of(
        [Document(t, "s", f"{n}", 0, 0, url=u) for n, (t, u) in enumerate(zip(texts, places, strict=True))]
    )


@pytest.mark.parametrize("name", TEXTS)
def test_two_sentences_are_enough_for(name: str) -> None:
    names, scores = guess(pa.array([TEXTS[name]]))
    assert names == [name]
    assert 0.1 < scores[0] <= 1.0


def test_rows_do_not_touch_and_order_does_not_matter() -> None:
    names, scores = guess(pa.array([*TEXTS.values()]))
    assert names == list(TEXTS)
    back, again = guess(pa.array([*reversed(TEXTS.values())]))
    assert back[::-1] == names and np.array_equal(again[::-1], scores)


def test_what_has_no_language_is_undetermined() -> None:
    names, scores = guess(pa.array(["", " \n", "12 34 56", "= + - ; {}", "qxz wvk zzq", "🙂🙂"]))
    assert set(names) == {"und"} and not scores.any()
    assert guess(pa.array([], pa.string()))[0] == []


def test_a_name_in_another_script_does_not_decide() -> None:
    assert guess(pa.array(["naïve 日本語 loss norm layer token batch spike rate " * 3]))[0] == ["und"]
    assert guess(pa.array([TEXTS["en"] + " 日本語 Ελλάδα"]))[0] == ["en"]


def test_long_documents_are_judged_by_begin_middle_and_end() -> None:
    part = language.SAMPLE
    german = TEXTS["de"] * (4 * part // len(TEXTS["de"].encode()))
    third = TEXTS["de"] * (2 + part // 3 // len(TEXTS["de"]))
    english = TEXTS["en"] * (2 * part // len(TEXTS["en"]))
    assert guess(pa.array([english + third + english]))[0] == ["en"]
    assert guess(pa.array([third + english + third + english + third]))[0] == ["de"]  # most of it is English
    assert guess(pa.array(["日" * part + german + "日" * part]))[0] == ["zh"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=6))
def test_any_text_gets_a_known_language_and_a_score(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    names, scores = guess(pa.array(texts, pa.string()))
    assert len(names) == len(scores) == len(texts)
    for text, name, score in zip(texts, names, scores, strict=True):
        assert name in language.LANGUAGES if score > 0 else name == "und"
        assert 0 <= score <= 1
        assert guess(pa.array([text]))[0] == [name]


def test_only_wanted_languages_are_kept_and_the_rest_gets_a_reason() -> None:
    texts = [TEXTS["en"], TEXTS["de"], TEXTS["ja"], "1 2 3"]
    stage = pickle.loads(pickle.dumps(KeepLanguage(("de", "ja"))))
    out = stage(batch(*texts))
    assert out.column("reason").to_pylist() == ["language", None, None, "language"]
    assert out.column("language").to_pylist() == ["en", "de", "ja", "und"]
    assert out.column("language_score").type == pa.float32()
    assert KeepLanguage(("de", "und"))(batch(*texts)).column("reason").to_pylist() == [
        "language",
        None,
        "language",
        None,
    ]
    strict = KeepLanguage(("en", "de", "ja", "und"), at_least=1.0)(batch(*texts))
    assert strict.column("reason").to_pylist() == ["language", "language", None, None]


def test_columns_that_are_there_are_used() -> None:
    judged = record.set_column(Language()(batch(TEXTS["en"])), "language", pa.array(["fr"]))
    assert KeepLanguage(("fr",))(judged).column("reason").to_pylist() == [None]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"languages": ()}, "at least one"),
        ({"languages": ("english",)}, "english"),
        ({"languages": ("en",), "at_least": 2.0}, "0 to 1"),
        ({"languages": ("en",), "model": "ruogh"}, "rough"),
    ],
)
def test_bad_settings_are_one_line(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        KeepLanguage(**arguments)  # type: ignore[arg-type]


def test_py3langid_is_used_if_asked_for_and_named_if_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    language._langid.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(UserError, match="pip install"):
        Language("py3langid")
    # The real library's interface, without its model.
    identifier = SimpleNamespace(
        labels=["en", "xx"], classify=lambda text: ("xx", 0.75) if "q" in text else ("en", 0.5)
    )
    module = ModuleType("py3langid.langid")
    module.MODEL_FILE = "model"  # type: ignore[attr-defined]
    module.LanguageIdentifier = SimpleNamespace(from_model_file=lambda path, norm_probs: identifier)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "py3langid.langid", module)
    out = KeepLanguage(("xx",), model="py3langid")(batch("q", "a"))
    assert out.column("language").to_pylist() == ["xx", "en"]
    assert out.column("language_score").to_pylist() == [0.75, 0.5]
    assert out.column("reason").to_pylist() == [None, "language"]
    language._langid.cache_clear()


def test_py3langid_itself() -> None:
    pytest.importorskip("py3langid")
    language._langid.cache_clear()
    out = Language("py3langid")(batch(TEXTS["de"], TEXTS["ja"]))
    assert out.column("language").to_pylist() == ["de", "ja"]


LIST = """# not these
bad.com
0.0.0.0 worse.net  # from a hosts file
*.stars.org
https://mixed.org/forum/#top
shop.org/show/?id=7
HTTP://Www.Caps.io:80
"""


@pytest.mark.parametrize(
    ("url", "blocked"),
    [
        ("http://bad.com/x", True),
        ("https://www.bad.com", True),
        ("http://a.b.bad.com:80/q?z=1", True),
        ("http://user:pass@BAD.com./", True),
        ("bad.com", True),
        ("//worse.net/a", True),
        ("http://x.stars.org#top", True),
        ("ftp://caps.io", True),
        ("https://mixed.org/forum", True),
        ("https://www.mixed.org/forum/x?y", True),
        ("https://shop.org/show?id=7", True),
        ("https://shop.org/show/?id=7#x", True),
        ("https://shop.org/show?id=71", False),
        ("https://shop.org/show", False),
        ("https://mixed.org/", False),
        ("https://mixed.org/forums", False),
        ("https://sub.mixed.org/forum", False),
        ("http://notbad.com", False),
        ("http://bad.com.org/", False),
        ("http://good.org/?u=http://bad.com", False),
        ("http://good.org/bad.com", False),
        ("com", False),
        ("", False),
        (None, False),
    ],
)
def test_hosts_and_what_is_under_a_listed_path(tmp_path: Path, url: str | None, blocked: bool) -> None:
    path = tmp_path / "list.txt"
    path.write_text(LIST)
    stage = BlockUrls(str(path))
    out = stage(batch("a", "b", urls=[url, None]))
    assert out.column("reason").to_pylist() == ["url" if blocked else None, None]
    assert stage.blocked(pa.array([None, url], pa.string()).slice(1)).tolist() == [blocked]


def test_a_folder_of_lists_and_packed_lists(tmp_path: Path) -> None:
    (tmp_path / "adult").mkdir()
    (tmp_path / "adult" / "domains").write_text("a.com\n")
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(b"b.com\n"))
    (tmp_path / "README").write_text("not a list at all\n")
    stage = BlockUrls.read(tmp_path)
    assert stage.blocked(pa.array(["http://a.com", "http://b.com", "http://c.com"])).tolist() == [True, True, False]


def test_a_pickle_is_small_and_a_list_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("\n".join(f"host{n}.com" for n in range(1000)))
    stage = BlockUrls(str(path))
    packed = pickle.dumps(stage)
    assert len(packed) < 500 and pickle.loads(packed) == stage
    path.write_text(path.read_text() + "\n# only a comment\n")
    assert pickle.loads(packed).hash == stage.hash
    path.write_text("other.com")
    with pytest.raises(UserError, match="changed"):
        pickle.loads(packed)


@pytest.mark.parametrize(("text", "said"), [("", "empty"), ("# none\n", "empty"), ("good.com\ntwo words\n", "line 2")])
def test_bad_lists_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        BlockUrls(str(path))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"good.com\n" * 99)[:-9])
    with pytest.raises(UserError, match="cannot read"):
        BlockUrls(str(tmp_path / "cut.txt.gz"))
    with pytest.raises(UserError, match="no URL list"):
        BlockUrls(str(tmp_path / "none.txt"))
