"""The report in a real browser: it opens, at any width and in both colour schemes, and nothing is outside of its place."""

import html
import json
import pathlib
import re
import shutil
import struct
import subprocess

import pytest

import report_cases as cases
from commopt.bench.report import colours, page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (344, 760, 1280)
SCHEMES = {"dark": 0, "light": 1}  # as Chromium counts them

# Measures each frame and leaves what it found in the document, which --dump-dom prints.
MEASURE = """
const inside = (a, b, by) => a.left >= b.left - by && a.right <= b.right + by && a.top >= b.top - by && a.bottom <= b.bottom + by;
const apart = (a, b, by) => a.right <= b.left + by || b.right <= a.left + by || a.bottom <= b.top + by || b.bottom <= a.top + by;
const measure = (page, width) => {
  const found = {width: page.documentElement.clientWidth, scroll: page.documentElement.scrollWidth, outside: [], overlap: [], empty: [], small: [], count: {}};
  const style = of => page.defaultView.getComputedStyle(of);
  for (const svg of page.querySelectorAll('figure > svg')) {
    const frame = svg.getBoundingClientRect(), title = svg.getAttribute('aria-label');
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    for (const [i, [text, box]] of texts.entries()) {
      if (!inside(box, frame, 0.5)) found.outside.push([title, text, frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom]);
      if (box.height < 8.5) found.small.push([title, text, box.height]);
      for (const [other, there] of texts.slice(i + 1)) if (!apart(box, there, 1.5)) found.overlap.push([title, text, other]);
    }
    for (const shape of svg.querySelectorAll('.marker, .bar, .event, .idle, .line, .seeds')) {
      const box = shape.getBoundingClientRect();
      if (!inside(box, frame, 0.5)) found.outside.push([title, shape.getAttribute('class')]);
      if (shape.matches('.marker, .event, .idle') && !(box.width > 0 && box.height > 0)) found.empty.push([title, shape.outerHTML.slice(0, 200)]);
    }
  }
  for (const name of ['section', 'figure', 'figure > svg', 'table', '.legend li', 'h2', '.command', 'dl', '.marker', '.bar', '.event', '.seeds', '.band']) {
    const all = [...page.querySelectorAll(name)];
    found.count[name] = all.length;
    for (const one of all) { const box = one.getBoundingClientRect(); if (name != '.bar' && !(box.width > 0 && box.height > 0)) found.empty.push([name, one.outerHTML.slice(0, 200)]); }
  }
  for (const one of page.querySelectorAll('h1, h2, h3, h4, p, dt, dd, .legend li, .legend code')) {
    const box = one.getBoundingClientRect();
    if (box.right > found.width + 0.5 || box.left < 0) found.outside.push([one.tagName, one.textContent]);
  }
  found.background = style(page.body).backgroundColor;
  found.ink = style(page.querySelector('.value')).fill;
  found.colours = Object.fromEntries([...page.querySelectorAll('.marker, .bar')].filter(s => s.closest('.series, .row')).map(s => [s.closest('.series, .row').getAttribute('class'), style(s).fill]));
  return found;
};
window.onload = () => {
  const out = document.createElement('pre');
  out.id = 'measured';
  out.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(frame => measure(frame.contentDocument)));
  document.body.append(out);
};
"""


@pytest.fixture(scope="module", autouse=True)
def needs_a_browser():
    if BROWSER is None:
        pytest.skip("no Chromium here: `apt-get install chromium` brings one")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    path.write_text(page(cases.all_files(folder)), encoding="utf-8")
    return path


def browse(folder: pathlib.Path, url: str, *options: str, scheme: str) -> tuple[str, str]:
    """What a fresh browser printed on stdout and on stderr."""
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--hide-scrollbars", "--enable-logging=stderr", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--user-data-dir={folder / 'profile'}")
    done = subprocess.run([BROWSER, *quiet, *options, url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def rgb(colour: str) -> str:
    return "rgb({}, {}, {})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_everything_is_in_its_place(report, tmp_path, scheme):
    frames = "".join(f'<iframe style="border:0;width:{width}px;height:4000px;color-scheme:light dark" srcdoc="{html.escape(report.read_text())}"></iframe>' for width in WIDTHS)
    test = tmp_path / "test.html"
    test.write_text(f'<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body>{frames}<script>{MEASURE}</script></body>')
    said, log = browse(tmp_path, test.as_uri(), "--dump-dom", "--window-size=1400,1000", scheme=scheme)
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
    measured = json.loads(html.unescape(re.search(r'<pre id="measured">(.*?)</pre>', said, re.S)[1]))
    assert [m["width"] for m in measured] == list(WIDTHS)
    drawn = report.read_text()
    for m in measured:
        assert m["scroll"] == m["width"], "the page scrolls sideways"
        assert not m["outside"] and not m["overlap"] and not m["empty"] and not m["small"], {k: v[:8] for k, v in m.items() if k in ("outside", "overlap", "empty", "small")}
        for name in ("section", "figure", "table", "dl"):
            assert m["count"][name] == drawn.count(f"<{name}>") + drawn.count(f"<{name} ") > 0
        assert m["count"][".marker"] > 300 and m["count"][".bar"] > 50 and m["count"][".event"] > 50
        dark = scheme == "dark"
        assert m["background"] == rgb("#15181d" if dark else "#ffffff") and m["ink"] == rgb("#e8ebef" if dark else "#1b2027")
        for classes, seen in m["colours"].items():
            [name] = re.findall(r"\b(?:c\d|grey)\b", classes)
            assert seen == rgb(colours.GREY[dark] if name == "grey" else (colours.DARK if dark else colours.LIGHT)[int(name[1])]), classes


def test_it_is_drawn_in_both_schemes(report, tmp_path):
    pictures = {}
    for scheme in SCHEMES:
        browse(tmp_path, report.as_uri(), f"--screenshot={tmp_path / scheme}.png", "--window-size=600,900", scheme=scheme)
        pictures[scheme] = (tmp_path / f"{scheme}.png").read_bytes()
        assert struct.unpack(">II", pictures[scheme][16:24]) == (600, 900) and len(pictures[scheme]) > 20_000, "an empty picture"
    assert pictures["dark"] != pictures["light"]
