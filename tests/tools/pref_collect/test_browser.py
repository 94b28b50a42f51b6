"""The page in a real browser: keyboard, phone, undo, hostile text, policy, accessibility."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def log_in(chromium: Any, served: Any, **context: Any) -> Any:
    page = chromium.new_context(**context).new_page()
    page.goto(f"{served.url}/login#{served.tokens['rater-0']}")
    page.locator("#rate").wait_for()
    return page


def answered(page: Any, text: str) -> None:
    page.get_by_text(re.compile(text)).wait_for(timeout=30_000)
    # The text is there before the script that listens to the keyboard.
    page.wait_for_load_state("load")


def responses(path: Path) -> list[tuple[str, int]]:
    import json

    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT response, withdrawn FROM answer ORDER BY id").fetchall()
    return [(json.loads(r)["choice"], w) for r, w in rows]


def test_twenty_items_by_keyboard_alone(
    chromium: Any, serve: Callable[..., Any], candidates: Any, tmp_path: Path
) -> None:
    served = serve(candidates(20))
    page = chromium.new_context().new_page()
    page.goto(f"{served.url}/login")
    page.keyboard.type(served.tokens["rater-0"])
    page.keyboard.press("Enter")
    keys = "12345670" * 3
    for i in range(20):
        answered(page, f"^{i} of 20 answered")
        # The script moves the focus here as soon as it listens to the keyboard.
        page.wait_for_function("document.activeElement?.id === 'start'")
        page.keyboard.press(keys[i])
        page.keyboard.press("Enter")
    answered(page, "All done")
    meaning = {"1": 3, "2": 2, "3": 1, "4": 0, "5": -1, "6": -2, "7": -3, "0": "both-bad"}
    assert responses(tmp_path / "study.db") == [(meaning[k], 0) for k in keys[:20]]


def test_keys_work_from_any_control_but_not_in_text(
    chromium: Any, serve: Callable[..., Any], candidates: Any, tmp_path: Path
) -> None:
    served = serve(candidates(3), "--aspect", "helpful")
    page = log_in(chromium, served)
    page.keyboard.press("r")
    page.keyboard.type("12 u 7 better")
    page.keyboard.press("Escape")
    page.keyboard.press("a")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("2")
    page.keyboard.press("e")
    page.keyboard.type("Mine.")
    page.keyboard.press("Control+Enter")
    answered(page, "^1 of 3")
    with sqlite3.connect(tmp_path / "study.db") as db:
        (stored,) = db.execute("SELECT response FROM answer").fetchone()
    assert '"reason": "12 u 7 better"' in stored
    assert '"edited": "Mine."' in stored
    assert '"choice": 2' in stored
    assert '"aspects": {"helpful": 2}' in stored


def test_undo_shows_the_answer_again(
    chromium: Any, serve: Callable[..., Any], candidates: Any, tmp_path: Path
) -> None:
    page = log_in(chromium, serve(candidates(2)))
    for i, key in enumerate("17"):
        answered(page, f"^{i} of 2")
        page.keyboard.press(key)
        page.keyboard.press("Enter")
    answered(page, "All done")
    page.keyboard.press("u")
    answered(page, "^1 of 2")
    assert page.locator("input[name=choice]:checked").get_attribute("value") == "-3"
    page.keyboard.press("u")
    answered(page, "^0 of 2")
    assert page.locator("input[name=choice]:checked").get_attribute("value") == "3"
    page.keyboard.press("4")
    page.keyboard.press("Enter")
    answered(page, "^1 of 2")
    assert page.locator("input[name=choice]:checked").get_attribute("value") == "-3"
    assert responses(tmp_path / "study.db") == [(3, 1), (-3, 1), (0, 0)]


def test_phone(chromium: Any, serve: Callable[..., Any], candidates: Any) -> None:
    served = serve(candidates(2, prompt="A long question " * 20), "--aspect", "helpful")
    page = log_in(chromium, served, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    top, bottom = (page.locator(f"#answer-{i}").bounding_box()["y"] for i in (1, 2))
    assert bottom > top + 40, "answers are stacked"
    for point in page.locator("#choices .point, #choices button, #choices .both-bad").all():
        box = point.bounding_box()
        assert box["width"] >= 44
        assert box["height"] >= 44
    save = page.get_by_role("button", name="Save")
    assert save.bounding_box()["y"] < 740, "the choices are at hand without scrolling"
    page.get_by_role("radio", name="B better").last.tap()
    save.tap()
    answered(page, "^1 of 2")


def test_model_output_stays_text(chromium: Any, serve: Callable[..., Any], candidates: Any) -> None:
    rows = candidates(1, prompt=HOSTILE)
    rows[0]["completion_a"], rows[0]["completion_b"] = HOSTILE, f'" autofocus onfocus="x" {HOSTILE}'
    served = serve(rows, "--title", f"T {HOSTILE}")
    page = log_in(chromium, served)
    page.wait_for_timeout(200)
    assert "owned" not in page.title().replace("title='owned'", "")
    assert page.locator("main script, main img").count() == 0
    assert page.locator(".prompt .text").inner_text() == HOSTILE
    page.keyboard.press("e")
    page.get_by_role("button", name="Start from Answer A").click()
    assert HOSTILE in page.locator("#edited").input_value()
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    page.get_by_text("All done").wait_for()
    page.keyboard.press("u")
    page.locator("#edited").wait_for()
    assert HOSTILE in page.locator("#edited").input_value(), "a rater's own HTML comes back as text"
    assert "owned" not in page.title().replace("title='owned'", "")


def test_policy_blocks_what_is_injected(chromium: Any, serve: Callable[..., Any], candidates: Any) -> None:
    page = log_in(chromium, serve(candidates(1)))
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          try { script.textContent = "document.title = 'owned'"; document.body.append(script); } catch {}
          const far = document.createElement("img");
          far.src = "https://example.org/steal";
          document.body.append(far);
          const styled = document.createElement("p");
          styled.setAttribute("style", "color: rgb(1, 2, 3)");
          styled.id = "styled";
          document.body.append(styled);
          try { document.body.insertAdjacentHTML("beforeend", "<b id='sunk'>x</b>"); } catch {}
        }"""
    )
    page.wait_for_timeout(300)
    assert page.title() != "owned"
    assert page.locator("#sunk").count() == 0
    assert page.locator("#styled").evaluate("e => getComputedStyle(e).color") != "rgb(1, 2, 3)"
    assert any("img-src" in text for text in refused)


def test_works_without_javascript(chromium: Any, serve: Callable[..., Any], candidates: Any) -> None:
    served = serve(candidates(2))
    page = chromium.new_context(java_script_enabled=False).new_page()
    page.goto(f"{served.url}/login")
    page.fill("#token", served.tokens["rater-0"])
    page.click("text=Log in >> nth=-1")
    page.locator("#choices input[value='1']").check()
    page.get_by_role("button", name="Save").click()
    assert page.locator("label[for=progress]").inner_text() == "1 of 2 answered"
    page.get_by_role("button", name="Undo").click()
    assert page.locator("label[for=progress]").inner_text() == "0 of 2 answered"


def test_a_lost_connection_keeps_the_answer(
    chromium: Any, serve: Callable[..., Any], candidates: Any
) -> None:
    page = log_in(chromium, serve(candidates(2)))
    page.keyboard.press("3")
    page.context.set_offline(True)
    page.keyboard.press("Enter")
    page.get_by_text("not saved yet").wait_for()
    page.context.set_offline(False)
    page.keyboard.press("Enter")
    answered(page, "^1 of 2")


def test_shortcuts_can_be_turned_off(chromium: Any, serve: Callable[..., Any], candidates: Any) -> None:
    """WCAG 2.1.4: single-character shortcuts get in the way of speech input."""
    page = log_in(chromium, serve(candidates(1)))
    page.keyboard.press("?")
    page.get_by_label("Single-key shortcuts are on").uncheck()
    page.reload()
    page.keyboard.press("1")
    assert page.locator("input[name=choice]:checked").count() == 0


ACCESSIBLE = """() => {
  const problems = [];
  const named = e => (e.labels && [...e.labels].some(l => l.innerText.trim())) || e.ariaLabel ||
    e.textContent.trim() || e.labels?.[0]?.textContent.trim();
  for (const e of document.querySelectorAll("input:not([type=hidden]), textarea, button, progress, summary"))
    if (!named(e)) problems.push("no name: " + e.outerHTML.slice(0, 80));
  for (const tag of ["main", "header", "footer", "h1"])
    if (document.querySelectorAll(tag).length !== 1) problems.push("not one " + tag);
  const levels = [...document.querySelectorAll("h1,h2,h3")].map(h => +h.tagName[1]);
  levels.reduce((a, b) => { if (b > a + 1) problems.push("heading skipped"); return b; }, 0);
  for (const f of document.querySelectorAll("fieldset"))
    if (!f.querySelector("legend")?.textContent.trim()) problems.push("fieldset without legend");
  for (const s of document.querySelectorAll("section"))
    if (!document.getElementById(s.getAttribute("aria-labelledby"))) problems.push("section without name");
  const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
  if (new Set(ids).size !== ids.length) problems.push("an id comes twice");
  if (!document.documentElement.lang) problems.push("no language");
  if (document.querySelectorAll("[tabindex]:not([tabindex='-1'])").length) problems.push("focus order");
  if (!document.querySelector("[role=alert]")) problems.push("no live region");
  const rgb = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 && m[3] === 0 ? null : m; };
  const lum = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 :
    ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const back = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c) return c; } return [255, 255, 255]; };
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.matches(":disabled, :disabled *"))
      continue;
    if (!e.getClientRects().length || e.matches("textarea, option")) continue;
    const [a, b] = [lum(rgb(getComputedStyle(e).color)), lum(back(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) problems.push("contrast " + ratio.toFixed(2) + ": " + e.outerHTML.slice(0, 80));
  }
  return problems;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("mode", ["compare", "rate"])
def test_readable_by_everyone(
    chromium: Any, serve: Callable[..., Any], candidates: Any, scheme: str, mode: str
) -> None:
    """Names, landmarks, headings, focus order, live region and contrast (WCAG 2.2 AA, 4.5:1)."""
    rows = candidates(2)
    if mode == "rate":
        rows = [{"prompt": r["prompt"], "completion": r["completion_a"]} for r in rows]
    served = serve(rows, "--aspect", "helpful")
    page = log_in(chromium, served, color_scheme=scheme, reduced_motion="reduce")
    page.keyboard.press("?")
    page.keyboard.press("r")
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    page.wait_for_timeout(200)
    assert page.evaluate(ACCESSIBLE) == []
    moving = page.evaluate(
        "() => [...document.querySelectorAll('*')].filter(e => parseFloat(getComputedStyle(e).transitionDuration) > 0).length"
    )
    assert moving == 0
    if mode == "compare":
        page.keyboard.press("0")
        assert page.evaluate(ACCESSIBLE) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(chromium: Any, serve: Callable[..., Any], candidates: Any, scheme: str) -> None:
    """Deque's axe-core on each kind of page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    served = serve(candidates(1), "--aspect", "helpful")
    page = chromium.new_context(color_scheme=scheme).new_page()
    page.goto(f"{served.url}/login")
    found = axe.run(page).response["violations"]
    page.goto(f"{served.url}/login#{served.tokens['rater-0']}")
    page.locator("#rate").wait_for()
    for key in "?re":
        page.keyboard.press(key)
        page.keyboard.press("Escape")
    found += axe.run(page).response["violations"]
    page.keyboard.press("0")
    found += axe.run(page).response["violations"]
    page.keyboard.press("Enter")
    page.get_by_text("All done").wait_for()
    found += axe.run(page).response["violations"]
    assert [(v["id"], [n["html"][:100] for n in v["nodes"]]) for v in found] == []
