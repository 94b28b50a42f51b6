"""Pairs out of catalogues, memories, line-aligned texts and subtitles that each test writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import invoke, load_tool

polib = pytest.importorskip("polib")

TOOL = load_tool("xl-parallel")
HEADER = 'msgid ""\nmsgstr ""\n"Language: {}\\n"\n"Content-Type: text/plain; charset=UTF-8\\n"\n"Plural-Forms: {}\\n"\n\n'
TWO, SLAVIC, ONE = (
    "nplurals=2; plural=(n != 1);",
    "nplurals=3; plural=(n%10==1 && n%100!=11 ? 0 : n%10>=2 && n%10<=4 && (n%100<10 || n%100>=20) ? 1 : 2);",
    "nplurals=1; plural=0;",
)


def catalogue(folder: Path, lang: str, body: str, plural: str = TWO, domain: str = "app") -> Path:
    path = folder / lang / "LC_MESSAGES" / f"{domain}.po"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER.format(lang, plural) + body, encoding="utf-8")
    return path


def extract(tmp_path: Path, *args: object) -> list[dict]:
    out = tmp_path / "out.jsonl"
    result = invoke(TOOL, "extract", "--force", "-o", out, *args)
    assert result.code == 0, result.stderr
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def failure(*args: object) -> tuple[int, str]:
    result = invoke(TOOL, "extract", *args)
    return result.code, result.stderr


def test_messages_keep_their_format_strings_and_lose_their_accelerators(tmp_path):
    body = 'msgid "_Save %(name)s to {path} (%d%%)"\nmsgstr "_Guardar %(name)s en {path} (%d%%)"\n\n'
    body += '#, fuzzy\nmsgid "guess"\nmsgstr "no"\n\nmsgid "untranslated"\nmsgstr ""\n\n#~ msgid "old"\n#~ msgstr "viejo"\n'
    path = catalogue(tmp_path, "es", body)
    (pair,) = extract(tmp_path, path, "--src-lang", "en", "--tgt-lang", "es")
    assert pair["src"] == "Save %(name)s to {path} (%d%%)"
    assert pair["tgt"] == "Guardar %(name)s en {path} (%d%%)"
    assert (pair["src_lang"], pair["tgt_lang"], pair["origin"]) == ("en", "es", "app")
    (kept,) = extract(tmp_path, path, "--src-lang", "en", "--tgt-lang", "es", "--accelerators")
    assert kept["src"].startswith("_Save")


@pytest.mark.parametrize(
    ("lang", "plural", "forms", "wanted"),
    [
        ("es", TWO, ["%d día", "%d días"], [("%d day", "%d día"), ("%d days", "%d días")]),
        ("ru", SLAVIC, ["%d день", "%d дня", "%d дней"],
         [("%d day", "%d день"), ("%d days", "%d дня"), ("%d days", "%d дней")]),
        ("ja", ONE, ["%d 日"], [("%d days", "%d 日")]),
    ],
)  # fmt: skip
def test_plural_forms_go_with_the_number_that_they_serve(tmp_path, lang, plural, forms, wanted):
    body = 'msgid "%d day"\nmsgid_plural "%d days"\n'
    body += "".join(f'msgstr[{i}] "{form}"\n' for i, form in enumerate(forms))
    catalogue(tmp_path, lang, body, plural)
    found = extract(tmp_path, tmp_path, "--src-lang", "en", "--tgt-lang", lang)
    assert [(p["src"], p["tgt"]) for p in found] == wanted


def test_compiled_catalogues_are_read_like_their_sources(tmp_path):
    path = catalogue(tmp_path, "sw", 'msgid "Open"\nmsgstr "Fungua"\n')
    compiled = tmp_path / "mo" / "sw" / "LC_MESSAGES" / "app.mo"
    compiled.parent.mkdir(parents=True)
    polib.pofile(str(path)).save_as_mofile(str(compiled))
    args = ("--src-lang", "en", "--tgt-lang", "sw")
    assert extract(tmp_path, compiled, *args) == extract(tmp_path, path, *args)


def test_two_other_languages_meet_in_the_same_message(tmp_path):
    for lang, text in (("de", "Öffnen"), ("cy", "Agor")):
        catalogue(tmp_path, lang, f'msgid "Open"\nmsgstr "{text}"\n')
        catalogue(tmp_path, lang, f'msgid "Open"\nmsgstr "{text}!"\n', domain="other")
    catalogue(tmp_path, "de_AT", 'msgid "Open"\nmsgstr "Aufmachen"\n')
    found = extract(tmp_path, tmp_path, "--src-lang", "de", "--tgt-lang", "cy")
    assert [(p["src"], p["tgt"], p["origin"]) for p in found] == [
        ("Öffnen", "Agor", "app"),
        ("Öffnen!", "Agor!", "other"),
    ]


def test_tmx_and_xliff_keep_placeholders(tmp_path):
    tmx = tmp_path / "m.tmx"
    tmx.write_text(
        '<tmx version="1.4"><header/><body><tu><tuv xml:lang="en-GB"><seg>Press <bpt i="1">&lt;b></bpt>OK'
        '<ept i="1">&lt;/b></ept> for <ph x="1">%s</ph></seg></tuv><tuv xml:lang="ar"><seg>اضغط موافق لـ'
        '<ph x="1">%s</ph></seg></tuv></tu><tu><tuv xml:lang="en-GB"><seg>alone</seg></tuv></tu></body></tmx>',
        "utf-8",
    )
    (pair,) = extract(tmp_path, tmx, "--src-lang", "en", "--tgt-lang", "ar")
    assert (pair["src"], pair["tgt"]) == ("Press OK for %s", "اضغط موافق لـ%s")
    old, new = tmp_path / "a.xlf", tmp_path / "b.xliff"
    old.write_text(
        '<xliff version="1.2" xmlns="urn:oasis:names:tc:xliff:document:1.2"><file source-language="en" '
        'target-language="de"><body><trans-unit id="1"><source>Hi <x id="n"/>!</source><target>Hallo <x id="n"/>!'
        "</target></trans-unit></body></file></xliff>",
        "utf-8",
    )
    new.write_text(
        '<xliff version="2.0" srcLang="en" trgLang="de" xmlns="urn:oasis:names:tc:xliff:document:2.0"><file id="f">'
        '<unit id="1"><segment><source>Hi <ph id="n"/>!</source><target>Hallo <ph id="n"/>!</target></segment></unit>'
        "</file></xliff>",
        "utf-8",
    )
    for path in (old, new):
        (pair,) = extract(tmp_path, path, "--src-lang", "en", "--tgt-lang", "de")
        assert (pair["src"], pair["tgt"]) == ("Hi {n}!", "Hallo {n}!")


def test_lines_go_with_lines_and_empty_sides_are_left_out(tmp_path):
    (tmp_path / "c.en").write_text("one\n\nthree\none\n", "utf-8")
    (tmp_path / "c.he").write_text("אחת\nשתיים\nשלוש\nאחת\n", "utf-8")
    found = extract(tmp_path, tmp_path / "c.en", tmp_path / "c.he", "--src-lang", "en", "--tgt-lang", "he")
    assert [(p["src"], p["tgt"]) for p in found] == [("one", "אחת"), ("three", "שלוש")]


def test_subtitles_that_show_together_make_a_pair(tmp_path):
    (tmp_path / "f.en.srt").write_text(
        "1\n00:00:01,000 --> 00:00:03,000\n<i>Where are\nyou?</i>\n\n2\n00:00:03,100 --> 00:00:06,000\n"
        "I am here and I stay.\n\n3\n00:00:20,000 --> 00:00:22,000\nAlone.\n",
        "utf-8",
    )
    (tmp_path / "f.es.vtt").write_text(
        "WEBVTT\n\n00:01.050 --> 00:02.900\n¿Dónde estás?\n\n00:03.200 --> 00:04.400\nEstoy aquí\n\n"
        "00:04.500 --> 00:06.000\ny me quedo.\n",
        "utf-8",
    )
    found = extract(
        tmp_path, tmp_path / "f.en.srt", tmp_path / "f.es.vtt", "--src-lang", "en", "--tgt-lang", "es"
    )
    assert [(p["src"], p["tgt"]) for p in found] == [
        ("Where are you?", "¿Dónde estás?"),
        ("I am here and I stay.", "Estoy aquí y me quedo."),
    ]


def test_bad_input_is_one_line_that_names_it(tmp_path):
    langs = ("--src-lang", "en", "--tgt-lang", "es")
    short, long = tmp_path / "x.en", tmp_path / "x.es"
    short.write_text("a\n", "utf-8")
    long.write_text("a\nb\n", "utf-8")
    code, said = failure(short, long, *langs)
    assert code == 65
    assert "1 lines" in said
    assert "has 2" in said
    assert "align" in said
    code, said = failure(long, short, *langs)
    assert code == 2
    assert "swapped" in said
    (tmp_path / "bad.tmx").write_text("<tmx><body><tu></body></tmx>")
    code, said = failure(tmp_path / "bad.tmx", *langs)
    assert code == 65
    assert "line 1, column" in said
    (tmp_path / "es.mo").write_bytes(b"\xde\x12\x04\x95\x00\x00")
    code, said = failure(tmp_path / "es.mo", *langs)
    assert code == 65
    assert "es.mo" in said
    path = catalogue(tmp_path / "po", "es", 'msgid "Open"\nmsgstr "Abrir"\n')
    code, said = failure(path, "--src-lang", "en", "--tgt-lang", "xx")
    assert code == 65
    assert "en-xx" in said
    code, said = failure(tmp_path / "none", *langs)
    assert code == 66
