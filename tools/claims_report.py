"""Tables and figures of tools/claims.py: means with 95 % t-intervals over seeds, and differences paired by seed."""
import json
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unimo2_paddle.errors import UserInputError  # noqa: E402

OUTCOMES = {"ir_r1": "text to image R@1", "tr_r1": "image to text R@1", "contrastive_ir_r1": "same, contrastive alone", "entailment": "entailment",
            "classes": "48 classes", "caption_loss": "masked words, captions", "text_loss": "masked words, texts"}
MAIN = ("grounded-all", "grounded-pairs", "baseline-all", "baseline-pairs")
MARKS = ("<!-- results: written by tools/claims.py -->", "<!-- end of results -->")
COLOURS = {"grounded-all": "#1b6ca8", "grounded-pairs": "#7fb3d5", "baseline-all": "#b03a2e", "baseline-pairs": "#e6a39b"}


def read_results(directory):
    """All results of :mod:`claims`, as a list of dicts; a half-written file is passed over.

    Raises:
        UserInputError: a file is not a result.
    """
    found = []
    for path in sorted(Path(directory).glob("*_seed*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            result["test"], result["arm"], result["size"], result["seed"], result["learning_rate"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserInputError(f"{path}: is not a result of tools/claims.py; move it away") from None
        found.append(result)
    return found


def chosen(results):
    """``{(arm, size): {seed: result}}`` with the learning rate that seed 1 does best with on the development split.

    An arm of which only one rate of seed 1 is there counts with that one.
    """
    from claims_outcomes import HIGHER_IS_BETTER

    cells = {}
    for result in results:
        cells.setdefault((result["arm"], result["size"]), []).append(result)
    picked = {}
    for cell, members in cells.items():
        key = members[0]["select"]
        sign = 1 if HIGHER_IS_BETTER[key] else -1
        first = [result for result in members if result["seed"] == 1]
        if first:
            rate = max(first, key=lambda result: sign * result["dev"][key])["learning_rate"]
            picked[cell] = {result["seed"]: result for result in members if result["learning_rate"] == rate}
    return picked


def interval(values):
    """(mean, half width of the 95 % t-interval) of a list; the half width of a single value is ``nan``."""
    from scipy.stats import t

    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def paired(one, other, outcome):
    """Differences ``one - other`` of the seeds that both have; each is ``{seed: result}``."""
    return {seed: one[seed]["test"][outcome] - other[seed]["test"][outcome] for seed in sorted(set(one) & set(other))
            if outcome in one[seed]["test"] and outcome in other[seed]["test"]}


def told(values, sign=False):
    """``mean ± half width (n)`` of a list of values."""
    if not values:
        return "-"
    mean, half = interval(values)
    width = f" ± {half:.2f}" if len(values) > 1 else ""
    return f"{mean:{'+' if sign else ''}.2f}{width} ({len(values)})"


def _table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)])


def main_table(picked):
    """Every arm of claims 1 and 2 at every number of pairs."""
    rows = []
    for size in sorted({size for arm, size in picked if arm in MAIN}):
        for arm in MAIN:
            members = picked.get((arm, size), {})
            if members:
                rate = next(iter(members.values()))["learning_rate"]
                rows.append([str(size), arm, f"{rate:g}"] + [told([r["test"][key] for r in members.values() if key in r["test"]]) for key in OUTCOMES])
    return _table(["pairs", "arm", "rate", *OUTCOMES.values()], rows)


def _contrasts(picked, size):
    """``{name: {outcome: {seed: difference}}}`` of the questions of claims 1 and 2 at one number of pairs."""
    cells = {arm: picked.get((arm, size), {}) for arm in MAIN}
    found = {}
    for name, one, other in (("1: grounded - baseline, pairs only", "grounded-pairs", "baseline-pairs"),
                             ("1: grounded - baseline, with unpaired", "grounded-all", "baseline-all"),
                             ("2: unpaired - pairs only, grounded", "grounded-all", "grounded-pairs"),
                             ("2: unpaired - pairs only, baseline", "baseline-all", "baseline-pairs")):
        found[name] = {key: paired(cells[one], cells[other], key) for key in OUTCOMES}
    gain, plain = found["2: unpaired - pairs only, grounded"], found["2: unpaired - pairs only, baseline"]
    found["2: gain of grounded - gain of baseline"] = {
        key: {seed: gain[key][seed] - plain[key][seed] for seed in set(gain[key]) & set(plain[key])} for key in OUTCOMES}
    return found


def difference_table(picked):
    """Paired differences per number of pairs, and of the means over the numbers of pairs that a seed has all of."""
    sizes = sorted({size for arm, size in picked if arm in MAIN})
    by_size = {size: _contrasts(picked, size) for size in sizes}
    rows = []
    for name in (by_size[sizes[0]] if sizes else ()):
        for size in sizes:
            rows.append([name, str(size)] + [told(list(by_size[size][name][key].values()), True) for key in OUTCOMES])
        if len(sizes) > 1:
            rows.append([name, "mean"] + [told(over_sizes([by_size[size][name][key] for size in sizes]), True) for key in OUTCOMES])
    return _table(["difference", "pairs", *OUTCOMES.values()], rows)


def over_sizes(differences):
    """Per seed the mean over all sizes, of the seeds that every size has."""
    seeds = set.intersection(*(set(one) for one in differences)) if differences else set()
    return [sum(one[seed] for one in differences) / len(differences) for seed in sorted(seeds)]


def reference_table(picked, arms, reference=("grounded-all", "grounded-pairs", "baseline-all")):
    """Arms of one number of pairs beside the main arms of that number."""
    sizes = {size for arm, size in picked if arm in arms}
    rows = []
    for size in sorted(sizes):
        for arm in (*reference, *arms):
            members = picked.get((arm, size), {})
            if members:
                rows.append([arm] + [told([r["test"][key] for r in members.values() if key in r["test"]]) for key in OUTCOMES])
    return _table(["arm", *OUTCOMES.values()], rows) if rows else ""


def ablation_table(picked, arms, reference="grounded-all"):
    """Paired differences of each ablation to the whole grounded model, and the overlap its dictionary ends with."""
    rows = []
    for arm, size in sorted(cell for cell in picked if cell[0] in arms):
        whole = picked.get((reference, size), {})
        row = [arm] + [told(list(paired(picked[arm, size], whole, key).values()), True) for key in OUTCOMES]
        rows.append(row + [told(_last(picked[arm, size], key)) for key in ("overlap_gain", "perplexity")])
    return _table(["without or other than the whole", *OUTCOMES.values(), "overlap gain", "perplexity"], rows) if rows else ""


def _last(members, key):
    return [result["dictionary"][-1][key] for result in members.values() if result.get("dictionary")]


def mechanism_table(picked):
    """How the dictionary is used at the end of training."""
    rows = []
    for arm, size in sorted(picked, key=lambda cell: (cell[1], cell[0])):
        if arm in MAIN and any(result.get("dictionary") for result in picked[arm, size].values()):
            rows.append([str(size), arm] + [told(_last(picked[arm, size], key)) for key in
                                            ("used", "perplexity", "overlap_true", "overlap_random", "overlap_gain")])
    return _table(["pairs", "arm", "codes used", "perplexity", "overlap of true pairs %", "of random pairs %", "gain"], rows) if rows else ""


def rewriting_table(directory):
    """The table of UNIMO's ablation, when its results are there."""
    path = os.path.join(directory, "rewriting.json")
    if not os.path.isfile(path):
        return ""
    import rewriting_ablation

    with open(path, encoding="utf-8") as file:
        return rewriting_ablation.table(json.load(file)["runs"])


def write_report(directory, figures):
    """Draw the figures into ``figures``; returns the tables as Markdown.

    Raises:
        UserInputError: ``directory`` holds no results or something else.
    """
    import claims

    results = read_results(directory)
    rewriting = rewriting_table(directory)
    if not results and not rewriting:
        raise UserInputError(f"{directory}: holds no results yet")
    picked = chosen(results)
    ablations, skills = ([arm.name for arm in arms] for arms in (claims.ABLATIONS, claims.SKILLS))
    seconds = sum(result["processor_seconds"] for result in results)
    parts = [f"{len(results)} runs, {seconds / 60:.0f} minutes of one core for training. Cells: mean ± half of the 95 % t-interval (number of seeds); "
             "losses: lower is better."]
    for title, text in (("Claims 1 and 2: all arms", main_table(picked)), ("Claims 1 and 2: paired differences", difference_table(picked)),
                        ("Mechanism: the dictionary at the end of training", mechanism_table(picked)),
                        ("Claim 3: joint learning beside learning on one corpus", reference_table(picked, skills)),
                        ("Ablations: paired differences to grounded-all", ablation_table(picked, ablations)),
                        ("Claim 4 (UNIMO): rewriting of captions", rewriting)):
        if text:
            parts += [f"### {title}", text]
    draw_figures(picked, figures)
    return "\n\n".join(parts)


def draw_figures(picked, directory):
    """``retrieval.png`` and ``mechanism.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    os.makedirs(directory, exist_ok=True)
    sizes = sorted({size for arm, size in picked if arm in MAIN})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("ir_r1", "tr_r1")):
        for place, arm in enumerate(MAIN):  # side by side, so that no interval hides another
            points = [(size * 1.05 ** (place - 1.5), interval([r["test"][key] for r in picked[arm, size].values()])) for size in sizes if (arm, size) in picked]
            if points:
                halves = [0.0 if math.isnan(half) else half for _, (_, half) in points]
                axis.errorbar([size for size, _ in points], [mean for _, (mean, _) in points], halves, marker="o", capsize=3, label=arm,
                              color=COLOURS[arm], linestyle="-" if arm.endswith("all") else "--")
        axis.set(title=OUTCOMES[key], xlabel="pairs", xscale="log", xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
    axes[0].set_ylabel("R@1, %")
    axes[0].legend(fontsize=8)
    _save(figure, os.path.join(directory, "retrieval.png"))
    _draw_mechanism(picked, sizes, os.path.join(directory, "mechanism.png"), plt)


def _draw_mechanism(picked, sizes, path, plt):
    curves = {cell: [r["dictionary"] for r in members.values() if r.get("dictionary")] for cell, members in picked.items()
              if cell[0] in ("grounded-all", "grounded-pairs")}
    curves = {cell: found for cell, found in curves.items() if found}
    if not curves:
        return
    figure, axes = plt.subplots(2, len(sizes), figsize=(3.4 * len(sizes), 5.6), sharex=True, sharey="row", squeeze=False,
                                layout="constrained")
    for column, size in enumerate(sizes):
        for arm in ("grounded-all", "grounded-pairs"):
            for key, row, line in (("overlap_true", 0, "-"), ("overlap_random", 0, ":"), ("perplexity", 1, "-")):
                found = curves.get((arm, size), [])
                if found:
                    steps = [point["step"] for point in found[0]]
                    means = [sum(curve[place][key] for curve in found) / len(found) for place in range(len(steps))]
                    axes[row, column].plot(steps, means, line, marker=".", color=COLOURS[arm], label=f"{arm}, {key.replace('_', ' ')}")
        axes[0, column].set_title(f"{size} pairs")
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("codes shared by both sides, %")
    axes[1, 0].set_ylabel("perplexity of the codes")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, path)


def _save(figure, path):
    from matplotlib import pyplot as plt

    figure.savefig(path + ".tmp", dpi=110, format="png", metadata={"Software": None})
    os.replace(path + ".tmp", path)
    plt.close(figure)


def replace_results(page, text):
    """Put the tables between the two marks of a page; a page that is not there is left alone.

    Raises:
        UserInputError: the page lacks a mark.
    """
    page = os.fspath(page)
    if not os.path.isfile(page):
        return
    content = Path(page).read_text(encoding="utf-8")
    if not all(content.count(mark) == 1 for mark in MARKS):
        raise UserInputError(f"{page}: the tables belong between the lines {MARKS[0]!r} and {MARKS[1]!r}, each of which must be there once")
    before, rest = content.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    with open(page + ".tmp", "w", encoding="utf-8") as file:
        file.write(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")
    os.replace(page + ".tmp", page)
