"""The page: what it says of every kind of run, that hostile text stays text, and what a browser makes of it."""

import base64
import csv
import gzip
import html.parser
import io
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from kvsuite.analysis.report import analyse
from kvsuite.cli import main
from kvsuite.records import Answer, RunFolder, Timing, read
from kvsuite.report.html import pytest_kv_report, raw, render
from suites.checks import test_partial as partial
from suites.checks.browser import browse, chromium  # noqa: F401
from suites.checks.depth import depth
from suites.checks.test_decision import forced, speed

REPORTS = Path(__file__).parents[2] / "reports" / "cpu"
VOID = {"meta", "input", "br", "img", "link", "hr"}
HOSTILE = (
    "<script>window.taken = 1</script></script><img src=x onerror='window.taken = 1'>\u2028\u2029\u202e\u0645\u0631"
    "\u062d\u0628\u0627 \"quoted\" 'too' &amp; </style></title></svg>{{ 7 * 7 }}\x00\ud800 " + "long " * 2000
)


def failures():
    return partial.run(
        partial.needles("full"), partial.needles("jitter"), partial.needles("m", failed=(1, 2)),
        [partial.timing("full"), partial.timing(status="failed", error="out of memory")],
        **partial.EXPECTED, finished="now",
    )  # fmt: skip


def one_sample():
    answers = [x for m in ("full", "jitter", "m") for x in (*partial.needles(m, n=1), *partial.chats(m, n=1))]
    return partial.run(answers, finished="now")


def hostile():
    """Everywhere that a run holds text."""
    answers = [x for m in ("full", "jitter", HOSTILE) for x in partial.needles(m)]
    answers = [
        replace(a, text=HOSTILE, sample=f"{HOSTILE}{i % partial.N}", type=HOSTILE) for i, a in enumerate(answers)
    ]
    answers += [replace(answers[-1], status="failed", error=HOSTILE, sample="last", score=None)]
    timed = [speed(m, 1.1, length) for m in ("full", HOSTILE) for length in (512, 1024)]
    documents = [forced("full"), forced("jitter", 2e-4), forced(HOSTILE, 0.01)]
    facts = {"methods": ["full", "jitter", HOSTILE], "command": ["-m", HOSTILE], "model": {"name": HOSTILE}}
    return partial.run(answers, timed, *documents, **facts, preset=HOSTILE, started=HOSTILE, finished="now")


RUNS = {
    "in process": lambda: read(REPORTS / "smoke"),
    "servers": lambda: read(REPORTS / "vllm"),
    "speed alone": lambda: read(REPORTS / "decode"),
    "failures": failures,
    "one sample": one_sample,
    "empty": lambda: partial.run(methods=[]),
    "hostile": hostile,
}
PAGES = {}


def page(name):
    """Made once: what it takes is the report."""
    if name not in PAGES:
        PAGES[name] = render([analyse(RUNS[name]())])
    return PAGES[name]


def several():
    if "several" not in PAGES:
        runs = [analyse(x) for x in (read(REPORTS / "smoke"), replace(read(REPORTS / "smoke"), folder=Path("later")))]
        PAGES["several"] = render(runs)
    return PAGES["several"]


class Parsed(html.parser.HTMLParser):
    """Elements that are not closed, in order; tags, ids and addresses; and what is read."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.said, self.packed = [], Counter(), [], [], "", 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        known = dict(attributes)
        self.packed += "type" in known and tag == "script"
        self.ids += [known["id"]] if "id" in known else []
        self.addresses += [value for key, value in known.items() if key in ("src", "href", "action", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.said += data


@pytest.mark.parametrize("name", [*RUNS, "several"])
def test_a_page_is_well_formed_and_asks_nothing_of_any_host(name):
    text = several() if name == "several" else page(name)
    found = Parsed(text)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert all(address.startswith("#") for address in found.addresses), found.addresses
    policy = re.search('Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'")
    assert "script-src 'unsafe" not in policy
    for drawn in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawn)
    assert not re.search(
        r"\bnan\b|\binf\b|None|Undefined", re.sub(r"\s+", " ", "".join(re.findall("<svg.*?</svg>", text)))
    )
    assert len(text.encode(errors="replace")) < 5e6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "in process",
            [
                "int8 Use it. It needs 53 % of the cache's memory and",
                "is a small model",
                "KL divergence",
                "int4 Damaged.",
            ],
        ),
        ("servers", ["fp8_e5m2 Damaged. Its answers are 0.68 times as long", "End-to-end latency", "Capacity"]),
        ("speed alone", ["int8 Its answers were not judged. Decodes 1.32 times as fast", "Speed against length"]),
        ("failures", ["FAILED m: 2 of 8 answers", "FAILED m b8 l1024: out of memory", "m Cannot tell"]),
        ("one sample", ["1 samples", "m Cannot tell. It needs 100 %"]),
        ("empty", ["Nothing was measured: this run has no records.", "There is none."]),
    ],
)
def test_a_page_says_what_its_run_is(name, said):
    read_ = " ".join(Parsed(page(name)).said.split())
    for words in said:
        assert words in read_


def test_hostile_text_stays_text():
    text, plain = page("hostile"), Parsed(page("failures"))
    taken = Parsed(text)
    run = [found.tags["script"] - found.packed for found in (taken, plain)]
    assert run[0] == run[1] > 0
    assert taken.tags["img"] == 0
    whole = re.sub("[\x00\ud800]", "\ufffd", HOSTILE[: HOSTILE.index("long")])
    assert " ".join(whole.split()) in " ".join(taken.said.split())


def test_the_plugin_and_the_command_write_the_same_page(tmp_path, capsysbinary):
    for file in ("run.json", "records.jsonl"):
        (tmp_path / file).write_bytes((REPORTS / "vllm" / file).read_bytes())
    pytest_kv_report(analyse(read(tmp_path)), None)
    assert main(["report", "--html", str(tmp_path)]) == 0
    same = capsysbinary.readouterr().out == (tmp_path / "report.html").read_bytes()
    assert same


def test_a_page_that_cannot_be_drawn_costs_itself_alone(tmp_path):
    said = []
    terminal = SimpleNamespace(write_line=lambda line, **how: said.append(line))
    pytest_kv_report(replace(analyse(replace(failures(), folder=tmp_path)), figures=[None]), terminal)
    assert said[0].startswith(f"no {tmp_path / 'report.html'}: AttributeError: ")
    assert not (tmp_path / "report.html").exists()


def test_several_runs_are_for_pages_alone(capsys):
    assert main(["report", str(REPORTS / "vllm"), str(REPORTS / "smoke")]) == 2
    assert "several runs are shown side by side by --html" in capsys.readouterr().err


def test_a_page_is_not_printed_into_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["report", "--html", "a run"]) == 2
    assert "kvsuite report --html a run > report.html" in capsys.readouterr().err


def test_runs_side_by_side_say_what_changed_or_why_that_cannot_be_told():
    said = " ".join(Parsed(several()).said.split())
    assert "2 runs side by side: smoke, later." in said
    assert "What changed beyond noise later against" in said
    assert "Nothing is worse that can be told." in said
    apart = render([analyse(read(REPORTS / name)) for name in ("vllm", "openvino")])
    assert "are of different models" in " ".join(Parsed(apart).said.split())
    assert "What changed beyond noise" not in page("servers")


def test_records_are_csv():
    run = failures()
    files = {file.name: file for file in raw.files(run)}
    assert {name: file.rows for name, file in files.items()} == {"answer.csv": 24, "timing.csv": 2}
    rows = list(csv.DictReader(io.StringIO(gzip.decompress(base64.b64decode(files["answer.csv"].data)).decode())))
    assert [row["status"] for row in rows].count("failed") == 2
    assert (rows[0]["method"], rows[0]["sample"], rows[0]["tokens"]) == ("full", "n0", "1")
    assert "text" not in rows[0]
    [timed] = (x for x in run.records if isinstance(x, Timing) and x.status == "ok")
    [row, _] = csv.DictReader(io.StringIO(gzip.decompress(base64.b64decode(files["timing.csv"].data)).decode()))
    assert [float(x) for x in row["seconds"].split()] == timed.seconds


def test_a_spreadsheet_computes_nothing_of_a_record():
    [file] = raw.files(partial.run([Answer("=1+1", task="@t", sample="-2", score=-0.0)]))
    [row] = csv.DictReader(io.StringIO(gzip.decompress(base64.b64decode(file.data)).decode()))
    assert (row["method"], row["task"], row["sample"]) == ("'=1+1", "'@t", "'-2")


def test_records_that_do_not_fit_are_said_to_be_elsewhere():
    [file, other] = raw.files(failures(), room=100)
    assert (file.data, other.data) == ("", "")


def large(samples, methods=8):
    """Every answer with a text of its own."""
    names = ["full", "jitter", *(f"m{i}" for i in range(methods - 2))]
    answers = [
        Answer(
            name, task="needle", type="synthetic", sample=f"n{i}", score=float((i + at) % 7 > 0), tokens=[i, at] * 20,
            text=f"{name} {i} " * 20, nbytes=10 + at, cap=99, prompt_tokens=100 + i, prefill_seconds=0.1 * i,
        )
        for at, name in enumerate(names)
        for i in range(samples)
    ]  # fmt: skip
    return partial.run(answers, methods=names, finished="now")


def test_many_samples_make_no_page_too_large(browse):  # noqa: F811
    text = render([analyse(large(depth(200, 1000)))])
    assert len(text.encode()) < 5e6
    found = browse(text)
    assert found.problems == []
    timing = json.loads(found.page.evaluate("JSON.stringify(performance.getEntriesByType('navigation')[0])"))
    assert timing["domContentLoadedEventEnd"] < 2000 * depth(5, 1), "slower machines have their time by day"


# in a browser

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.mark.parametrize("name", [*RUNS, "several"])
def test_a_page_opens_without_a_complaint_and_every_figure_is_drawn(browse, name):  # noqa: F811
    found = browse(several() if name == "several" else page(name), viewport=WIDE)
    figures = found.page.locator("figure svg[role=img]")
    sizes = figures.evaluate_all(
        """all => all.map(svg => {
            const box = svg.getBoundingClientRect();
            const drawn = [...svg.querySelectorAll('.m, .l, .d, .b')].map(x => x.getBoundingClientRect());
            const inside = drawn.filter(b => b.left >= box.left - 8 && b.right <= box.right + 8 && b.top >= box.top - 8
                && b.bottom <= box.bottom + 8);
            return [box.width, box.height, drawn.length, inside.length];
        })"""
    )
    expected = {"in process": 7, "servers": 5, "speed alone": 1, "several": 14, "hostile": 6}
    assert len(sizes) >= expected.get(name, 0)
    for width, height, drawn, inside in sizes:
        assert width > 300
        assert height > 60
        assert drawn > 0
        assert inside == drawn
    assert found.page.evaluate("window.taken") is None
    assert found.problems == []


@pytest.mark.parametrize("name", [*RUNS, "several"])
def test_nothing_is_wider_than_a_phone(browse, name):  # noqa: F811
    found = browse(several() if name == "several" else page(name), viewport=PHONE)
    for details in found.page.locator("details").all():
        details.evaluate("x => { x.open = true; }")
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert found.page.evaluate(wide) <= 0
    assert found.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["in process", "servers", "failures", "empty", "hostile"])
def test_axe_finds_nothing_serious(browse, name, scheme):  # noqa: F811
    found = browse(page(name), viewport=WIDE, color_scheme=scheme)
    for details in found.page.locator("details").all():
        details.evaluate("x => { x.open = true; }")
    assert found.axe() == []


def test_light_and_dark(browse):  # noqa: F811
    def colours(scheme):
        found = browse(page("failures"), color_scheme=scheme).page
        return found.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )

    assert colours("light") != colours("dark")
    assert colours("light")[0] == "rgb(255, 255, 255)"


def test_paper_is_white(browse):  # noqa: F811
    found = browse(page("failures"), color_scheme="dark").page
    found.emulate_media(media="print")
    assert found.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_price_gives_what_tokens_cost(browse):  # noqa: F811
    report = analyse(RUNS["in process"]())
    found = browse(page("in process")).page
    field = found.get_by_label("Price of a machine-hour")
    for typed, price in (("3.6", 3.6), ("0,36", 0.36)):
        field.fill(typed)
        shown = found.locator("[data-rate]").all_inner_texts()
        rates = report.throughput.rates.values()
        wanted = [price / 3600 / rate * 1e6 for rate in rates]
        assert [float(x) for x in shown] == pytest.approx(wanted, rel=0.005)
    for typed in ("", "free", "-1"):
        field.fill(typed)
        assert set(found.locator("[data-rate]").all_inner_texts()) == {"–"}


def test_records_are_downloaded(browse):  # noqa: F811
    found = browse(page("in process"))
    with found.page.expect_download() as waiting:
        found.page.get_by_role("button", name="smoke-forced.csv").click()
    rows = list(csv.DictReader(Path(waiting.value.path()).read_text().splitlines()))
    assert waiting.value.suggested_filename == "smoke-forced.csv"
    assert len(rows) == 160
    assert found.problems == []


def test_everything_can_be_done_with_a_keyboard(browse):  # noqa: F811
    found = browse(page("in process")).page
    found.keyboard.press("Tab")
    assert found.evaluate("document.activeElement.className") == "skip"
    assert found.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    found.keyboard.press("Enter")
    tables = found.locator("section[aria-labelledby=tables] details")
    second = tables.nth(1)
    assert second.get_attribute("open") is None
    second.locator("summary").focus()
    found.keyboard.press("Enter")
    assert second.get_attribute("open") is not None


def test_paper_has_all_tables(browse):  # noqa: F811
    found = browse(page("failures")).page
    found.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert found.locator("details:not([open])").count() == 0
    found.evaluate("dispatchEvent(new Event('afterprint'))")
    assert found.locator("details:not([open])").count() > 0


def test_a_run_that_was_left_is_shown(tmp_path):
    """What a run folder holds is enough, whatever its records say."""
    folder = RunFolder(tmp_path)
    folder.describe(partial.FACTS)
    for answer in (*partial.needles("full"), *partial.needles(HOSTILE.replace("\ud800", ""))):
        folder.append(answer)
    pytest_kv_report(analyse(read(tmp_path)), None)
    assert Parsed((tmp_path / "report.html").read_text()).open == []
