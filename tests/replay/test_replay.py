"""Replays: what a page holds is what the model saw, text stays text, and a real browser does what a visitor asks."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from examples import SMALL, WORKED
from hypothesis import given, settings, strategies as st
from matplotlib.image import imread

from pd_jax import BranchResult, ParallelDecoder, Result, Sample
from pd_jax.columns import Coordinates, column_mask
from pd_jax.data.text import pieces, tokenise
from pd_jax.errors import InputError
from pd_jax.layout import unanswered
from pd_jax.params import init_params
from pd_jax.replay import record, write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
HOSTILE = "\"q\" 'a' </script><script>document.title = 'ran'</script> <b>&amp; \u2028 🦉\n塔"


@pytest.fixture(scope="module")
def decoder() -> ParallelDecoder:
    """Two layers of random weights that see their siblings."""
    config = tiny.config(sibling_bias=True)
    params = init_params(config, jax.random.key(0), sibling_bias_start=0.0)
    return ParallelDecoder(config, params, tiny.tokenizer(), (319,))


def result_of(*answers: list[int]) -> Result:
    return Result(tuple(BranchResult("", tuple(ids), "eos") for ids in answers), 1, 1)


def said(sample) -> Result:
    return result_of(*(list(branch.answer) for branch in sample.branches))


def bits(made: dict) -> np.ndarray:
    n = len(made["text"])
    rows = np.frombuffer(base64.b64decode(made["sees"]), np.uint8).reshape(n, -1)
    return np.unpackbits(rows, axis=1)[:, :n].astype(bool)


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=20))
def test_pieces_are_the_text_whatever_is_split(text):
    ids = tokenise(tiny.tokenizer(), text)
    assert "".join(pieces(tiny.tokenizer(), ids)) == tiny.tokenizer().decode(ids)


def test_a_character_stands_at_its_last_token():
    tokenizer = tiny.tokenizer()
    ids = tokenise(tokenizer, "a🦉b")
    assert len(ids) == 6  # a byte is a token
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🦉", "b"]
    assert "\ufffd" in tokenizer.decode(ids[:3])


@pytest.mark.parametrize("visibility", ["columns", "isolated", "prompts"])
def test_a_record_says_whom_tokens_see_and_where_they_stand(decoder, visibility):
    own = decoder.variant(visibility=visibility)
    made = record(own, unanswered(SMALL), said(SMALL))
    layout = own.layout([SMALL])
    assert (made["branch"], made["column"]) == (layout.branch[0].tolist(), layout.column[0].tolist())
    assert made["kind"] == [0, 0, 1, 1, 1, 2, 2, 2]
    coordinates = Coordinates.of(layout)
    np.testing.assert_array_equal(bits(made), np.asarray(column_mask(coordinates, coordinates, visibility))[0])
    assert made["visibility"] == visibility
    assert made["attention"] is None


def test_attention_by_token_adds_up_to_attention_by_place(decoder):
    for sample in (SMALL, WORKED):
        made = record(decoder, unanswered(sample), said(sample), attention=True)
        branch = np.array(made["branch"])
        whole = decoder.attention(decoder.layout([sample]))[0].mean(axis=1)  # [L, 3], heads averaged
        average, *layers = made["attention"]
        for part, expected in zip((average, *layers), (whole.mean(axis=0), *whole), strict=True):
            n = len(branch)
            rows = np.frombuffer(base64.b64decode(part["shares"]), np.uint8).reshape(n, n) / 255
            shares = rows * np.array(part["most"])[:, None]
            assert not shares[~bits(made)].any()
            asking = shares[branch > 0]
            own = branch[branch > 0][:, None] == branch
            places = [(branch == 0) & ~own, own, (branch > 0) & ~own]
            np.testing.assert_allclose([(asking * p).sum(1).mean() for p in places], expected, atol=0.01)


def test_too_many_tokens_are_refused(decoder, monkeypatch):
    monkeypatch.setattr("pd_jax.replay.records.MOST_TOKENS", 16)
    with pytest.raises(InputError, match="at most 16 tokens, d7 has 17"):
        record(decoder, unanswered(WORKED), said(WORKED), title="d7")


def hostile_record(decoder: ParallelDecoder, title: str = HOSTILE, attention: bool = True) -> dict:
    """Two branches: the first says HOSTILE, the second four bytes of an owl."""
    answers = [tokenise(tiny.tokenizer(), HOSTILE), tokenise(tiny.tokenizer(), "🦉")]
    sample = Sample(HOSTILE, ["What is red?", "<i>?"])
    return record(decoder, sample, result_of(*answers), title=title, attention=attention)


def test_a_page_holds_its_records_as_text_and_asks_for_nothing(decoder, tmp_path):
    records = [hostile_record(decoder), hostile_record(decoder, "second", False)]
    write_page(records, tmp_path / "new" / "replay.html")
    page = (tmp_path / "new" / "replay.html").read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 2
    (data,) = re.findall(r'<script id="records" type="application/json">(.*?)</script>', page, re.S)
    assert json.loads(data) == records
    assert not re.search(r"https?:|src=|href=|@import|url\(|fetch|XMLHttp|innerHTML|eval\(", page)
    with pytest.raises(InputError, match="cannot be written"):
        write_page(records, tmp_path)


# In a real browser ----------------------------------------------------------------------------------------------------

# A window has 500 pixels at least; a phone is a frame in it.
PHONE = """<!doctype html><meta name="color-scheme" content="light dark"><body style="margin: 0">
<iframe width="390" height="800" style="border: 0" srcdoc="%s"></iframe>"""

DRIVE = """
<script>
const out = {}
const find = (b, c) => cells.findIndex((_, i) => record.branch[i] === b && record.column[i] === c)
const box = i => { const r = cells[i].getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] }
const seen = () => cells.filter(c => getComputedStyle(c).visibility === "visible").map(c => Number(c.dataset.i))
function mouse(kind, i) {  // at the place where the token is, on whatever is there
  cells[i].scrollIntoView({block: "nearest", inline: "center"})
  const [left, top, right, bottom] = box(i)
  const x = (left + right) / 2, y = (top + bottom) / 2
  document.elementFromPoint(x, y).dispatchEvent(new MouseEvent(kind, {bubbles: true, clientX: x, clientY: y}))
}
function drag(to) { at("column").value = to; at("column").dispatchEvent(new Event("input")) }
const done = () => { const pre = parent.document.createElement("pre"); pre.id = "out"; pre.hidden = true
  pre.textContent = JSON.stringify(out); parent.document.body.append(pre) }
%s
</script>
"""


def browse(page: Path, steps: str, *, phone: bool = False, dark: bool = False) -> tuple[dict, Path]:
    """What `steps` (JavaScript, in the page) have put into `out`, and a screenshot of how they left it."""
    if BROWSER is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on PATH")
    driven, picture = page.with_suffix(".driven.html"), page.with_suffix(".png")
    whole = page.read_text(encoding="utf-8") + DRIVE % steps
    driven.write_text(PHONE % html.escape(whole) if phone else whole, encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000"]
    flags += [f"--user-data-dir={page.parent / 'profile'}", "--window-size=1000,700"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={picture}", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, driven.as_uri()], capture_output=True, text=True, timeout=120)
    dom = re.search(r'<pre id="out" hidden="">(.*?)</pre>', done.stdout, re.S)
    assert dom, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(dom[1])), picture


@pytest.fixture(scope="module")
def page(decoder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "replay.html"
    write_page([hostile_record(decoder, attention=False), hostile_record(decoder, "second")], path)
    return path


def test_a_visitor_steps_drags_plays_hovers_and_clicks(page, decoder):
    made = hostile_record(decoder, attention=False)
    branch, column = np.array(made["branch"]), np.array(made["column"])
    first, last = int(column[branch > 0].min()), int(column.max()) + 1
    out, picture = browse(
        page,
        """
        out.title = document.title
        out.text = cells.map(c => c.textContent)
        out.boxes = cells.map((_, i) => box(i))
        out.start = column
        at("back").click(); at("back").click(); out.back = [column, seen().length]
        at("forward").click(); out.forward = column
        drag(FIRST + 2); out.dragged = [column, seen(), at("where").textContent]
        const i = find(1, FIRST + 2)
        mouse("mouseover", i)
        const tip = at("tip").getBoundingClientRect()
        out.tip = [at("tip").textContent, tip.left, tip.bottom, ...box(i)]
        mouse("click", i)
        out.chosen = chosen
        out.colours = cells.map(c => getComputedStyle(c).backgroundColor)
        out.swatches = [...document.querySelectorAll(".swatch")].map(s => getComputedStyle(s).backgroundColor)
        out.panel = at("panel").textContent
        at("play").click(); out.playing = at("play").textContent
        setTimeout(() => { out.played = column; at("play").click(); out.paused = column }, 1100)
        setTimeout(() => { out.still = column; drag(LAST - 3); at("play").click() }, 3000)
        setTimeout(() => {
          out.end = [column, at("play").textContent]
          mouse("click", i); out.freed = [chosen, at("panel").textContent]
          mouse("click", i)
          done()
        }, 5000)
        """.replace("FIRST", str(first)).replace("LAST", str(last)),
    )
    assert out["title"] == "Replay"  # nothing that was said ran
    for i, text in enumerate(made["text"]):
        shown = text.replace("\n", "↵\n" if branch[i] == 0 else "↵") or "…"
        assert out["text"][i] == ("␣" if text == " " and branch[i] else shown)
    boxes = np.array(out["boxes"])
    for i in np.flatnonzero(branch):
        for j in np.flatnonzero(branch):
            if column[i] == column[j]:
                assert boxes[i][0] == boxes[j][0]  # one column stands below another's
            if branch[i] == branch[j] and column[i] < column[j]:
                assert boxes[i][2] <= boxes[j][0]
                assert boxes[i][1] == boxes[j][1]
            if branch[i] < branch[j]:
                assert boxes[i][3] <= boxes[j][1]
    assert boxes[branch == 0][:, 3].max() <= boxes[branch > 0][:, 1].min()  # the background on top
    assert out["start"] == last
    assert out["back"] == [last - 2, int((column <= last - 2).sum())]
    assert out["forward"] == last - 1
    dragged, seen, where = out["dragged"]
    assert (dragged, where) == (first + 2, f"column {first + 2} of {last}")
    assert seen == np.flatnonzero(column <= first + 2).tolist()
    text, left, bottom, *cell = out["tip"]
    assert text == f"(1, {first + 2}) prompt"
    assert (left, cell[1] - bottom) == (cell[0], pytest.approx(4, abs=1))  # right above its token
    chosen = out["chosen"]
    assert (branch[chosen], column[chosen]) == (1, first + 2)
    background, own, sibling = out["swatches"]
    for j, colour in enumerate(out["colours"]):
        sees = bits(made)[chosen, j]
        expected = background if branch[j] == 0 else own if branch[j] == 1 else sibling
        assert (colour == expected) == sees
    counts = [int((bits(made)[chosen] & part).sum()) for part in (branch == 0, branch == 1, branch == 2)]
    assert counts == [first, 3, 2]
    assert "may see {} of the background, {} of its own branch, {} of siblings".format(*counts) in out["panel"]
    assert out["playing"] == "Pause"
    assert first + 5 <= out["played"] == out["paused"] == out["still"] <= first + 8
    assert out["end"] == [last, "Play"]
    assert out["freed"] == [None, ""]
    pixels = imread(picture)[..., :3]
    for colour in out["swatches"]:  # what is on the screen: more of every colour than the legend has
        rgb = np.array([int(x) for x in re.findall(r"\d+", colour)]) / 255
        assert (np.abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 400


def test_attention_colours_what_gets_most(page, decoder):
    made = hostile_record(decoder, "second")
    out, _ = browse(
        page,
        """
        at("sample").value = 1; at("sample").dispatchEvent(new Event("change"))
        const i = cells.length - 1
        const amount = c => { const m = c.style.background.match(/(\\d+)%/); return m ? Number(m[1]) : null }
        mouse("click", i)
        out.names = [...at("slice").options].map(o => o.text)
        out.average = cells.map(amount)
        out.panel = at("panel").textContent
        at("slice").value = 2; at("slice").dispatchEvent(new Event("change"))
        out.layer = cells.map(amount)
        at("slice").value = ""; at("slice").dispatchEvent(new Event("change"))
        out.off = cells.map(amount)
        done()
        """,
    )
    assert out["names"][:3] == [f"attention: {name}" for name in ("average of all layers", "layer 1", "layer 2")]
    for shown, part in (("average", made["attention"][0]), ("layer", made["attention"][2])):
        n = len(made["text"])
        row = np.frombuffer(base64.b64decode(part["shares"]), np.uint8).reshape(n, n)[-1]
        for j, amount in enumerate(out[shown]):
            assert amount == (pytest.approx(row[j] / 2.55, abs=0.51) if bits(made)[-1, j] else None)
        assert max(x or 0 for x in out[shown]) == 100
    assert out["off"] == [None] * len(made["text"])
    assert "Attention goes to the background" in out["panel"]


def test_a_phone_in_the_dark(page):
    out, picture = browse(
        page,
        """
        mouse("click", find(2, Math.min(...record.column.filter((_, i) => record.branch[i] === 2)) + 3))
        out.width = [innerWidth, document.documentElement.scrollWidth]
        out.controls = ["play", "back", "forward", "column", "where"].map(id => {
          const r = at(id).getBoundingClientRect(); return [r.left, r.right] })
        done()
        """,
        phone=True,
        dark=True,
    )
    assert out["width"] == [390, 390]  # only the grid scrolls sideways
    assert all(left >= 0 and right <= 390 for left, right in out["controls"])
    assert np.median(imread(picture)[:, :390, :3]) < 0.2
