"""The report: a Typst source that reads the records and pictures itself, set as a PDF."""

from pathlib import Path

from utils_cli import UserError

SOURCE, REPORT = Path("docs") / "report.typ", Path("docs") / "report.pdf"


def compile_report(root: Path) -> bytes | None:
    """The PDF, the same bytes from the same records; None where there is no source, as beside a README elsewhere."""
    if not (root / SOURCE).is_file():
        return None
    import typst

    try:
        return typst.compile(root / SOURCE, root=root, ignore_system_fonts=True)
    except typst.TypstError as error:
        raise UserError(f"{SOURCE}: {error.message or error}; what it reads comes from the results") from error
