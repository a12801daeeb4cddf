"""The pages of the studies, from their JSON files alone: no study has to be run again to show its page."""

from pathlib import Path

from emotion.data.metrics import VALIDATION_NOISE
from emotion.evaluation.record import BASE_FAMILY
from emotion.evaluation.schema import read_study
from emotion.evaluation.statistics import mean_interval
from emotion.hub.render import complete, render
from emotion.utils.levels import LARGEST_SAFE_WEIGHT
from report import TEMPLATES

# Page -> the studies that it shows, of the small encoder and of the base-size one, as far as they are there
PAGES = {
    "dataset": ["dataset"],
    "ptq": ["ptq_study", "ptq_sensitivity"],
    "qlora": ["qlora_sweep", "training_cost"],
    "bits": ["bits"],
    "batch": ["batch"],
    "reliability": ["reliability"],
}
MANY = 10**9  # texts, for which the page of many texts does the sum
WORTH_GIVING_BACK = 0.003  # of macro F1: a smaller loss is noise, and a share of it says nothing


def families_of(results: Path) -> list[Path]:
    """The folders of results: that of the small encoder, then that of the base-size one, if it is there.

    Args:
        results: either of the two.
    """
    main = results.parent if results.name == BASE_FAMILY else results
    return [folder for folder in (main, main / BASE_FAMILY) if folder.is_dir()]


def page_of(results: Path, name: str) -> Path:
    """A page of studies, one for all encoders: it lies in the small encoder's folder."""
    return families_of(results)[0] / f"{name}.md"


def render_study_pages(results: Path) -> dict[Path, str]:
    """Path -> text of each page that has a study among the results, of either encoder."""
    pages = {}
    for page, names in PAGES.items():
        studies = {}
        for name in names:
            paths = [family / f"{name}.json" for family in families_of(results)]
            studies[Path(name).name] = [read_study(path) for path in paths if path.is_file()]
        if any(studies.values()):
            with complete(f"{page}.md"):
                pages[page_of(results, page)] = render(
                    TEMPLATES / f"{page}.md",
                    **studies,
                    largest_safe_weight=LARGEST_SAFE_WEIGHT,
                    noise=VALIDATION_NOISE,
                    many=MANY,
                    mean_interval=mean_interval,
                    given_back=given_back,
                    furthest=lambda scores, others: max(
                        abs(one - other) for one, other in zip(scores, others, strict=True)
                    ),
                )
    return pages


def given_back(ptq: float, qat: float) -> str:
    """How much of what PTQ loses QAT gains, from the changes of macro F1 against FP32."""
    if -ptq <= WORTH_GIVING_BACK:
        return "-"
    return "all" if qat >= 0 else f"{100 * (1 - qat / ptq):.0f} %"
