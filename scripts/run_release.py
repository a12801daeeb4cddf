"""Takes from the artifacts of the seeds what the repository tracks: one form of each released variant.

`run_seeds.py` has chosen the seed on validation, and the whole artifact stays in `weights/seeds`. Nothing is released
that was not scored: the files must be those of the records in `results/metrics`.

    python scripts/run_release.py
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.arguments import parse_args
from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT, check_replaceable, read_json, whole_folder
from emotion.common.sums import check_sums, has_files, write_sums
from emotion.measure.schema import Record
from emotion.model.artifact import ARTIFACT
from emotion.model.released import BYTES_IN_ALL, BYTES_OF_FILE, LICENSE_FILE, RELEASED, names_to_release


@dataclass
class ReleaseArguments:
    """Where the artifacts and their scores are."""

    weights_dir: str = field(
        default=str(ROOT / "weights"), metadata={"help": "Folder of the artifacts, with those of each seed in seeds/."}
    )
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Folder of the records."})


def main(argv=None) -> None:
    """Checks all variants, then replaces their folders; ``argv``: the flags, else those of the command line."""
    (arguments,) = parse_args((ReleaseArguments,), positional="weights_dir", argv=argv)
    weights, results = Path(arguments.weights_dir), Path(arguments.results_dir)
    licence = weights / LICENSE_FILE
    if not licence.is_file():
        raise UserError(f"no file {licence}: each released folder carries a copy of it")
    # All checks before the first folder is replaced: a release is whole or does not happen.
    sources = {}
    for variant in RELEASED:
        check_replaceable(weights / variant, ARTIFACT)
        sources[variant] = find_source(variant, weights, results)
    check_sizes(sources)
    for variant, source in sources.items():
        with whole_folder(weights / variant, ARTIFACT) as folder:
            for name, released in names_to_release(source, variant).items():
                (folder / released).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / released)
            shutil.copyfile(licence, folder / LICENSE_FILE)
            write_sums(folder)
        megabytes = sum(path.stat().st_size for path in (weights / variant).rglob("*") if path.is_file()) / 1e6
        print(f"{variant:10} {RELEASED[variant]:5} {megabytes:6.1f} MB  {source} -> {weights / variant}")


def find_source(variant: str, weights: Path, results: Path) -> Path:
    """The artifact of the seed that was chosen.

    Raises:
        UserError: if there is none, it is damaged, or the record of its released form is of other files.
    """
    summary = results / "seeds" / f"{variant}.json"
    if not summary.is_file():
        raise UserError(f"no file {summary}; run python scripts/run_seeds.py {variant}")
    source = weights / "seeds" / f"{variant}-{read_json(summary)['chosen_seed']}"
    check_sums(source)
    record = Record.read(results / "metrics" / f"{variant}-{RELEASED[variant]}.json")
    if not record.sha256 or not has_files(source, record.sha256):
        raise UserError(
            f"{source} was not scored as it is now; run python scripts/run_evaluation.py {weights / variant} "
            f"--format {RELEASED[variant]}"
        )
    return source


def check_sizes(sources: dict[str, Path]) -> None:
    """Raises `UserError` if a file, or all together, are more than a clone should carry."""
    total = 0
    for variant, source in sources.items():
        for name in names_to_release(source, variant):
            size = (source / name).stat().st_size
            if size > BYTES_OF_FILE:
                raise UserError(f"{source / name} has {size:,} bytes; a released file has {BYTES_OF_FILE:,} at most")
            total += size
    if total > BYTES_IN_ALL:
        raise UserError(f"the released files have {total:,} bytes; together they have {BYTES_IN_ALL:,} at most")


if __name__ == "__main__":
    run(main)
