"""Compiles the report, a Typst source that reads the records and pictures, to PDF."""

from pathlib import Path

from emotion.inference.model_folder import RECOMMENDED
from emotion.utils.errors import UserError

SOURCE, REPORT = Path("docs") / "report.typ", Path("docs") / "report.pdf"


def compile_report(root: Path) -> bytes | None:
    """The PDF, the same bytes from the same records; None where its source is not below ``root``.

    Raises:
        UserError: if a result that it cannot do without is missing, or lacks a field.
    """
    if not (root / SOURCE).is_file():
        return None
    import typst  # not needed with --print_only

    try:
        # Typst brings fonts of its own; those of the system would differ from machine to machine.
        return typst.compile(root / SOURCE, root=root, ignore_system_fonts=True, sys_inputs=inputs_of(root))
    except typst.TypstError as error:
        raise UserError(f"{SOURCE}: {error.message or error}; what it reads comes from the results") from error


def inputs_of(root: Path) -> dict[str, str]:
    """The inputs of the source: the files in docs/ and results/, which Typst cannot list, and the recommendation."""
    names = []
    for folder in ("docs", "results"):
        names += [path.relative_to(root).as_posix() for path in (root / folder).rglob("*.*")]
    return {"files": ",".join(sorted(names)), "recommended": RECOMMENDED}
