"""What people open after an analysis: `report.html`, `experts.csv`, `analysis.json`, `figures/`.

The page is one file without network access. Figures are drawn into it as SVG in the colour of its text.
"""

import csv
import io
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from sra_ds.analysis.analysis import Analysis
from sra_ds.analysis.expert_plots import INK, draw_analysis
from sra_ds.analysis.explain import Explanation
from sra_ds.storage.run_dir import write_atomically

MEANINGS = {
    "token_information": "2 I(token; expert) / (H(token) + H(expert))",
    "token_divergence": "mean Jensen-Shannon divergence between two experts' tokens, in bits",
    "vocabulary_specialisation": "share of a token type's routes that go where this one went",
    "syntax_information": "2 I(part of speech; expert) / (H + H)",
    "domain_information": "2 I(domain; expert) / (H + H)",
    "subtoken_agreement": "neighbouring pieces of a word with the same first choice",
    "subtoken_overlap": "Jaccard overlap of their choices",
    "co_activation": "share of an expert's tokens that its usual partner serves, too",
    "coherent_share": "experts whose words are more coherent than their 95 % null",
    "coherence_over_untrained": "how often an expert's words exceed their null by more than those of an "
    "expert of the untrained router",
}
CAPTIONS = {
    "measures": "Every measure by layer; bars are 95 % intervals.",
    "coherence": "Coherence of every expert's ten words over the null of their frequencies: above the "
    "line lies what 5 % would reach by chance.",
    "load": "Load of each expert, fullest first.",
    "syntax": "Parts of speech of what each expert is given.",
    "domains": "Where each domain's tokens go.",
    "co_activation": "Which experts serve the same tokens.",
    "anchor_cosines": "Cosines between anchors.",
    "anchor_map": "Anchors and the commonest tokens, as the router sees them without context, in "
    "a plane; each of both is centred on its own mean.",
    "saturation": "Share of the final choices that earlier checkpoints had made; the line is chance.",
    "sweeps": "Perplexity with other numbers of experts per token, and with experts suppressed.",
}
COLUMNS = (
    "layer", "expert", "kind", "specialisation", "load", "dead_by_routes", "dead_by_tokens",
    "top_tokens", "top_words", "nearest_tokens", "vocabulary_specialisation", "function_share", "partner",
    "partner_share", "mean_gate", "mean_score", "mean_margin",
)  # fmt: skip


def write_report(analyses: list[Analysis], out: Path) -> dict[str, Any]:
    """Write everything on the first analysis, the others beside it; returns the paths and a summary."""
    out.mkdir(parents=True, exist_ok=True)
    analyses = labelled(analyses)
    figures = draw_analysis(analyses, out / "figures")
    first = analyses[0].as_dict()
    whole = {**first, "against": [other.as_dict() for other in analyses[1:]]}
    write_atomically(out / "analysis.json", json.dumps(whole, indent=1))
    write_atomically(out / "experts.csv", experts_csv(analyses))
    write_atomically(out / "report.html", report_html(analyses, figures))
    return {
        "report": str(out / "report.html"),
        "experts": str(out / "experts.csv"),
        "analysis": str(out / "analysis.json"),
        "figures": [str(path) for path in figures.values()],
        "summary": [{"run": a.facts["run"], **a.summary()} for a in analyses],
    }


def labelled(analyses: list[Analysis]) -> list[Analysis]:
    """Analyses with a `label` that tells them apart on a page: the recipe, the run, or a number."""
    for key in ("recipe", "run"):
        names = [analysis.facts[key] for analysis in analyses]
        if len(set(names)) == len(names):
            break
    else:
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return [
        a._replace(facts={**a.facts, "label": name})
        for a, name in zip(analyses, names, strict=True)
    ]


def experts_csv(analyses: list[Analysis]) -> str:
    """One line per expert of every analysis."""
    stream = io.StringIO(newline="")
    measured = ("value", "null_mean", "null_95", "low", "high", "p", "p_adjusted")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["label", "run", *COLUMNS, *(f"coherence_{name}" for name in measured)])
    for analysis in analyses:
        for profile in (p for layer in analysis.profiles for p in layer):
            values = profile.as_dict()
            cells = [
                " ".join(v) if isinstance(v, list) else v for v in (values[c] for c in COLUMNS)
            ]
            coherence = [values["coherence"][name] for name in measured]
            whose = [analysis.facts[name] for name in ("label", "run")]
            writer.writerow([*whose, *cells, *coherence])
    return stream.getvalue()


def report_html(analyses: list[Analysis], figures: dict[str, Path]) -> str:
    """The page."""
    runs = [
        {
            **a.facts,
            **a.summary(),
            "profiles": [[p.as_dict() for p in layer] for layer in a.profiles],
        }
        for a in analyses
    ]
    drawn = [
        {"name": name, "svg": inline_svg(path.read_text("utf-8")), "caption": CAPTIONS[name]}
        for name, path in figures.items()
    ]
    return render(
        "report.html.j2",
        runs=runs,
        experts_per_layer=_range([len(load_E) for load_E in analyses[0].loads]),
        measures=_by_measure(analyses),
        figures=drawn,
    )


def explanation_html(explanation: Explanation, run: str) -> str:
    """The page that shows a text with its tokens coloured by expert."""
    data = explanation.as_dict()
    layers = data["tokens"][0]["layers"]
    return render(
        "explain.html.j2",
        run=run,
        data=data,
        layers=len(layers),
        known=bool(explanation.known),
        has_cosines=layers[0]["chosen"][0]["cosine"] is not None,
    )


def render(template: str, **values: Any) -> str:
    """A page from one of the templates; text is escaped."""
    folder = files("sra_ds.analysis") / "templates"
    names = ("base.html.j2", template)
    loader = DictLoader({name: (folder / name).read_text("utf-8") for name in names})
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return pages.get_template(template).render(**values)


def inline_svg(text: str) -> str:
    """An SVG file as part of a page: no prologue, no fixed size, the colour of the page's text."""
    svg = text[text.index("<svg") :]
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return f'{head} role="img">{rest}'.replace(INK, "currentColor")


def _range(counts: list[int]) -> str:
    """One number, or the least and the most."""
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def _by_measure(analyses: list[Analysis]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for a in analyses for layer in a.measures for name in layer))
    return [
        {
            "title": name.replace("_", " "),
            "meaning": MEANINGS[name],
            "rows": [
                {"where": f"{a.facts['label']} {layer}", **measures[name].as_dict()}
                for a in analyses
                for layer, measures in enumerate(a.measures)
                if name in measures
            ],
        }
        for name in names
    ]
