"""The report page over a synthetic run's folder: every row, nothing loaded from elsewhere, untrusted text escaped."""

from __future__ import annotations

import json
import random
import re
import shutil
import statistics
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from cluster.report import build_report, leaderboard_text, robustness_charts
from cluster.report_charts import Point, Series, line_chart, linear_ticks, log_ticks, spread
from cluster.report_text import caveat, decimals, headline, metric_name, number
from data_shards.errors import UserError
from training.events import append_event

METHODS = ("scratch", "finetune", "freezed", "reptile")
QUALITY = {"scratch": 2.1, "finetune": 0.42, "freezed": 0.55, "reptile": 0.47}
DOMAINS = ("quickdraw-lighthouse", "quickdraw-teapot", "mnist-7", "kanjivg")
COPIED = ("mnist-7", "freezed", 2)
BUDGET = 1600
PAIRS = [(domain, method) for domain in DOMAINS for method in METHODS]


def doodles(path: Path, *, seed: int, noise: float, cells: int = 32, size: int = 32, shape: int = 0) -> None:
    """A grid of drawings, 8 to a row with a gap of 1 pixel; the same cell has the same drawing at any noise."""
    rows = -(-cells // 8)
    sheet = Image.new("L", (8 * size + 7, rows * size + rows - 1), 128)
    for cell in range(cells):
        draw_seed = random.Random(f"{seed}/{shape}/{cell}")
        image = Image.new("L", (size, size), 255)
        pen = ImageDraw.Draw(image)
        x, y, r = (draw_seed.randint(low, high) for low, high in ((11, 20), (11, 20), (5, 10)))
        pen.ellipse((x - r, y - r, x + r, y + r), outline=0, width=2)
        for k in range(shape + 2):
            pen.line((x, y, x + draw_seed.randint(-12, 12), y + 9 - 5 * k), fill=0, width=2)
        wobble = random.Random(f"{seed}/{cell}/{noise}")
        for _ in range(int(noise * 160)):
            spot = (wobble.randrange(size), wobble.randrange(size))
            image.putpixel(spot, wobble.randrange(256))
        sheet.paste(image, (cell % 8 * (size + 1), cell // 8 * (size + 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def pretraining(run: Path) -> None:
    noise = random.Random(0)
    for i in range(40):
        images = (i + 1) * 4096
        append_event(run / "pretrain" / "events.jsonl", stage="pretrain", images=images, metrics={
            "discriminator/adversarial": 0.62 - 0.2 * i / 40 + noise.gauss(0, 0.015),
            "generator/adversarial": 0.8 + 0.9 * i / 40 + noise.gauss(0, 0.03),
            "discriminator/r1": 0.02 + 0.05 * i / 40 + noise.gauss(0, 0.004),
            "discriminator/r2": 0.02 + 0.04 * i / 40 + noise.gauss(0, 0.004),
            "images_per_second": 430 + noise.gauss(0, 9)})
    doodles(run / "pretrain" / "samples.png", seed=1, noise=0.15)
    doodles(run / "pretrain" / "reals.png", seed=2, noise=0)
    for step in range(12):
        append_event(run / "meta" / "reptile-31c2" / "events.jsonl", stage="meta", images=step * 640, metrics={
            "generator/adversarial": 1.2 - step / 30, "update_norm": 0.4 / (step + 1)})


def trial_row(run: Path, domain: str, method: str, seed: int, phase: str, index: int) -> dict[str, Any]:
    noise = random.Random(f"{domain}/{method}/{seed}/{phase}/{index}")
    level = 380 * QUALITY[method] * (1 + DOMAINS.index(domain) / 5 if domain in DOMAINS else 1)
    level *= {("kanjivg", "freezed"): 4.6, ("quickdraw-teapot", "reptile"): 4.4}.get((domain, method), 1.0)
    final = phase == "final"
    kid = level * noise.uniform(0.9, 1.1)
    copied = final and (domain, method, seed) == COPIED
    trial = f"{noise.getrandbits(48):012x}"
    folder = run / "domains" / domain / trial
    seen = BUDGET if final or index % 2 == 0 else BUDGET // 4
    for images in range(200, seen + 1, 200):
        start = 3200 if method == "scratch" else 1400
        halflife = 500 if method == "scratch" else 180
        value = kid + (start - kid) * 2.0 ** (-images / halflife) * noise.uniform(0.85, 1.15)
        append_event(folder / "events.jsonl", stage="adapt", trial=trial, images=images,
                     metrics={"selection_kid": value, "discriminator/adversarial": 0.5})
    if final:
        shape = DOMAINS.index(domain) if domain in DOMAINS else 0
        doodles(folder / "samples.png", seed=5, noise=QUALITY[method] / 2, shape=shape)
        doodles(folder / "nearest.png", seed=6, noise=0.1, cells=16, shape=shape)
    return {
        "domain": domain, "method": method, "seed": seed, "trial": trial, "phase": phase, "shots": 10,
        "start": {"scratch": "scratch", "reptile": "meta:reptile-31c2"}.get(method, "pretrain"),
        "status": "finished" if seen == BUDGET else "stopped", "images_budget": BUDGET, "images_seen": seen,
        "seconds": noise.uniform(3, 6), "gpu_hours": 0.0, "selection_kid": kid * 1.04,
        "kid": kid if final else None, "kid_ci95": [kid * 0.93, kid * 1.07] if final else None,
        "fd": kid * 3 if final else None, "fid": None, "auth_pct": 40.0 if copied else 88.0,
        **{name: noise.uniform(0.5, 0.9) if final else None for name in ("precision", "recall", "density", "coverage")},
        "copy_rate": 0.31 if copied else noise.uniform(0, 0.04), "disqualified": copied,
        "reason": "copy rate 0.31 exceeds 0.10" if copied else None, "checkpoint": f"domains/{domain}/{trial}/best",
        "hyperparameters": {"adaptation.lr": [1e-4, 2e-4, 4e-4][index % 3], "adaptation.r1": 1.0}}


def verdict_of(rows: list[dict[str, Any]], domain: str, method: str) -> dict[str, Any]:
    def kids(name: str) -> list[float]:
        return [row["kid"] for row in rows
                if row["domain"] == domain and row["method"] == name and row["kid"] is not None]

    gains = [scratch - kid for scratch, kid in zip(kids("scratch"), kids(method), strict=True)]
    mean = statistics.fmean(gains)
    half = 2.776 * statistics.stdev(gains) / len(gains) ** 0.5 if method != "scratch" else 0.0
    said = "positive" if mean - half > 0 else "negative" if mean + half < 0 else "neutral"
    mine = [row for row in rows if (row["domain"], row["method"], row["phase"]) == (domain, method, "final")]
    return {"domain": domain, "method": method, "gain_over_scratch": mean, "gain_ci95": [mean - half, mean + half],
            "p_value": 0.001, "seeds": len(gains), "verdict": None if method == "scratch" else said,
            "detectable_gain": 2 * half, "kid_mean": statistics.fmean(kids(method)),
            "copy_rate_mean": statistics.fmean(row["copy_rate"] for row in mine),
            "disqualified": sum(row["disqualified"] for row in mine)}


def test_gain_is_drawn_against_the_share_of_corrupted_images() -> None:
    verdicts = [{"domain": f"sun-{share}", "target": "sun", "method": "finetune", "gain_over_scratch": 10 - 9 * share,
                 "gain_ci95": [9 - 9 * share, 11 - 9 * share],
                 "corruption": {"kind": "noise", "share": share} if share else None} for share in (0.0, 0.2, 0.4)]
    (chart,) = robustness_charts(verdicts, ["scratch", "finetune"])
    assert "gain against noise on sun" in chart and "% of the support pool" in chart
    assert chart.count("<circle") + chart.count('<path class="square"') == 3
    assert robustness_charts([verdicts[0]], ["finetune"]) == [], "nothing was corrupted"


def synthetic_run(run: Path, domains: tuple[str, ...] = DOMAINS) -> Path:
    """A finished run's folder that looks like one."""
    pretraining(run)
    rows = [trial_row(run, domain, method, seed, "final", seed) for domain in domains for method in METHODS
            for seed in range(5)]
    rows += [trial_row(run, domain, method, 0, "search", index) for domain in domains for method in METHODS
             for index in range(6)]
    for domain in domains:
        shape = DOMAINS.index(domain) if domain in DOMAINS else 0
        doodles(run / "domains" / domain / "support.png", seed=3, noise=0, cells=10, shape=shape)
        doodles(run / "domains" / domain / "reference.png", seed=4, noise=0, shape=shape)
    append_event(run / "events.jsonl", stage="report", images=0, metrics={})
    (run / "recipe.yaml").write_text("name: demo\nseed: 0\ndata:\n  source: quickdraw\ntraining:\n  images: 163840\n"
                                     "  batch: 64\nadaptation:\n  shots: 10\n  images: 1600\n")
    (run / "leaderboard.json").write_text(json.dumps({
        "schema_version": 1, "rows": rows,
        "verdicts": [verdict_of(rows, domain, method) for domain in domains for method in METHODS],
        "contract": {"feature_net": "encoder", "feature_net_sha256": "9f2c41d07be3a855", "samples": 500,
                     "reference_sha256": {domain: f"{i}c0ffee{i}" for i, domain in enumerate(domains)},
                     "resizer": "none", "graft_version": "0.1.0"},
        "costs": {"pretrain_seconds": 412.0, "meta_seconds": 171.0, "fanout_seconds": 388.0, "encoder_seconds": 43.0,
                  "pays_from_domains": {"finetune": 3, "freezed": 4, "reptile": None}}}))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Start tags with their attributes, and the text of each table row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def text_of(markup: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", markup).split())


def trial_rows(page: str) -> list[str]:
    table = page[page.index('<table id="leaderboard">'):]
    return re.findall(r"<tr class=\"(?:final|search).*?</tr>", table[:table.index("</table>")], re.DOTALL)


def test_the_page_loads_nothing(page: str) -> None:
    parser = Tags(page)
    for tag, attributes in parser.tags:
        for name in ("src", "srcset", "href", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page and "SCRIPT_SHA256" not in page


def test_every_trial_has_its_row_and_every_pair_its_verdict(run: Path, page: str) -> None:
    board = json.loads((run / "leaderboard.json").read_text())
    rows = trial_rows(page)
    assert len(rows) == len(board["rows"]) == len(PAIRS) * 11
    assert all(sum(row["trial"] in text for text in rows) == 1 for row in board["rows"])
    assert sum('class="search' in row for row in rows) == len(PAIRS) * 6
    matrix = page[page.index('<table class="matrix">'):page.index('<ul class="legend">')]
    assert all(domain in matrix for domain in DOMAINS)
    assert "could have shown" in matrix
    for word in ("▲</span> positive", "■</span> neutral", "▼</span> negative", "⊘</span> disqualified"):
        assert word in matrix, "a verdict has a symbol and a word, not a colour alone"


def test_a_disqualified_trial_is_shown_with_its_reason(page: str) -> None:
    (row,) = [row for row in trial_rows(page) if "copy rate 0.31 exceeds 0.10" in row]
    assert re.match(r'<tr class="final out">', row) and "⊘ disqualified" in row
    assert "1 of 5 seeds copied" in text_of(page[page.index('<table class="matrix">'):])


def test_the_headline_counts_domains_and_leaves_out_the_disqualified(run: Path) -> None:
    def verdict(domain: str, method: str, said: str | None, copied: int = 0) -> dict[str, Any]:
        return {"domain": domain, "method": method, "verdict": said, "disqualified": copied}

    verdicts = [verdict("a", "scratch", None), verdict("a", "finetune", "positive"),
                verdict("b", "finetune", "positive"),
                verdict("c", "finetune", "positive", copied=2), verdict("d", "finetune", "negative"),
                verdict("a", "reptile", "neutral")]
    assert headline(verdicts, ["scratch", "finetune", "reptile"]) == [
        "Full fine-tuning helped on 2 of 4 domains; negative on 1; 1 disqualified for copying.",
        "Reptile helped on none of 1 domain; negative on none."]
    assert headline([], []) == []
    many: list[dict[str, Any]] = [{"domain": domain, "method": method, "verdict": "positive", "gain_over_scratch": gain}
            for domain in "ab" for method, gain in (("l2sp", 1.0), ("ewc", 2.0), ("bss", 3.0), ("lora", 4.0), ("cdc", 0.5),
                                                    ("rssa", 0.4), ("bsa", 9.0), ("copier", 99.0))]
    assert headline(many, ["scratch", "l2sp", "ewc", "bss", "lora", "cdc", "rssa", "bsa", "copier"]) == [
        "BSA helped on 2 of 2 domains; negative on none.", "LoRA helped on 2 of 2 domains; negative on none.",
        "BSS helped on 2 of 2 domains; negative on none.", "The other 4 methods are in the tables."]


def test_a_short_budget_or_few_seeds_are_said_beside_the_headline(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", DOMAINS[:1])
    rows, verdicts = [{"images_budget": 400}], [{"seeds": 5}]
    assert "400 images per trial is a short budget" in caveat(rows, verdicts)
    assert "2 seeds" in caveat([{"images_budget": 5000}], [{"seeds": 2}])
    assert caveat([{"images_budget": 1000}], verdicts) == caveat(rows, []) == ""
    board = json.loads((run / "leaderboard.json").read_text())
    for row in board["rows"]:
        row["images_budget"] = 64
    (run / "leaderboard.json").write_text(json.dumps(board))
    assert "verdicts favour transfer" in build_report(run).read_text()


def test_a_pretraining_of_another_family_is_drawn_by_its_own_terms(tmp_path: Path) -> None:
    for images in (64, 128, 192):
        append_event(tmp_path / "pretrain" / "events.jsonl", stage="pretrain", images=images, metrics={
            "generator/elbo": -200 + images / 10, "generator/kl": 9.0, "generator/reconstruction": 190.0,
            "images_per_second": 50})
    page = build_report(tmp_path).read_text()
    drawn = re.findall(r'<svg class="chart"[^>]*aria-label="([^"]*)"', page)
    assert drawn == ["evidence lower bound, nats an image", "reconstruction, nats an image",
                     "divergence from the prior, nats an image", "images per second"]
    assert metric_name("generator/kl") == "divergence from the prior (nats)"


def test_metrics_are_named_in_words(page: str) -> None:
    assert metric_name("some/new_one") == "some new one"
    words = text_of(page)
    assert not [name for name in ("data_wait", "images_per_second", "discriminator/", "selection_kid") if name in words]


def test_pictures_are_embedded_and_in_rows_of_cells(page: str) -> None:
    images = [attributes for tag, attributes in Tags(page).tags if tag == "img"]
    per_domain = 2 + len(METHODS) * 2
    assert len(images) == 2 + per_domain * len(DOMAINS)
    assert "--w: 263; --h: 131; --row: 32" in page and "image-rendering: pixelated" in page
    assert all(attributes.get("alt") for attributes in images)


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    name = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
    run = tmp_path / "hostile"
    run.mkdir()
    row = trial_row(run, "plain", "finetune", 0, "final", 0) | {
        "domain": name, "method": name, "reason": name, "status": name, "hyperparameters": {name: name}, "start": name}
    verdict = {"domain": name, "method": name, "verdict": name, "gain_over_scratch": 1.0, "gain_ci95": [0.5, 1.5],
               "seeds": 5, "kid_mean": 1.0, "copy_rate_mean": 0.0, "disqualified": 0, "detectable_gain": 0.1}
    (run / "leaderboard.json").write_text(json.dumps({
        "rows": [row], "verdicts": [verdict], "contract": {name: name},
        "costs": {"pretrain_seconds": 1, "pays_from_domains": {name: name}}}))
    append_event(run / "meta" / "m" / "events.jsonl", stage="meta", images=1, metrics={name: 1.0})
    (run / "recipe.yaml").write_text(name)
    page = build_report(run).read_text()
    tags = Tags(page).tags
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert not [attributes for tag, attributes in tags if "onerror" in attributes or attributes.get("src") == "x"]
    assert page.count("&lt;script&gt;alert(1)") > 8


def test_a_name_cannot_reach_pictures_outside_the_run(tmp_path: Path) -> None:
    doodles(tmp_path / "secret" / "support.png", seed=0, noise=0)
    run = tmp_path / "run"
    (run / "domains").mkdir(parents=True)
    (run / "leaderboard.json").write_text(json.dumps({"verdicts": [{"domain": "../../secret", "method": "finetune"}]}))
    assert "data:image" not in build_report(run).read_text()


def test_missing_stages_are_said(tmp_path: Path) -> None:
    run = tmp_path / "young"
    run.mkdir()
    page = text_of(build_report(run).read_text())
    for words in ("No verdict yet", "No trial has finished yet", "No target domain has been started", "No costs yet",
                  "the pretraining has written no checkpoint yet", "No contract yet", "recipe.yaml is missing"):
        assert words in page
    pretraining(run)
    page = build_report(run).read_text()
    assert page.count('<svg class="chart"') == 5 and "No samples" not in page and "No verdict yet" in page


def test_search_alone_and_broken_pieces_still_make_a_page(tmp_path: Path) -> None:
    run = tmp_path / "half"
    rows = [trial_row(run, "mnist-7", method, 0, "search", index) for method in METHODS for index in range(3)]
    (run / "leaderboard.json").write_text(json.dumps({"rows": rows, "costs": {"pretrain_seconds": 9}}))
    (run / "domains" / "mnist-7" / "support.png").write_bytes(b"\x89PNG no picture")
    (run / "pretrain").mkdir()
    lines = ['{"images": 3}', "[1]", "nonsense", '{"images": 64, "metrics": {"a": "b"}}']
    (run / "pretrain" / "events.jsonl").write_text("\n".join(lines))
    page = build_report(run).read_text()
    assert "domains/mnist-7/support.png cannot be read as a PNG" in page
    assert len(trial_rows(page)) == 12 and "its search trials" in page and "not run" in page


def test_user_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run's folder"):
        build_report(tmp_path / "nowhere")
    (tmp_path / "leaderboard.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        build_report(tmp_path)
    (tmp_path / "leaderboard.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match=r"schema_version 99 .*update graft"):
        build_report(tmp_path)


def test_the_same_folder_gives_the_same_page(run: Path, page: str) -> None:
    assert build_report(run).read_text(encoding="utf-8") == page


def test_the_terminal_table_has_every_pair_within_its_width(run: Path) -> None:
    board = json.loads((run / "leaderboard.json").read_text())
    text = leaderboard_text(board, width=110)
    lines = text.splitlines()
    assert len(lines) == 1 + len(PAIRS) and max(map(len, lines)) <= 110
    assert text.count("positive") >= 8 and "⊘ disqualified (1/5)" in text and "control" in text
    assert leaderboard_text({}, width=80).startswith("domain")
    assert "[bold]x" in leaderboard_text({"verdicts": [{"domain": "[bold]x", "method": "finetune"}]}, width=100)


def test_numbers_have_sensible_digits() -> None:
    assert decimals([0.0123, 0.0456, None]) == 4 and decimals([268.0, 3457.0]) == 0 and decimals([]) == 3
    assert number(-1234.5, 0) == "−1\u202f234" and number(float("nan"), 2) == "–" and number(None, 2) == "–"


def test_charts_switch_to_a_log_scale_and_keep_labels_apart() -> None:
    wide = [Series("a", 0, [Point(0, 1, 1, 1), Point(1, 900, 800, 1000)]), Series("b", 1, [Point(1, 890, 890, 890)])]
    assert "log scale" in line_chart(wide, title="t", y_label="KID")
    negative = [Series("a", 0, [Point(0, -1, -1, -1), Point(1, 900, 800, 1000)])]
    assert "log scale" not in line_chart(negative, title="t", y_label="KID")
    assert line_chart([Series("a", 0, [])], title="t", y_label="KID") == ""
    alone = line_chart([Series("a", 0, [Point(2, 1, 0, 4)]), Series("b", 1, [Point(3, 2, 2, 2)])], title="t", y_label="KID")
    (low, high), = re.findall(r'<g class="series s0"><line x1="[0-9.]+" x2="[0-9.]+" y1="([0-9.]+)" y2="([0-9.]+)"/>', alone)
    assert (float(low), float(high)) == (230.0, 14.0) and alone.count("<line x1") == 1
    assert linear_ticks(0, 1600, 4) == [0, 500, 1000, 1500, 2000] and log_ticks(3, 40) == [2, 5, 10, 20, 50]
    placed = spread([50, 51, 52, 10], 13, 0, 60)
    assert placed[3] == 10 and placed[1] - placed[0] >= 13 and placed[2] - placed[1] >= 13 and max(placed) <= 60


def chromium() -> str:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on the PATH: sorting and the page's own script are not tested in a browser")
    return program


def dom_after(page: str, folder: Path, script: str = "") -> str:
    """The document after the browser ran its script and then ours; for ours the page's policy is taken out."""
    if script:
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        page = page.replace("</body>", f"<script>{script}</script></body>")
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--disable-sync",
                   f"--user-data-dir={profile}", "--dump-dom", file.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
def test_the_page_runs_its_script_under_its_own_policy(page: str, tmp_path: Path) -> None:
    assert re.search(r'<html lang="en" class="js">', dom_after(page, tmp_path))


@pytest.mark.browser
def test_a_heading_sorts_and_sorts_back_with_missing_values_last(page: str, tmp_path: Path) -> None:
    click = "for (const b of document.querySelectorAll('th button')) if (b.textContent.startsWith('KID')) {clicks}"
    for clicks, order, reverse in (("b.click();", "ascending", False), ("{b.click(); b.click();}", "descending", True)):
        dom = dom_after(page, tmp_path, click.replace("{clicks}", clicks))
        assert dom.count(f'aria-sort="{order}"') == 1 and dom.count("aria-sort=\"") == 1
        cells = [re.findall(r'<td class="n" data-v="([^"]*)"', row)[0] for row in trial_rows(dom)]
        values = [float(cell) for cell in cells if cell]
        assert len(values) == len(PAIRS) * 5 and values == sorted(values, reverse=reverse)
        assert cells[len(values):] == [""] * (len(PAIRS) * 6)


@pytest.mark.browser
def test_the_search_trials_show_on_demand(page: str, tmp_path: Path) -> None:
    probe = "document.title = [...document.querySelectorAll('tr.search')].filter(r => r.offsetParent).length;"
    assert "<title>0</title>" in dom_after(page, tmp_path, probe)
    shown = dom_after(page, tmp_path, "document.getElementById('show-search').click();" + probe)
    assert f"<title>{len(PAIRS) * 6}</title>" in shown


def test_health_and_cost_stand_on_the_page_with_alarms_marked(tmp_path: Path) -> None:
    for i, ratio in enumerate((0.9, 0.9, 0.2, 0.2, 0.2, 0.2, 0.9), 1):
        append_event(tmp_path / "pretrain" / "events.jsonl", stage="pretrain", images=1000 * i, metrics={
            "health/distance_ratio": ratio, "health/nearest_ratio": 1.0, "health/collapse": float(i in (5, 6)),
            "images_per_second": 100.0, "cost/gflop_per_image": 0.5, "cost/share_of_peak": 0.25, "cost/peak_memory_gb": 1.0,
            "cost/peak_measured": 1.0, "cost/data": 0.01, "cost/communication": "<b>1</b>"})
    page = build_report(tmp_path).read_text()
    assert "collapse since 3 000" in page or "collapse since 3000 images" in page
    assert "collapse is over" in page and page.count('class="alarm"') == 1
    assert "0.5 GFLOP an image, 32 a step; 100 images/s" in page and "<b>1</b>" not in page
    quiet = tmp_path / "quiet"
    append_event(quiet / "pretrain" / "events.jsonl", stage="pretrain", images=10, metrics={"health/distance_ratio": 0.9})
    assert "No alarm." in build_report(quiet).read_text()
    (tmp_path / "empty").mkdir()
    assert "Nothing was looked at." in build_report(tmp_path / "empty").read_text()
