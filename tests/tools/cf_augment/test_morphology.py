"""Spanish and French through the real Apertium, where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, write_jsonl

from tuneutils.tools.cf_augment.edits import Text
from tuneutils.tools.cf_augment.morphology import MorphologyAxis
from tuneutils.tools.cf_augment.outcome import Undecided

INSTALLED = shutil.which("lt-proc") and Path("/usr/share/apertium/apertium-fr-es").is_dir()
needs_apertium = pytest.mark.skipif(
    not INSTALLED, reason="needs the Debian packages apertium, apertium-fr-es"
)


@pytest.fixture(scope="module", params=["es", "fr"])
def axis(request: pytest.FixtureRequest) -> MorphologyAxis:
    return MorphologyAxis(request.param, "swap")


SENTENCES = {
    "es": [
        # Zmigrod et al. 2019, figure 1
        ("El ingeniero alemán es muy experto.", "La ingeniera alemana es muy experta."),
        ("El abogado famoso está cansado.", "La abogada famosa está cansada."),
        ("Vi al niño y a la niña.", "Vi a la niña y al niño."),
        ("El director del museo está cansado.", "La directora del museo está cansada."),
        ("Mi padre y su esposa son simpáticos.", "Mi madre y su esposo son simpáticos."),
        ("Los hombres altos fueron elegidos.", "Las mujeres altas fueron elegidas."),
        ("Ella está contenta.", "Él está contento."),
        ("El artista es bueno.", "La artista es buena."),
        ("Mi hermano mayor es un buen médico.", "Mi hermana mayor es una buena médica."),
        ("La mujer que vi ayer era rubia.", "El hombre que vi ayer era rubio."),
        ("La mesa es roja.", "La mesa es roja."),
    ],
    "fr": [
        ("L'avocat célèbre est fatigué.", "L'avocate célèbre est fatiguée."),
        ("L'homme est grand.", "La femme est grande."),
        ("La femme est grande et belle.", "L'homme est grand et beau."),
        ("Le directeur est vieux.", "La directrice est vieille."),
        ("Elle a vu sa mère et cet homme.", "Il a vu son père et cette femme."),
        ("Un garçon est allé au marché.", "Une fille est allée au marché."),
        ("Mon frère est un bon médecin.", "Ma sœur est un bon médecin."),
        ("Sa sœur est contente.", "Son frère est content."),
        ("Les filles sont belles.", "Les garçons sont beaux."),
        ("Le voisin de ma tante est allemand.", "La voisine de mon oncle est allemande."),
        ("Il pleut.", "Il pleut."),
    ],
}


@needs_apertium
def test_what_agrees_changes_and_nothing_else(axis: MorphologyAxis) -> None:
    for source, expected in SENTENCES[axis.language]:
        text = Text(source)
        made = axis.versions([text], b"")
        assert not made or not isinstance(made[0], Undecided), made
        assert (text.written(made[0].edits[0]) if made else source) == expected


@needs_apertium
@pytest.mark.parametrize(
    ("language", "text", "kind"),
    [
        ("es", "María es abogada.", "name"),
        ("es", "La casa es vieja. Ella es fea.", "pronoun"),
        ("es", "Él la vio.", "pronoun"),
        ("es", "El jefe está enfadado.", "agreement"),
        ("fr", "Mon frère aîné dort.", "agreement"),
    ],
)
def test_abstains(language: str, text: str, kind: str) -> None:
    (made,) = MorphologyAxis(language, "swap").versions([Text(text)], b"")
    assert isinstance(made, Undecided)
    assert made.kind == kind


@needs_apertium
def test_marks_of_the_stream_format_go_through() -> None:
    text = Text("El [niño] ^come$ <b>pan</b> / @ 100 \\ {x} y 🙂 ríe.")
    (made,) = MorphologyAxis("es", "swap").versions([text], b"")
    assert not isinstance(made, Undecided)
    assert text.written(made.edits[0]) == text.source.replace("niño", "niña")


@needs_apertium
def test_a_text_longer_than_the_pipes_hold() -> None:
    text = Text("El abogado famoso está cansado. " * 2000)
    (made,) = MorphologyAxis("es", "swap").versions([text], b"")
    assert not isinstance(made, Undecided)
    assert text.written(made.edits[0]) == "La abogada famosa está cansada. " * 2000


def test_without_apertium(
    click_cli: Callable[..., Result], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    write_jsonl(Path("in.jsonl"), [{"text": "Hola."}])
    done = click_cli("cf-augment", "--lang", "es", "in.jsonl")
    assert (done.code, "apt-get install apertium" in done.error) == (69, True)
