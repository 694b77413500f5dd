"""What the report says in words and numbers, for the page and for the terminal."""

from __future__ import annotations

import io
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from training.methods import METHODS

METHOD_NAMES = {
    "scratch": "from scratch", "unadapted": "the source as it is", "copier": "the support set itself",
    "density": "Gaussian mixture", "finetune": "full fine-tuning", "freezed": "FreezeD", "freezeg": "frozen parts of G",
    "l2sp": "L2-SP", "ewc": "EWC", "bss": "BSS", "distill": "feature distillation", "projected": "projected D",
    "structure": "structure transfer", "bsa": "BSA", "fsgan": "FSGAN", "lora": "LoRA", "adam": "AdAM",
    "minegan": "MineGAN", "cdc": "CDC", "rssa": "RSSA", "converter": "CycleGAN converter", "newclass": "a new class",
    "reptile": "Reptile", "fomaml": "FOMAML", "maml": "MAML"}
SYMBOLS = {"positive": "▲", "neutral": "■", "negative": "▼", "disqualified": "⊘"}
Row = Mapping[str, Any]


def state_of(verdict: Row) -> str | None:
    """positive | neutral | negative | disqualified; None where there is no verdict, and for what is there to compare with."""
    return "disqualified" if verdict.get("disqualified") else verdict.get("verdict")


def headline(verdicts: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """Sentences that sum the verdicts up, the method that helped most often, and most, first; of many the first three."""
    counts = {method: Counter(state_of(v) for v in verdicts if v.get("method") == method)
              for method in methods if not compared_with(method)}
    counts = {method: states for method, states in counts.items() if states.total()}
    if not counts:
        return []
    gains = {method: sum(v["gain_over_scratch"] for v in verdicts
                         if v.get("method") == method and finite(v.get("gain_over_scratch"))) for method in counts}
    ranked = sorted(counts, key=lambda method: (-counts[method]["positive"], -gains[method]))
    told = ranked if len(ranked) <= MOST_TOLD else ranked[:3]
    sentences = []
    for method in told:
        states, name = counts[method], method_name(method)
        hurt = f"negative on {states['negative'] or 'none'}"
        copied = f"; {states['disqualified']} disqualified for copying" if states["disqualified"] else ""
        helped = f"helped on {states['positive'] or 'none'} of {states.total()} domain{'s' * (states.total() != 1)}"
        sentences.append(f"{name[0].upper()}{name[1:]} {helped}; {hurt}{copied}.")
    if len(told) < len(ranked):
        sentences.append(f"The other {len(ranked) - len(told)} methods are in the tables.")
    return sentences


MOST_TOLD = 6  # methods of which each has a sentence
SHORT_BUDGET = 1000  # images of a trial; below it scratch has hardly begun (docs/LOG.md)
FEW_SEEDS = 5


def caveat(rows: Sequence[Row], verdicts: Sequence[Row]) -> str:
    """A sentence for a run whose budget or seeds are too small to be quoted as they stand; empty otherwise."""
    budgets = [row["images_budget"] for row in rows if finite(row.get("images_budget"))]
    seeds = [v["seeds"] for v in verdicts if finite(v.get("seeds"))]
    said = []
    if verdicts and budgets and min(budgets) < SHORT_BUDGET:
        said.append(f"{count(min(budgets))} images per trial is a short budget, at which scratch has hardly begun: verdicts "
                    "favour transfer and hold for this budget only.")
    if seeds and min(seeds) < FEW_SEEDS:
        said.append(f"{count(min(seeds))} seed{'s' * (min(seeds) != 1)} can show only large gains: quote nothing below "
                    f"{FEW_SEEDS} seeds.")
    return " ".join(said)


METRIC_NAMES = {"data_wait": "share of time spent waiting for data", "images_per_second": "images per second",
                "generator/adversarial": "G's adversarial loss", "discriminator/adversarial": "D's adversarial loss",
                "generator/total": "G's whole loss", "discriminator/total": "D's whole loss",
                "discriminator/r1": "R1 penalty (real)", "discriminator/r2": "R2 penalty (generated)",
                "discriminator/real_logit": "D's logit of real images",
                "discriminator/fake_logit": "D's logit of generated images",
                "generator/elbo": "evidence lower bound (nats)", "generator/kl": "divergence from the prior (nats)",
                "generator/reconstruction": "reconstruction (nats)",
                "generator/grad_norm": "G's gradient norm", "discriminator/grad_norm": "D's gradient norm",
                "selection_kid": "selection KID"}


def metric_name(name: str) -> str:
    """A metric of the log in words; an unknown one with its separators as spaces."""
    return METRIC_NAMES.get(name, name.replace("/", " ").replace("_", " "))


def order_methods(names: Iterable[Any]) -> list[str]:
    """The methods in the order of METHOD_NAMES, others after them by name."""
    known = list(METHOD_NAMES)
    unique = {str(name) for name in names}
    return sorted(unique, key=lambda name: (known.index(name) if name in known else len(known), name))


def compared_with(method: Any) -> str:
    """What a row that gets no verdict is there for, empty for a method that is judged."""
    if str(method) == "scratch":
        return "control"
    return "" if getattr(METHODS.get(str(method)), "judged", True) else "for comparison"


def method_name(method: Any) -> str:
    return METHOD_NAMES.get(str(method), str(method))


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def decimals(values: Iterable[Any], digits: int = 3) -> int:
    """Decimal places that give a column's typical value ``digits`` significant digits, so that its points line up."""
    sizes = [abs(value) for value in values if finite(value) and value]
    return max(0, min(6, digits - 1 - math.floor(math.log10(statistics.median(sizes))))) if sizes else digits


def gain_decimals(verdicts: Iterable[Row]) -> int:
    return decimals(v.get("gain_over_scratch") for v in verdicts if v.get("method") != "scratch")


def number(value: Any, places: int = 2) -> str:
    """With a true minus sign and thin thousands; an en dash where there is no number."""
    return f"{value:,.{places}f}".replace("-", "−").replace(",", "\u202f") if finite(value) else "–"


def signed(value: Any, places: int = 2) -> str:
    return ("+" if finite(value) and value > 0 else "") + number(value, places)


def count(value: Any) -> str:
    return number(value, 0)


def duration(seconds: Any) -> str:
    """Seconds as s, min or h."""
    if not finite(seconds):
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ---- the terminal


def leaderboard_table(leaderboard: Mapping[str, Any]) -> Table:
    """One line per domain and method."""
    verdicts = leaderboard.get("verdicts") or []
    finals = [row for row in leaderboard.get("rows") or [] if row.get("phase") != "search"]
    methods = order_methods(v.get("method") for v in verdicts)
    by_domain: dict[str, list[Row]] = {}
    for v in verdicts:
        by_domain.setdefault(str(v.get("domain")), []).append(v)
    # By domain: a KID of 0.6 beside one of 30 needs other places.
    kids = {domain: decimals(v.get("kid_mean") for v in group) for domain, group in by_domain.items()}
    gains = {domain: gain_decimals(group) for domain, group in by_domain.items()}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("domain", "method"):
        table.add_column(name, no_wrap=name == "method")
    for name in ("KID [95 %]", "gain [95 %]"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    table.add_column("copies", justify="right")
    table.add_column("seeds", justify="right")
    last = None
    domains = list(dict.fromkeys(str(v.get("domain")) for v in verdicts))
    for v in sorted(verdicts, key=lambda v: (domains.index(str(v.get("domain"))), methods.index(str(v.get("method"))))):
        state = state_of(v)
        said = f"{SYMBOLS[state]} {state}" if state in SYMBOLS else compared_with(v.get("method")) or "–"
        style = {"positive": "green", "negative": "red", "disqualified": "yellow"}.get(str(state), "")
        if v.get("disqualified"):
            said += f" ({v['disqualified']}/{v.get('seeds', '?')})"
        domain = str(v.get("domain"))
        control = v.get("method") == "scratch"
        kid, gain = kids[str(v.get("domain"))], gains[str(v.get("domain"))]
        gained = with_interval(signed(v.get("gain_over_scratch"), gain), v.get("gain_ci95"), gain)
        table.add_row(Text(domain if domain != last else ""), Text(str(v.get("method"))),
                      Text(with_interval(number(v.get("kid_mean"), kid), kid_interval(v, finals), kid)),
                      Text("–" if control else gained),
                      Text(said, style=style), Text(percent(v.get("copy_rate_mean"))), Text(str(v.get("seeds", "–"))))
        last = domain
    return table


def methods_table(leaderboard: Mapping[str, Any]) -> Table:
    """One line per method, over all domains."""
    found = leaderboard.get("methods") or []
    places, diverse = decimals(m.get("gain_mean") for m in found), decimals(m.get("intra_distance_mean") for m in found)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", no_wrap=True)
    for name in ("mean gain [95 %]", SYMBOLS["positive"], SYMBOLS["neutral"], SYMBOLS["negative"], SYMBOLS["disqualified"],
                 "copies", "coverage", "diversity", "a trial", "shared"):
        table.add_column(name, justify="right")
    for m in found:
        said = compared_with(m.get("method"))
        gained = with_interval(signed(m.get("gain_mean"), places), m.get("gain_ci95"), places)
        table.add_row(Text(str(m.get("method"))), Text(gained),
                      *(Text("" if said and state != "disqualified" else count(m.get(state)))
                        for state in ("positive", "neutral", "negative", "disqualified")),
                      Text(percent(m.get("copy_rate_mean"))), Text(number(m.get("coverage_mean"), 2)),
                      Text(number(m.get("intra_distance_mean"), diverse)), Text(duration(m.get("seconds"))),
                      Text(duration(m.get("shared_seconds"))))
    return table


def leaderboard_text(leaderboard: Mapping[str, Any], width: int = 100) -> str:
    """The table as plain text of at most ``width`` columns; below it, where there are several domains, that of the methods."""
    console = Console(width=width, file=io.StringIO(), color_system=None, force_terminal=False)
    if leaderboard.get("verdicts") or not leaderboard.get("methods"):
        console.print(leaderboard_table(leaderboard))
    if any(method.get("domains", 0) > 1 for method in leaderboard.get("methods") or []):
        console.print()
        console.print(methods_table(leaderboard))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def kid_interval(verdict: Row, finals: Sequence[Row]) -> tuple[float, float] | None:
    """95 % t interval of the mean KID over the final trials (seeds) of a verdict's domain and method."""
    kids = [row["kid"] for row in finals if finite(row.get("kid")) and row.get("domain") == verdict.get("domain")
            and row.get("method") == verdict.get("method")]
    if len(kids) < 2:
        return None
    half = float(stdtrit(len(kids) - 1, 0.975)) * statistics.stdev(kids) / math.sqrt(len(kids))
    middle = statistics.fmean(kids)
    return middle - half, middle + half


def with_interval(value: str, interval: Any, places: int) -> str:
    if not isinstance(interval, Sequence) or len(interval) != 2 or not all(map(finite, interval)):
        return value
    return f"{value} [{number(interval[0], places)}, {number(interval[1], places)}]"


def percent(value: Any) -> str:
    return f"{100 * value:.0f} %" if finite(value) else "–"
