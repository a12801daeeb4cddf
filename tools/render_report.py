"""Renders the records and studies: the README's table, the pages, cards, pictures and the report.

No number is typed by hand, and rendering twice changes nothing. A record that lacks a field stops the rendering, and a
result from the sample or from a short run never enters the README. `results/mpnet-base` has the 12-layer
encoder's results, with a comparison of their own and two rows of the README.

    python tools/render_report.py
    python tools/render_report.py --check                                          # as `make check` does
    python tools/render_report.py --results_dir build/run/results --print_only
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from emotion.evaluation.record import MPNET_BASE
from emotion.evaluation.schema import Record
from emotion.hub.comparison import Family, read_family
from emotion.hub.model_card import render_cards
from emotion.utils.arguments import flag, parse_args
from emotion.utils.base_model import RANDOM
from emotion.utils.command import Bar, run
from emotion.utils.errors import UserError
from emotion.utils.files import RECOMMENDED, ROOT, write_bytes
from report.figures import list_card_pictures, list_pictures, list_study_pictures, same_picture
from report.pages import render_block, render_page, render_study_pages, render_table

SOURCE, REPORT = Path("docs") / "report.typ", Path("docs") / "report.pdf"
# The lines of the README between which this program writes
START, END = "<!-- results: written by tools/render_report.py -->", "<!-- end of results -->"


@dataclass
class ComparisonArguments:
    """Which results are shown, and where."""

    results_dir: str = flag(str(ROOT / "results"), "Folder with metrics/, seeds/, ...")
    readme: str = flag(str(ROOT / "README.md"), "The README, with docs/ beside it.")
    check: bool = flag(False, "Write nothing; fail if a file differs.")
    print_only: bool = flag(False, "Print the table and write nothing.")


def main(argv=None) -> None:
    """Writes, checks or prints, as the flags say."""
    (arguments,) = parse_args((ComparisonArguments,), positional="results_dir", argv=argv)
    results, readme = Path(arguments.results_dir).resolve(), Path(arguments.readme).resolve()
    families = [read_family(results)]
    if (results / MPNET_BASE / "metrics").is_dir():
        families.append(read_family(results / MPNET_BASE))
    if not arguments.print_only:  # the table alone may show a short run, or the sample
        pages, pictures = {}, list_study_pictures(results) | list_card_pictures(families[0])
        for family in families:
            for record in family.records:
                check_publishable(record)
            shown = list_pictures(family)
            pages |= render_family(family, list(shown))
            pictures |= shown
        pages |= render_pages(families, readme)
        files = draw_and_compile(pages, pictures, readme.parent, keep=arguments.check)
        if arguments.check:
            check(files)
        else:
            for path, content in files.items():
                write_bytes(path, content)
    for family in families:
        print(render_table(family.comparison))


def render_family(family: Family, pictures: list[Path]) -> dict[Path, str]:
    """Renders the comparison of one encoder's variants, as JSON and as a page."""
    comparison = json.dumps(family.comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path = family.folder / "comparison.json"
    return {path: comparison, path.with_suffix(".md"): render_page(family, pictures)}


def render_pages(families: list[Family], readme: Path) -> dict[Path, str]:
    """Renders the README, the cards and the pages of the studies: path -> text.

    Raises:
        UserError: if the README has no place for the table, or a record or a study lacks a field.
    """
    results, records = families[0].folder, families[0].records
    text = readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UserError(f"{readme}: needs one line '{START}' and, below it, one line '{END}'")
    block = render_block(families, readme.parent)
    text = f"{text.split(START)[0]}{START}\n\n{block}\n{END}{text.split(END)[1]}"
    seeds = families[0].comparison["seeds"]
    cards = render_cards(records, readme.parent / "model_cards", families[0].benchmarks, seeds)
    return {readme: text, **cards, **render_study_pages(results)}


def draw_and_compile(pages: dict[Path, str], pictures: dict, root: Path, keep: bool) -> dict[Path, bytes]:
    """Draws the pictures and compiles the report: path -> content of every file, before any is written.

    With ``keep``, a picture that shows the same stays as it is: another processor may round a pixel differently.
    """
    files = {path: text.encode() for path, text in pages.items()}
    with tempfile.TemporaryDirectory() as folder:
        for path, draw in Bar(pictures.items(), desc="pictures"):
            fresh = Path(folder) / path.name
            draw(fresh)
            files[path] = (path if keep and same_picture(fresh, path) else fresh).read_bytes()
        if (root / SOURCE).is_file():
            copy = Path(folder) / "root"
            for name in ("docs", "results"):
                shutil.copytree(root / name, copy / name)
            for path, content in files.items():
                if path.is_relative_to(root):
                    write_bytes(copy / path.relative_to(root), content)
            files[root / REPORT] = compile_report(copy)
    return files


def compile_report(root: Path) -> bytes:
    """Compiles the report to PDF, the same bytes from the same records.

    Raises:
        UserError: if a result that it cannot do without is missing, or lacks a field.
    """
    import typst  # not needed with --print_only

    try:
        # Typst brings fonts of its own; those of the system would differ from machine to machine.
        return typst.compile(root / SOURCE, root=root, ignore_system_fonts=True, sys_inputs=inputs_of(root))
    except typst.TypstError as error:
        raise UserError(f"{SOURCE}: {error.message or error}; what it reads comes from the results") from error


def inputs_of(root: Path) -> dict[str, str]:
    """The inputs of the source: the files in docs/ and results/, which Typst cannot list, and the recommendation."""
    paths = [*(root / "docs").rglob("*.*"), *(root / "results").rglob("*.*")]
    files = sorted(path.relative_to(root).as_posix() for path in paths)
    return {"files": ",".join(files), "recommended": RECOMMENDED}


def check(files: dict[Path, bytes]) -> None:
    """Raises `UserError` if a file differs from what would be written."""
    stale = [str(path) for path, content in files.items() if not path.is_file() or path.read_bytes() != content]
    if stale:
        raise UserError(f"not what the records say: {', '.join(stale)}; run python tools/render_report.py")


def check_publishable(record: Record) -> None:
    """Raises `UserError` unless the record may be published: of real data, scored on test, after a full training."""
    provenance, name = record.provenance, record.name
    if "sample" in {provenance.dataset_source, provenance.train_dataset_source}:
        raise UserError(f"{name} was trained or scored on the sample: not for the README")
    if provenance.base_model_source == RANDOM:
        raise UserError(f"{name} was made from random weights: not for the README")
    if record.quality.split != "test":
        raise UserError(f"{name} was scored on {record.quality.split}, not on test: not for the README")
    recipe = provenance.recipe or {}
    # A language model, a peer, may be trained on part of the rows, which the comparison states.
    limits = {"max_steps"} if record.format == "adapter" else {"max_train_samples", "max_steps"}
    if short := limits & {**recipe, **provenance.training_recipe}.keys():
        raise UserError(f"{name} is a short run ({', '.join(sorted(short))} in its recipe): not for the README")


if __name__ == "__main__":
    run(main)
