"""The pages of the studies, from their JSON files alone: no study has to be run again to show its page."""

from pathlib import Path

from emotion.measure.paired_tests import mean_interval
from emotion.measure.record import BASE_FAMILY
from emotion.measure.schema import read_study
from emotion.quantize.levels import LARGEST_SAFE_WEIGHT
from emotion.report.comparison import OPERATORS
from emotion.report.render import complete, render
from emotion.task.scores import VALIDATION_NOISE

# Page -> the studies that it shows, of the small encoder and of the base-size one, as far as they are there
PAGES = {
    "dataset": ["dataset"],
    "ptq": ["ptq_study", "ptq_sensitivity", "ptq_processors"],
    "qlora": ["qlora_sweep", "training_cost"],
    "bits": ["bits"],
    "speed": ["graphs", "openvino", OPERATORS],
    "batch": ["batch"],
    "reliability": ["reliability"],
}
SMALLEST_SHARE = 0.01  # of a call: kinds of operators below it are shown as one
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
                    f"{page}.md",
                    **studies,
                    largest_safe_weight=LARGEST_SAFE_WEIGHT,
                    noise=VALIDATION_NOISE,
                    smallest=SMALLEST_SHARE,
                    many=MANY,
                    mean_interval=mean_interval,
                    given_back=given_back,
                    furthest=lambda scores, others: max(
                        abs(one - other) for one, other in zip(scores, others, strict=True)
                    ),
                    operator_lines=operator_lines,
                )
    return pages


def given_back(ptq: float, qat: float) -> str:
    """How much of what PTQ loses QAT gains, from the changes of macro F1 against FP32."""
    if -ptq <= WORTH_GIVING_BACK:
        return "-"
    return "all" if qat >= 0 else f"{100 * (1 - qat / ptq):.0f} %"


def operator_lines(profile) -> list[tuple]:
    """Kind, count and milliseconds at both sizes of a batch; small kinds as one, then what is left of a call.

    Those that take longest at batch 1 stand first.
    """
    sizes, lines, other = [profile.batch_1, profile.batch_32], [], ["other", 0, 0.0, 0.0]
    for kind in dict.fromkeys([*sizes[0].operators, *sizes[1].operators]):
        found = [size.operators.get(kind) for size in sizes]  # OpenVINO may need it at one size alone
        # The same file computes the same operators at both sizes, or nearly so: one column tells how many.
        count = max(one.count for one in found if one)
        times = [one.ms if one else 0.0 for one in found]
        if any(ms >= SMALLEST_SHARE * size.call_ms for ms, size in zip(times, sizes, strict=True)):
            lines.append((kind, count, *times))
        else:
            other = ["other", other[1] + count, other[2] + times[0], other[3] + times[1]]
    calls = [size.call_ms for size in sizes]
    between = [size.call_ms - sum(one.ms for one in size.operators.values()) for size in sizes]
    return [*lines, tuple(other), ("*between operators*", "", *between), ("*a call*", "", *calls)]
