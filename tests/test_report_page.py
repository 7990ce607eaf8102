"""What a reader of the report sees first: the answer and its numbers, then which pair and which words are meant."""

import base64
import hashlib
import html
import json
import re
import shutil
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_report import (
    HOSTILE,
    Page,
    add_answers,
    as_adaptive,
    browse,
    in_a_browser,
    luminance,
    make_run,
    text_of,
    undrawn,  # noqa: F401
)

import dposhift_trl.report
from dposhift_trl.report import figures, write_report
from dposhift_trl.report.drawing import color_variables
from dposhift_trl.report.pairs import MOST_NAMED_DOTS
from dposhift_trl.report.run_folder import read_run
from dposhift_trl.report.tokens import Scale, Token, most_changed_words


ROOM = Path(dposhift_trl.report.__file__).parent


def with_intervals(folder: Path) -> Path:
    """A run whose chosen log-ratio has intervals, which narrow on its mean."""
    path = folder / "dpo" / "trainer_state.json"
    state = json.loads(path.read_text())
    for entry in state["log_history"]:
        if (value := entry.get("eval_displacement/chosen")) is not None:
            entry |= {"eval_displacement/chosen_low": value - 0.25, "eval_displacement/chosen_high": value + 0.25}
    path.write_text(json.dumps(state))
    return folder


def add_tokens(folder: Path, text=HOSTILE, rows=(0, 1, 2), factor=1.0) -> Path:
    """Tokens as an evaluation saves them: the answer in pieces of four letters, whose first has the whole change."""
    pairs = folder / "dpo" / "pairs" / "eval-000020.parquet"
    scores = {row["row_index"]: row for row in pq.read_table(pairs).to_pylist()}
    pieces = [text[start : start + 4] for start in range(0, len(text), 4)]
    lines = []
    for row in rows:
        for answer in ("chosen", "rejected"):
            before = (scores[row][f"{answer}_logps"] - scores[row][f"{answer}_logratios"]) / len(pieces)
            for place, piece in enumerate(pieces):
                change = scores[row][f"{answer}_logratios"] if place == 0 else 0.0
                lines.append(
                    {"row_index": row, "answer": answer, "text": piece, "logps": factor * (before + change),
                     "ref_logps": factor * before}
                )  # fmt: skip
    (pairs.parent / "tokens").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines), pairs.parent / "tokens" / pairs.name)
    return folder


def test_the_page_starts_with_the_headline_then_four_rated_numbers_then_the_paragraph(tmp_path, undrawn):  # noqa: F811
    folder = with_intervals(make_run(tmp_path / "run"))
    verdict, page = read_run(folder).verdict, Page(write_report([folder], tmp_path / "out"))
    tiles = [attributes["class"] for tag, attributes in page.tags if tag == "li" and "tile" in attributes["class"]]
    assert tiles == [f"tile {tile.rating}" for tile in verdict.tiles]
    margin, accuracy = verdict.tiles[2:]
    shown = [
        verdict.headline,
        f"Chosen −{-verdict.tiles[0].value:.2f} nats per answer 95% interval −1.29 to −0.79",
        "Rejected −",
        "no interval",
        f"Margin +{margin.value:.2f} nats 95% interval +{margin.low:.2f} to +{margin.high:.2f} ✓ good",
        f"Accuracy {accuracy.value:.1%} of pairs 95% interval {accuracy.low:.1%} to {accuracy.high:.1%} ✓ good",
        verdict.paragraph,
        "Curves",
    ]
    places = [page.text.index(text) for text in shown]
    assert places == sorted(places)
    for tile in verdict.tiles:  # not by its color alone
        assert re.search(rf"[✓!✕?] {tile.rating}\b", page.text)


def test_a_run_without_numbers_has_tiles_that_say_so(tmp_path, undrawn):  # noqa: F811
    folder = make_run(tmp_path / "run", pairs=3)
    (folder / "dpo" / "trainer_state.json").unlink()
    shutil.rmtree(folder / "dpo" / "pairs")
    text = text_of(folder)
    assert read_run(folder).verdict.headline in text
    assert text.count("no interval ? unknown") == 4
    assert "Margin – nats no interval" in text


@pytest.fixture
def drawn(monkeypatch):
    """The figures by name, composed but not rendered."""
    found = {}

    def draw(name, title, alt, figure):
        found[name] = figure
        return figures.Drawing(name, title, alt, b"png", b"svg", "<svg></svg>")

    monkeypatch.setattr(figures, "draw", draw)
    return found


def test_the_chosen_answers_have_a_scale_of_their_own_with_the_reference_and_the_interval(tmp_path, drawn):
    text_of(with_intervals(make_run(tmp_path / "run")))
    axes, both = drawn["chosen"].axes[0], drawn["logratios"].axes[0]
    assert both.get_ylim()[0] < -20
    low, high = axes.get_ylim()
    assert -2 < low < -1.29
    assert 0 <= high < 0.5
    assert [text.get_text() for text in axes.texts] == ["SFT model", "chosen"]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(-1.29, abs=0.01)


def test_a_constant_lambda_is_a_fact_and_a_changing_one_a_figure(tmp_path, drawn):
    text = text_of(make_run(tmp_path / "constant", 0.8))
    assert "lambda" not in drawn
    assert "Lambda 0.8 at every log" in text
    text = text_of(as_adaptive(make_run(tmp_path / "changing")))
    assert "lambda" in drawn
    assert "at every log" not in text


def dots_of(page: Path) -> dict:
    (text,) = re.findall(r'<figure data-dots="([^"]*)">', page.read_text(encoding="utf-8"))
    return json.loads(html.unescape(text))


def place_of(dots: dict, index: int) -> tuple[float, float]:
    left, top, right, bottom = dots["box"]
    (low, high), (lowest, highest) = dots["x"], dots["y"]
    x, y = dots["rejected"][index], dots["chosen"][index]
    return left + (right - left) * (x - low) / (high - low), bottom - (bottom - top) * (y - lowest) / (
        highest - lowest
    )


def test_each_dot_is_where_the_figure_has_it():
    rng = np.random.default_rng(0)
    dots = {"chosen": list(rng.normal(-1, 1, 12)), "rejected": list(rng.normal(-20, 8, 12))}
    drawing = figures.scatter("scatter", "t", np.array(dots["chosen"]), np.array(dots["rejected"]))
    group = re.search(r'<g id="PathCollection_1">(.*?)</g>\s*</g>', drawing.svg.decode(), re.DOTALL)[1]
    places = [(float(x), float(y)) for x, y in re.findall(r'x="([\d.]+)" y="([\d.]+)"', group)]
    computed = [place_of({**drawing.dots, **dots}, index) for index in range(12)]
    assert sorted(places) == [pytest.approx(place, abs=0.01) for place in sorted(computed)]


def test_each_dot_names_its_pair(tmp_path, undrawn):  # noqa: F811
    folder = make_run(tmp_path / "run", pairs=12)
    dots = dots_of(write_report([folder], tmp_path / "out"))
    scores = {row["row_index"]: row for row in pq.read_table(read_run(folder).dpo.pairs[20]).to_pylist()}
    assert sorted(dots["rows"]) == list(range(12))
    assert dots["chosen"] == sorted(dots["chosen"])
    for place, row in enumerate(dots["rows"]):
        assert dots["prompts"][place] == f"question {row}"
        for answer in ("chosen", "rejected"):
            assert dots[answer][place] == pytest.approx(scores[row][f"{answer}_logratios"], abs=5e-4)


def test_of_many_pairs_the_outermost_are_named(tmp_path, undrawn):  # noqa: F811
    count = MOST_NAMED_DOTS + 3
    folder = make_run(tmp_path / "run", pairs=count, steps=(0, 20), text="a")
    dots = dots_of(write_report([folder], tmp_path / "out"))
    assert len(dots["rows"]) == MOST_NAMED_DOTS
    scores = pq.read_table(folder / "dpo" / "pairs" / "eval-000020.parquet").to_pydict()
    left_out = set(range(count)) - set(dots["rows"])
    far = [row for row in range(count) if abs(scores["rejected_logratios"][row] + 20) > 2]
    assert left_out.isdisjoint(far)


@in_a_browser
def test_in_a_browser_pointer_touch_and_keys_say_which_pair_a_dot_is(tmp_path, monkeypatch):
    draw = figures.draw
    plain = figures.Drawing("plain", "t", "a", b"png", b"svg", "<svg></svg>")
    monkeypatch.setattr(figures, "draw", lambda *given: draw(*given) if given[0] == "scatter" else plain)
    folder = add_tokens(make_run(tmp_path / "run", pairs=12, text=HOSTILE))
    rows = pq.read_table(folder / "eval_rows.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([{**row, "prompt": HOSTILE} for row in rows]), folder / "eval_rows.parquet")
    page = write_report([folder], tmp_path / "out")
    dots = dots_of(page)
    x, y = place_of(dots, 7)
    script = f"""
        const figure = page.querySelector("figure[data-dots]"), svg = figure.querySelector("svg");
        const picker = figure.querySelector("[role=slider]"), readout = figure.querySelector(".readout");
        const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width, found = [];
        const at = {{ clientX: box.left + {x} * scale, clientY: box.top + {y} * scale, bubbles: true }};
        const frame = page.defaultView, note = () => found.push(readout.textContent);
        note();
        picker.dispatchEvent(new frame.PointerEvent("pointerdown", at));
        note();
        const ring = svg.querySelector(".ring");
        found.push(Math.hypot(ring.getAttribute("cx") - {x}, ring.getAttribute("cy") - {y}) < 0.1);
        picker.focus();
        for (const key of ["Right", "Home", "Up", "Left", "Left", "End", "Up", "PageDown", "x"]) {{
            const name = ["Right", "Up", "Left"].includes(key) ? "Arrow" + key : key;
            picker.dispatchEvent(new frame.KeyboardEvent("keydown", {{ key: name, bubbles: true, cancelable: true }}));
            note();
        }}
        const token = page.querySelector(".tokens i");
        token.click();
        const told = token.closest("details").querySelector("[role=status]").textContent;
        return [found, picker.getAttribute("aria-valuetext"), picker.getAttribute("aria-valuenow"), told, token.title,
                page.activeElement === picker, page.querySelectorAll("main img, main script").length];
    """
    (found, spoken, number, told, title, focused, made), console = browse(page, 390, tmp_path, script)

    def named(index):
        chosen, rejected = (f"{dots[name][index]:+.2f}".replace("-", "−") for name in ("chosen", "rejected"))
        return f"Row {dots['rows'][index]}: chosen {chosen}, rejected {rejected} nats. “{dots['prompts'][index]}”"

    assert found[0].startswith("Which pair is this?")
    assert found[1:3] == [named(7), True]
    assert found[3:] == [named(index) for index in (8, 0, 1, 0, 0, 11, 11, 1, 1)]
    assert dots["prompts"][0].startswith("<script>alert(1)</script>")
    assert (spoken, number) == (named(1), "2")
    assert told == f"{HOSTILE[:4]}: {title}"
    assert focused
    assert made == 0
    assert console == ""


def test_tokens_are_shown_as_they_are_with_their_shade_and_number(tmp_path, undrawn):  # noqa: F811
    folder = add_tokens(make_run(tmp_path / "run", pairs=3, text=HOSTILE))
    path = write_report([folder], tmp_path / "out")
    source, text = path.read_text(encoding="utf-8"), Page(path).text
    answers = re.findall(r'<pre class="tokens">(.*?)</pre>', source)
    assert len(answers) == 6
    for answer in answers:
        assert html.unescape(re.sub(r"</?i[^>]*>", "", answer)) == HOSTILE
        titles = re.findall(r'<i(?: class="(\w+)")? title="([^"]*)">', answer)
        assert re.fullmatch(r"(fell|rose)[1-4]", titles[0][0])
        assert (titles[0][1][0] == "−") == titles[0][0].startswith("fell")
        assert {title for _, title in titles[1:]} == {titles[1][1]}
        assert titles[1][1].startswith("+0.00 nats: ")
    assert "<script>alert" not in source
    assert "Tokens by the change of their log-probability, in nats or more: fell −" in text
    change = min(pq.read_table(read_run(folder).dpo.pairs[20])["chosen_logratios"].to_pylist())
    assert f"Changed most: <script> −{-change:.2f} nats" in text  # a word goes on over the tokens that belong to it


def test_text_that_runs_right_to_left_turns_no_number_around(tmp_path, undrawn):  # noqa: F811
    text = "\u202eمرحبا"
    source = write_report(
        [add_tokens(make_run(tmp_path / "run", pairs=3, text=text), text=text)], tmp_path / "out"
    ).read_text(encoding="utf-8")
    outside = re.sub(r"<bdi[^>]*>.*?</bdi>|<pre[^>]*>.*?</pre>", "", source, flags=re.DOTALL)
    assert text[:4] in source
    assert "\u202e" not in outside
    assert re.search(r"^pre \{.*unicode-bidi: plaintext;", source, re.MULTILINE)


def test_a_pair_without_tokens_is_plain_text(tmp_path, undrawn):  # noqa: F811
    folder = make_run(tmp_path / "run", pairs=3, text="plain")
    assert 'class="tokens"' not in write_report([folder], tmp_path / "a").read_text()
    add_tokens(folder, text="plain", rows=(1,))
    source = write_report([folder], tmp_path / "b").read_text()
    assert source.count('<pre class="tokens">') == 2
    assert source.count("<pre>plain</pre>") == 2


def test_tokens_of_another_evaluation_are_left_out(tmp_path, undrawn):  # noqa: F811
    folder = add_tokens(make_run(tmp_path / "run", pairs=3), factor=1.5)
    text = text_of(folder)
    assert "tokens/eval-000020.parquet: the tokens of 6 of 6 answers do not add up to the scores" in text
    assert "Changed most" not in text


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", pa.table({"row_index": [0]}), pa.table({"row_index": [0], "answer": ["x"]})]
)
def test_a_broken_file_of_tokens_is_noted_and_the_pairs_are_shown(content, tmp_path, undrawn):  # noqa: F811
    folder = add_tokens(make_run(tmp_path / "run", pairs=3))
    path = folder / "dpo" / "pairs" / "tokens" / "eval-000020.parquet"
    path.write_bytes(content) if isinstance(content, bytes) else pq.write_table(content, path)
    text = text_of(folder)
    assert re.search(r"eval-000020.parquet (is|cannot).*so the words whose probability changed most cannot", text)
    assert "Row 0: chosen" in text


def tokens(*pieces):
    return [Token(text, change - 2.0, -2.0) for text, change in pieces]


def test_words_are_ranked_by_the_sum_over_their_tokens():
    found = most_changed_words(
        tokens(
            (" love", -1.0), ("ly", -0.5), (".", 0.9), (" No", 1.2), ("\n", -0.1), ("天", -0.3), ("地", 0.2), ("!", 0)
        )
    )
    assert [(word.text, round(word.change, 6)) for word in found] == [
        (" lovely", -1.5), (" No", 1.2), (".", 0.9), ("天", -0.3), ("地", 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("largest", "bounds"),
    [
        (10.9, (0.3, 1, 3, 10)),
        (3.0, (0.1, 0.3, 1, 3)),
        (0.29, (0.003, 0.01, 0.03, 0.1)),
        (0.0, (1e-6, 3e-6, 1e-5, 3e-5)),
    ],
)
def test_the_largest_change_has_the_darkest_shade(largest, bounds):
    scale = Scale.of([tokens(("a", -largest), ("b", 0.0))])
    assert scale.bounds == pytest.approx(bounds, rel=1e-12)
    assert scale.shade(0.0) == ""
    if largest:
        assert (scale.shade(-largest), scale.shade(bounds[1])) == ("fell4", "rose2")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_token_can_be_read_on_every_shade(dark):
    style, colors = (ROOM / "page.css").read_text(), color_variables(dark)
    card = re.findall(r"--card: (#\w{6})", (ROOM / "report.html.j2").read_text())[dark]
    shares = [int(share) for share in re.findall(r"color-mix\(in srgb, var\(--tone\) (\d+)%", style)]
    assert len(shares) == 4

    def channels(color):
        return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])

    for tone in ("chosen", "red"):
        for share in shares:
            mixed = channels(colors[tone]) * share / 100 + channels(card) * (1 - share / 100)
            background = "#" + "".join(f"{round(value):02x}" for value in mixed)
            light, dim = sorted([luminance(colors["ink"]), luminance(background)], reverse=True)
            assert (light + 0.05) / (dim + 0.05) >= 4.5, (tone, share)


def test_no_script_but_the_page_s_own_may_run(tmp_path, undrawn):  # noqa: F811
    source = write_report([make_run(tmp_path / "run", pairs=3)], tmp_path / "out").read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', source)[1]
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.count("unsafe-inline") == 1  # styles, which matplotlib writes inline


def test_the_comparison_starts_with_the_recommendation_and_has_tiles_for_each_run(tmp_path, undrawn):  # noqa: F811
    folders = [make_run(tmp_path / name, value, fall=fall) for name, value, fall in (("a", 1.0, 9), ("b", 0.5, 1))]
    page = Page(write_report(folders, tmp_path / "out"))
    headline = "Take b (λ 0.5): its chosen answers are 8.33 nats more likely than DPO's, at an accuracy of"
    assert page.text.index(headline) < page.text.index("Verdict of each run") < page.text.index("Trade-off")
    assert [attributes.get("class", "")[:4] for tag, attributes in page.tags if tag == "li"] == ["tile"] * 8
    assert all(read_run(folder).verdict.headline in page.text for folder in folders)


@pytest.mark.parametrize(
    ("settings", "headline"),
    [
        (
            {"a": (0.9, 1), "b": (0.8, 1)},
            "No recommendation: no run has lambda 1 throughout, so",
        ),
        ({"a": (1.0, 1), "b": (0.8, 9)}, "Keep a (λ 1): no lower lambda kept the chosen answers more likely"),
    ],
    ids=["no DPO", "DPO is best"],
)
def test_the_headline_of_a_comparison_says_when_no_lower_lambda_is_recommended(settings, headline, tmp_path, undrawn):  # noqa: F811
    folders = [make_run(tmp_path / name, value, fall=fall) for name, (value, fall) in settings.items()]
    page = Page(write_report(folders, tmp_path / "out"))
    assert page.text.split("Verdict of each run")[0].count(headline) == 1


@in_a_browser
def test_in_a_browser_neither_page_nor_table_scrolls_sideways_on_a_narrow_phone(tmp_path, undrawn):  # noqa: F811
    name = "a_run_whose_folder_has_a_very_long_name_as_those_of_sweeps_often_do_and_more"
    folders = [make_run(tmp_path / f"{name}_{value}", value, pairs=5) for value in (1.0, 0.9)]
    for folder in folders:
        add_answers(folder, [("a", "b")])
    script = """
        const wide = [...page.querySelectorAll(".scroll")].map(region => region.scrollWidth - region.clientWidth);
        const [first, second] = page.querySelectorAll("#runs tbody td");
        const below = second.getBoundingClientRect().top >= first.getBoundingClientRect().bottom;
        return [page.documentElement.scrollWidth, wide, below, getComputedStyle(first, "::before").content];
    """
    (width, wide, below, label), _ = browse(write_report(folders, tmp_path / "out"), 360, tmp_path, script)
    assert width <= 360
    assert wide == [0]
    assert below  # each number has a line of its own
    assert label == '"λ"'


def test_every_file_of_the_page_is_packaged():
    repository = Path(__file__).parents[1]
    settings = tomllib.loads((repository / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["dposhift_trl"]
    room = repository / "dposhift_trl" / "report"
    files = [path for path in room.iterdir() if path.is_file() and path.suffix != ".py"]
    assert len(files) >= 6
    for path in files:
        assert any(fnmatch(f"report/{path.name}", pattern) for pattern in patterns), path.name
